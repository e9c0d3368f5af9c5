"""What the operators mean, in plain torch."""

from seqattn_kernels.reference import attention, decoder, recurrence

__all__ = ["attention", "decoder", "recurrence"]
