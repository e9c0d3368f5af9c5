"""The tutorials' model: a SimpleRNN, an AttentionLayer over its states, a Dense layer on their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqattn_kernels import nn as fast


class AttentionLayer(nn.Module):
    """``softmax(tanh(x W + b), over time) * x``, for each feature, summed over time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(torch.tanh(self.linear(x)), dim=1)
        return (weights * x).sum(1), weights


class StockTutorial(nn.Module):
    def __init__(self, features: int = 1, hidden: int = 16) -> None:
        super().__init__()
        self.rnn: Any = nn.RNN(features, hidden, batch_first=True)
        self.attention: Any = AttentionLayer(hidden)
        self.dense = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, features] -> the next value [B, 1], weights [B, T, hidden]."""
        states, _ = self.rnn(x)
        pooled, weights = self.attention(states)
        return self.dense(pooled), weights


class Tutorial(StockTutorial):
    """The same with this package's RNN and attention."""

    def __init__(self, features: int = 1, hidden: int = 16) -> None:
        super().__init__(features, hidden)
        self.rnn = fast.RNN(features, hidden, batch_first=True)
        self.attention = fast.FeatureAttention(hidden, reduce=True)
