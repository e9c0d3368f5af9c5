"""What the operators mean, in plain torch."""

from seqattn_kernels.reference import recurrence

__all__ = ["recurrence"]
