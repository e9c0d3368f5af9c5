"""What the operators mean, in plain torch."""

from seqattn_kernels.reference import attention, recurrence

__all__ = ["attention", "recurrence"]
