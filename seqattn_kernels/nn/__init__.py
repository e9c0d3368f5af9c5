"""Modules: torch.nn's recurrent ones made faster, and attention."""

from __future__ import annotations

from seqattn_kernels.nn.alignment import (
    CoverageAttention,
    LocalAttention,
    LocationSensitiveAttention,
    MonotonicAttention,
)
from seqattn_kernels.nn.attention import (
    AdditiveAttention,
    ConcatAttention,
    CosineAttention,
    DotAttention,
    GeneralAttention,
    MultiHeadAdditiveAttention,
)
from seqattn_kernels.nn.cells import GRUCell, LSTMCell, RNNCell
from seqattn_kernels.nn.decoder import AttentionDecoder
from seqattn_kernels.nn.freezing import freeze, frozen, unfreeze
from seqattn_kernels.nn.pooling import FeatureAttention, PoolingAttention
from seqattn_kernels.nn.recurrent import GRU, LSTM, RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionDecoder",
    "ConcatAttention",
    "CosineAttention",
    "CoverageAttention",
    "DotAttention",
    "FeatureAttention",
    "GRUCell",
    "GeneralAttention",
    "LSTMCell",
    "LocalAttention",
    "LocationSensitiveAttention",
    "MonotonicAttention",
    "MultiHeadAdditiveAttention",
    "PoolingAttention",
    "RNNCell",
    "freeze",
    "frozen",
    "unfreeze",
]
