"""The operators as Python sees them: fake kernels and autograd over the native ones."""

from seqattn_kernels.ops import (
    alignment,
    attention,
    attention_cuda,
    decoder,
    decoder_cuda,
    features,
    location,
    pooling,
    recurrence,
    scores,
)

__all__ = [
    "alignment",
    "attention",
    "attention_cuda",
    "decoder",
    "decoder_cuda",
    "features",
    "location",
    "pooling",
    "recurrence",
    "scores",
]
