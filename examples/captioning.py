"""Captioning: an LSTM writes while it attends to a grid of image features (Xu et al., 2015, soft attention)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.stock import AdditiveAttention
from seqattn_kernels import nn as fast
from seqattn_kernels.decoding import Hypothesis, sample_search
from seqattn_kernels.functional import DecoderState


class StockWriter(nn.Module):
    def __init__(self, input_size: int, hidden: int, features: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(input_size + features, hidden)])
        self.attention = AdditiveAttention(hidden, features, hidden)
        self.output_proj = nn.Linear(features + hidden, hidden)

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor], grid: Tensor) -> tuple[Tensor, Tensor]:
        everything = torch.ones(grid.shape[:2], dtype=torch.bool, device=grid.device)
        found = []
        for x in input.unbind(1):
            context, weights = self.attention(state[0], grid, everything)
            state = self.cells[0](torch.cat([x, context], 1), state)
            found.append((torch.tanh(self.output_proj(torch.cat([context, state[0]], 1))), weights))
        outputs, weights = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return outputs, weights


class StockCaptioner(nn.Module):
    """Features [B, C, rows, columns] of an image -> words."""

    def __init__(self, features: int, words: int, hidden: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, hidden)
        self.h0, self.c0 = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.decoder: Any = StockWriter(hidden, hidden, features)
        self.predict = nn.Linear(hidden, words)

    def look(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The places of the grid [B, S, C] and the first state, from their mean."""
        grid = image.flatten(2).transpose(1, 2)
        mean = grid.mean(1)
        return grid, (torch.tanh(self.h0(mean)), torch.tanh(self.c0(mean)))

    def forward(self, image: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        """caption [B, T], the words before each -> logits [B, T, V], weights [B, T, S]."""
        grid, state = self.look(image)
        outputs, weights = self.decoder(self.embed(caption), state, grid)
        return self.predict(outputs), weights


class Captioner(StockCaptioner):
    """The same with this package's decoder."""

    def __init__(self, features: int, words: int, hidden: int = 48) -> None:
        super().__init__(features, words, hidden)
        self.decoder = fast.AttentionDecoder(hidden, hidden, features, cell="lstm", output_size=hidden)

    def forward(self, image: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        grid, state = self.look(image)
        out = self.decoder(self.embed(caption), grid, state=state)
        return self.predict(out.output), out.weights

    @torch.no_grad()
    def describe(
        self, image: Tensor, start: int, end: int, samples: int = 3, longest: int = 20, top_p: float = 0.9
    ) -> list[list[Hypothesis]]:
        """Captions drawn from the nucleus of the distribution."""
        grid, first = self.look(image)

        def step(words: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Any]:
            output, state = self.decoder.step(self.embed(words), state)
            return self.predict(output).log_softmax(1), state, state.weights

        state = self.decoder.begin(grid, state=first)
        return sample_search(step, state, start=start, end=end, max_length=longest, samples=samples, top_p=top_p)
