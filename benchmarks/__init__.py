"""Measurements of seqattn_kernels against stock torch and other engines; `python -m benchmarks.run --help`."""
