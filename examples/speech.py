"""Speech recognition as Listen, Attend and Spell (Chan et al., 2015) does it, with location-sensitive attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.stock import LocationAttention, padding_mask
from seqattn_kernels import nn as fast


def halve(frames: Tensor) -> Tensor:
    """[B, S, D] -> [B, S / 2, 2 D]: the pyramid's step. Pairs become frames; an odd last frame is left out."""
    pairs = frames.shape[1] // 2
    return frames[:, : 2 * pairs].reshape(len(frames), pairs, -1)


class StockSpeller(nn.Module):
    """A GRU with location-sensitive attention; parameters named as nn.AttentionDecoder names them."""

    def __init__(self, input_size: int, hidden: int, key_size: int, filters: int, kernel_size: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(input_size + key_size, hidden)])
        self.attention = LocationAttention(hidden, key_size, hidden, filters, kernel_size)

    def forward(self, input: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = input.new_zeros(len(input), self.cells[0].hidden_size)
        history, keys = input.new_zeros(len(input), 2, values.shape[1]), self.attention.key_proj(values)
        found = []
        for x in input.unbind(1):
            context, weights, history = self.attention(h, keys, values, history, mask)
            h = self.cells[0](torch.cat([x, context], 1), h)
            found.append((h, context, weights))
        outputs, contexts, weights = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return outputs, contexts, weights


class StockRecognizer(nn.Module):
    """A pyramid of bidirectional LSTMs listens, a GRU spells."""

    def __init__(
        self, features: int, characters: int, hidden: int = 32, filters: int = 4, kernel_size: int = 9
    ) -> None:
        super().__init__()
        self.listen: Any = nn.ModuleList(self._lstm(nn.LSTM, size, hidden) for size in (features, 4 * hidden))
        self.embed = nn.Embedding(characters, hidden)
        self.decoder: Any = StockSpeller(hidden, hidden, 4 * hidden, filters, kernel_size)
        self.predict = nn.Linear(5 * hidden, characters)

    @staticmethod
    def _lstm(kind: Any, size: int, hidden: int) -> nn.Module:
        return kind(size, hidden, batch_first=True, bidirectional=True)

    def encode(self, frames: Tensor) -> Tensor:
        for layer in self.listen:
            frames = halve(layer(frames)[0])
        return frames

    def forward(self, frames: Tensor, lengths: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """frames [B, S, F], lengths [B] in frames, text [B, T], the characters before each -> logits, weights."""
        states = self.encode(frames)
        mask = padding_mask(lengths // 4, states.shape[1])
        outputs, contexts, weights = self.decoder(self.embed(text), states, mask)
        return self.predict(torch.cat([outputs, contexts], 2)), weights


class Recognizer(StockRecognizer):
    """The same with this package's modules."""

    def __init__(
        self, features: int, characters: int, hidden: int = 32, filters: int = 4, kernel_size: int = 9
    ) -> None:
        super().__init__(features, characters, hidden, filters, kernel_size)
        self.listen = nn.ModuleList(self._lstm(fast.LSTM, size, hidden) for size in (features, 4 * hidden))
        self.decoder = fast.AttentionDecoder(
            hidden, hidden, 4 * hidden, score="location", score_options={"filters": filters, "kernel_size": kernel_size}
        )

    def forward(self, frames: Tensor, lengths: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        out = self.decoder(self.embed(text), self.encode(frames), lengths=lengths // 4)
        return self.predict(torch.cat([out.output, out.contexts], 2)), out.weights
