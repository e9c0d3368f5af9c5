"""The decoder of Tacotron 2 (Shen et al., 2018): two LSTM cells with location-sensitive attention between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.stock import LocationAttention, dropout, padding_mask
from seqattn_kernels import nn as fast

State = tuple[Any, ...]


class StockLoop(nn.Module):
    """A cell, the attention it asks for, and a cell that sees both; parameters as nn.AttentionDecoder names them."""

    def __init__(
        self, input: int, hidden: int, memory: int, attention: int, filters: int, kernel_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.hidden_size, self.hidden_dropout = hidden, dropout
        self.cells = nn.ModuleList([nn.LSTMCell(input + memory, hidden), nn.LSTMCell(hidden + memory, hidden)])
        self.attention = LocationAttention(hidden, memory, attention, filters, kernel_size)

    def begin(self, values: Tensor, lengths: Tensor) -> State:
        """values [B, S, D], lengths [B] -> the state before the first step."""
        batch, source, width = values.shape
        zeros = values.new_zeros(batch, self.hidden_size)
        memory = self.attention.key_proj(values), values, padding_mask(lengths, source)
        return (
            (zeros, zeros),
            (zeros, zeros),
            values.new_zeros(batch, width),
            values.new_zeros(batch, 2, source),
            memory,
        )

    def drop(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return F.dropout(state[0], self.hidden_dropout, self.training), state[1]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        """x [B, I] -> h of the second cell [B, H], context [B, D], weights [B, S], the state after it."""
        first, second, context, history, (keys, values, mask) = state
        first = self.drop(self.cells[0](torch.cat([x, context], 1), first))
        context, weights, history = self.attention(first[0], keys, values, history, mask)
        second = self.drop(self.cells[1](torch.cat([first[0], context], 1), second))
        return second[0], context, weights, (first, second, context, history, (keys, values, mask))

    def forward(self, input: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input [B, T, I] -> h [B, T, H], contexts [B, T, D], weights [B, T, S]."""
        state = self.begin(values, lengths)
        found = []
        for x in input.unbind(1):
            *results, state = self.step(x, state)
            found.append(results)
        outputs, contexts, weights = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return outputs, contexts, weights


class StockTacotronDecoder(nn.Module):
    """Frames of a mel spectrogram from an encoder's output; sizes are those published by default.

    prenet_dropout acts in inference too; hidden_dropout is on both cells' h, in training.
    """

    def __init__(
        self,
        mels: int = 80,
        memory: int = 512,
        prenet: int = 256,
        hidden: int = 1024,
        attention: int = 128,
        filters: int = 32,
        kernel_size: int = 31,
        prenet_dropout: float = 0.5,
        hidden_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.mels, self.prenet_dropout = mels, prenet_dropout
        self.prenet = nn.ModuleList([nn.Linear(mels, prenet, bias=False), nn.Linear(prenet, prenet, bias=False)])
        self.decoder: Any = self._loop(prenet, hidden, memory, attention, filters, kernel_size, hidden_dropout)
        self.frame = nn.Linear(hidden + memory, mels)
        self.gate = nn.Linear(hidden + memory, 1)

    def _loop(self, *sizes: Any) -> nn.Module:
        return StockLoop(*sizes)

    def squeeze(self, frames: Tensor) -> Tensor:
        """frames [.., mels] -> what the cells see of them [.., prenet]."""
        for layer in self.prenet:
            frames = dropout(torch.relu(layer(frames)), self.prenet_dropout)
        return frames

    def project(self, output: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """h [.., H], context [.., D] -> frames [.., mels], gates [..]."""
        both = torch.cat([output, context], -1)
        return self.frame(both), self.gate(both).squeeze(-1)

    def run(self, input: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.decoder(input, values, lengths)

    def begin(self, values: Tensor, lengths: Tensor) -> Any:
        return self.decoder.begin(values, lengths)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """x [B, I] -> h [B, H], context [B, D], the state after it."""
        output, context, _, state = self.decoder.step(x, state)
        return output, context, state

    def forward(self, frames: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher forcing: the frames before each [B, T, mels] -> frames, gates [B, T], weights [B, T, S]."""
        outputs, contexts, weights = self.run(self.squeeze(frames), values, lengths)
        return *self.project(outputs, contexts), weights

    @torch.no_grad()
    def generate(self, values: Tensor, lengths: Tensor, longest: int, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """Frames until every gate has opened: [B, T <= longest, mels], and how many are each row's [B]."""
        state = self.begin(values, lengths)
        frame = values.new_zeros(len(values), self.mels)
        count = torch.full((len(values),), longest, device=values.device)
        frames = []
        for t in range(longest):
            output, context, state = self.step(self.squeeze(frame), state)
            frame, gate = self.project(output, context)
            frames.append(frame)
            count = torch.where((gate.sigmoid() > threshold) & (count == longest), t + 1, count)
            if bool((count <= t + 1).all()):
                break
        return torch.stack(frames, 1), count


class TacotronDecoder(StockTacotronDecoder):
    """The same with this package's decoder: all teacher-forced steps in one operator, or one step in one."""

    def _loop(self, *sizes: Any) -> nn.Module:
        prenet, hidden, memory, attention, filters, kernel_size, dropout = sizes
        return fast.AttentionDecoder(
            prenet, hidden, memory, cell="lstm", num_layers=2, order="between", score="location",
            attention_size=attention, score_options={"filters": filters, "kernel_size": kernel_size},
            hidden_dropout=dropout,
        )  # fmt: skip

    def run(self, input: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.decoder(input, values, lengths=lengths)
        return out.output, out.contexts, out.weights

    def begin(self, values: Tensor, lengths: Tensor) -> Any:
        return self.decoder.begin(values, lengths=lengths)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        output, state = self.decoder.step(x, state)
        return output, state.context, state
