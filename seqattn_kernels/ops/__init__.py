"""The operators as Python sees them: fake kernels and autograd over the native ones."""

from seqattn_kernels.ops import attention, attention_cuda, recurrence

__all__ = ["attention", "attention_cuda", "recurrence"]
