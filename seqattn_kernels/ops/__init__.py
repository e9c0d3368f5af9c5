"""The operators as Python sees them: fake kernels and autograd over the native ones."""

from seqattn_kernels.ops import attention, decoder, recurrence, scores

__all__ = ["attention", "decoder", "recurrence", "scores"]
