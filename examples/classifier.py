"""Classification: a bidirectional LSTM reads, attention pools what it read (Yang et al., 2016)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from examples.stock import padding_mask, weigh
from seqattn_kernels import nn as fast


class StockPooling(nn.Module):
    def __init__(self, size: int, attention: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, attention)
        self.v = nn.Parameter(torch.randn(attention) / math.sqrt(attention))

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.tanh(self.linear(input)) @ self.v
        return weigh(scores, padding_mask(lengths, input.shape[1]), input)


class StockClassifier(nn.Module):
    def __init__(self, words: int, classes: int, embedding: int = 32, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, embedding)
        self.rnn: Any = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
        self.pool: Any = StockPooling(2 * hidden, hidden)
        self.predict = nn.Linear(2 * hidden, classes)

    def encode(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=words.shape[1])[0]

    def forward(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """words [B, S], lengths [B] -> logits [B, classes], the weight of each word [B, S]."""
        pooled, weights = self.pool(self.encode(words, lengths), lengths=lengths)
        return self.predict(pooled), weights


class Classifier(StockClassifier):
    """The same with this package's modules, without packing sequences."""

    def __init__(self, words: int, classes: int, embedding: int = 32, hidden: int = 32) -> None:
        super().__init__(words, classes, embedding, hidden)
        self.rnn = fast.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
        self.pool = fast.PoolingAttention(2 * hidden, hidden)

    def encode(self, words: Tensor, lengths: Tensor) -> Tensor:
        return self.rnn(self.embed(words), lengths=lengths)[0]
