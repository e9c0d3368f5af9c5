"""Attention and decoder loops in stock torch, the way papers' code writes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """[B, S], True at what isn't padding."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def weigh(scores: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [B, S], mask [B, S], values [B, S, D] -> context [B, D], weights [B, S]."""
    weights = scores.masked_fill(~mask, -math.inf).softmax(1)
    return torch.bmm(weights.unsqueeze(1), values).squeeze(1), weights


class AdditiveAttention(nn.Module):
    """Bahdanau, Cho, Bengio (2014)."""

    def __init__(self, query_size: int, key_size: int, size: int) -> None:
        super().__init__()
        self.query_proj = nn.Linear(query_size, size)
        self.key_proj = nn.Linear(key_size, size, bias=False)
        self.v = nn.Parameter(torch.randn(size) / math.sqrt(size))

    def forward(self, query: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        energies = torch.tanh(self.query_proj(query).unsqueeze(1) + self.key_proj(values))
        return weigh(energies @ self.v, mask, values)


class GeneralAttention(nn.Module):
    """Luong, Pham, Manning (2015), "general"."""

    def __init__(self, query_size: int, key_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(query_size, key_size) / math.sqrt(key_size))

    def forward(self, query: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.bmm(values, (query @ self.weight).unsqueeze(2)).squeeze(2)
        return weigh(scores, mask, values)


class LocationAttention(nn.Module):
    """Chorowski et al. (2015), with the last and the sum of all earlier weights, as in Tacotron 2."""

    def __init__(self, query_size: int, key_size: int, size: int, filters: int, kernel_size: int) -> None:
        super().__init__()
        self.query_proj = nn.Linear(query_size, size)
        self.key_proj = nn.Linear(key_size, size, bias=False)
        self.conv = nn.Conv1d(2, filters, kernel_size, padding=kernel_size // 2, bias=False)
        self.feature_proj = nn.Linear(filters, size, bias=False)
        self.v = nn.Parameter(torch.randn(size) / math.sqrt(size))

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, history: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """keys: values through key_proj, once for all steps; history [B, 2, S] -> context, weights, next history."""
        location = self.feature_proj(self.conv(history).transpose(1, 2))
        energies = torch.tanh(self.query_proj(query).unsqueeze(1) + keys + location)
        context, weights = weigh(energies @ self.v, mask, values)
        return context, weights, torch.stack([weights, history[:, 1] + weights], 1)


class BahdanauDecoder(nn.Module):
    """A GRU that attends with its state of the step before; `cells`, `attention` as nn.AttentionDecoder names them."""

    def __init__(self, input_size: int, hidden_size: int, key_size: int, attention_size: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(input_size + key_size, hidden_size)])
        self.attention = AdditiveAttention(hidden_size, key_size, attention_size)

    def step(self, x: Tensor, h: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, weights = self.attention(h, values, mask)
        return self.cells[0](torch.cat([x, context], 1), h), context, weights

    def forward(self, input: Tensor, h: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input [B, T, I] -> h [B, T, H], contexts [B, T, D], weights [B, T, S]."""
        found = []
        for x in input.unbind(1):
            h, context, weights = self.step(x, h, values, mask)
            found.append((h, context, weights))
        outputs, contexts, weights = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return outputs, contexts, weights


class InputFeedingDecoder(nn.Module):
    """Two LSTM layers that see the attentional vector of the step before (Luong, Pham, Manning, 2015)."""

    def __init__(self, input_size: int, hidden_size: int, key_size: int, output_size: int) -> None:
        super().__init__()
        first, second = nn.LSTMCell(input_size + output_size, hidden_size), nn.LSTMCell(hidden_size, hidden_size)
        self.cells = nn.ModuleList([first, second])
        self.hidden_size = hidden_size
        self.attention = GeneralAttention(hidden_size, key_size)
        self.output_proj = nn.Linear(key_size + hidden_size, output_size)

    def forward(self, input: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """input [B, T, I] -> attentional vectors [B, T, M], weights [B, T, S]."""
        batch, hidden = len(input), self.hidden_size
        states = [(input.new_zeros(batch, hidden), input.new_zeros(batch, hidden)) for _ in self.cells]
        fed = input.new_zeros(batch, self.output_proj.out_features)
        found = []
        for x in input.unbind(1):
            below = torch.cat([x, fed], 1)
            for n, cell in enumerate(self.cells):
                states[n] = cell(below, states[n])
                below = states[n][0]
            context, weights = self.attention(below, values, mask)
            fed = torch.tanh(self.output_proj(torch.cat([context, below], 1)))
            found.append((fed, weights))
        outputs, weights = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return outputs, weights


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout whether or not in training, as Tacotron 2's prenet has it."""
    return F.dropout(x, p, training=True)
