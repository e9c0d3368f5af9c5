"""The operators as Python sees them: fake kernels and autograd over the native ones."""

from seqattn_kernels.ops import attention, features, recurrence, scores

__all__ = ["attention", "features", "recurrence", "scores"]
