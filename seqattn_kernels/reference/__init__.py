"""What the operators mean, in plain torch."""

from seqattn_kernels.reference import alignment, attention, decoder, normalizers, recurrence

__all__ = ["alignment", "attention", "decoder", "normalizers", "recurrence"]
