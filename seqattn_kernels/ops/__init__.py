"""The operators as Python sees them: fake kernels and autograd over the native ones."""

from seqattn_kernels.ops import attention, attention_cuda, decoder, decoder_cuda, features, recurrence, scores

__all__ = ["attention", "attention_cuda", "decoder", "decoder_cuda", "features", "recurrence", "scores"]
