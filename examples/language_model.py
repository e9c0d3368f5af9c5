"""A language model that attends to its own past states (Cheng, Dong, Lapata, 2016; Daniluk et al., 2017)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from examples.stock import AdditiveAttention
from seqattn_kernels import nn as fast


class StockLanguageModel(nn.Module):
    """Each state looks at itself and at all before it; a word's logits come of both."""

    def __init__(self, words: int, embedding: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, embedding)
        self.rnn: Any = nn.LSTM(embedding, hidden, batch_first=True)
        self.attention: Any = AdditiveAttention(hidden, hidden, hidden)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.predict = nn.Linear(hidden, words)

    def attend(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states [B, T, H] -> contexts [B, T, H], weights [B, T, T]."""
        attention, found = self.attention, []
        for t in range(states.shape[1]):
            past = states[:, : t + 1]
            energies = torch.tanh(attention.query_proj(states[:, t]).unsqueeze(1) + attention.key_proj(past))
            weights = (energies @ attention.v).softmax(1)
            context = torch.bmm(weights.unsqueeze(1), past).squeeze(1)
            found.append((context, nn.functional.pad(weights, (0, states.shape[1] - t - 1))))
        contexts, weights = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return contexts, weights

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """words [B, T] -> logits of the next word at each place [B, T, V], weights [B, T, T]."""
        states, _ = self.rnn(self.embed(words))
        contexts, weights = self.attend(states)
        return self.predict(torch.tanh(self.combine(torch.cat([contexts, states], 2)))), weights

    def perplexity(self, words: Tensor) -> float:
        """Of words [B, T + 1] given those before them."""
        logits, _ = self(words[:, :-1])
        return math.exp(nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten()).item())


class LanguageModel(StockLanguageModel):
    """The same with all states' looks in one call."""

    def __init__(self, words: int, embedding: int = 32, hidden: int = 48) -> None:
        super().__init__(words, embedding, hidden)
        self.rnn = fast.LSTM(embedding, hidden, batch_first=True)
        self.attention = fast.AdditiveAttention(hidden, hidden, hidden)

    def attend(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(states, states, causal=True)
