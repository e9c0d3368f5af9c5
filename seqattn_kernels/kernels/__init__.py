"""Triton kernels: scores from a table, row normalisers, decoder steps. Importing this needs triton."""
