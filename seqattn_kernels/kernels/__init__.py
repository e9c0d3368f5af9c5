"""Triton kernels: scores from a table, row normalisers, decoder steps. Importing this needs triton."""

from __future__ import annotations

from seqattn_kernels.kernels.alignment import monotonic_bwd, monotonic_fwd
from seqattn_kernels.kernels.features import feature_bwd, feature_fwd
from seqattn_kernels.kernels.operators import (
    additive_bwd,
    additive_fwd,
    additive_pack,
    context_fwd,
    normalize_bwd,
    normalize_fwd,
    scores_bwd,
    scores_fwd,
)
from seqattn_kernels.kernels.pooling import pool_bwd, pool_fwd

__all__ = [
    "additive_bwd",
    "additive_fwd",
    "additive_pack",
    "context_fwd",
    "feature_bwd",
    "feature_fwd",
    "monotonic_bwd",
    "monotonic_fwd",
    "normalize_bwd",
    "normalize_fwd",
    "pool_bwd",
    "pool_fwd",
    "scores_bwd",
    "scores_fwd",
]
