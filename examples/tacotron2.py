"""The decoder of Tacotron 2 (Shen et al., 2018): two LSTM cells with location-sensitive attention between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.stock import LocationAttention, dropout, padding_mask
from seqattn_kernels import nn as fast


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
        self.mels, self.hidden, self.memory = mels, hidden, memory
        self.prenet_dropout, self.hidden_dropout = prenet_dropout, hidden_dropout
        self.prenet = nn.ModuleList([nn.Linear(mels, prenet, bias=False), nn.Linear(prenet, prenet, bias=False)])
        self.attention_rnn: Any = nn.LSTMCell(prenet + memory, hidden)
        self.attention: Any = LocationAttention(hidden, memory, attention, filters, kernel_size)
        self.decoder_rnn: Any = nn.LSTMCell(hidden + memory, hidden)
        self.frame = nn.Linear(hidden + memory, mels)
        self.gate = nn.Linear(hidden + memory, 1)

    def begin(self, values: Tensor, lengths: Tensor) -> dict[str, Any]:
        """values [B, S, D], lengths [B] -> the state before the first frame."""
        batch, source, _ = values.shape
        zeros = values.new_zeros(batch, self.hidden)
        return {
            "keys": values,
            "values": values,
            "masks": {"mask": padding_mask(lengths, source)},
            "first": (zeros, zeros),
            "second": (zeros, zeros),
            "context": values.new_zeros(batch, self.memory),
            "history": values.new_zeros(batch, 2, source),
        }

    def attend(self, query: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention(query, state["values"], state["history"], **state["masks"])

    def drop(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return F.dropout(state[0], self.hidden_dropout, self.training), state[1]

    def step(self, frame: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """The frame before [B, mels] -> the next, its gate [B], weights [B, S], the state after it."""
        x = frame
        for layer in self.prenet:
            x = dropout(torch.relu(layer(x)), self.prenet_dropout)
        first = self.drop(self.attention_rnn(torch.cat([x, state["context"]], 1), state["first"]))
        context, weights, history = self.attend(first[0], state)
        second = self.drop(self.decoder_rnn(torch.cat([first[0], context], 1), state["second"]))
        output = torch.cat([second[0], context], 1)
        after = state | {"first": first, "second": second, "context": context, "history": history}
        return self.frame(output), self.gate(output).squeeze(1), weights, after

    def forward(self, frames: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher forcing: the frames before each [B, T, mels] -> frames, gates [B, T], weights [B, T, S]."""
        state = self.begin(values, lengths)
        found = []
        for frame in frames.unbind(1):
            *results, state = self.step(frame, state)
            found.append(results)
        frames, gates, weights = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return frames, gates, weights

    @torch.no_grad()
    def generate(self, values: Tensor, lengths: Tensor, longest: int, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """Frames until every gate has opened: [B, T <= longest, mels], and how many are each row's [B]."""
        state = self.begin(values, lengths)
        frame = values.new_zeros(len(values), self.mels)
        count = torch.full((len(values),), longest, device=values.device)
        frames = []
        for t in range(longest):
            frame, gate, _, state = self.step(frame, state)
            frames.append(frame)
            count = torch.where((gate.sigmoid() > threshold) & (count == longest), t + 1, count)
            if bool((count <= t + 1).all()):
                break
        return torch.stack(frames, 1), count


class TacotronDecoder(StockTacotronDecoder):
    """The same with this package's cells and attention: keys are projected once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        stock = self.attention
        query, key = stock.query_proj, stock.key_proj
        self.attention_rnn = fast.LSTMCell(self.attention_rnn.input_size, self.hidden)
        self.decoder_rnn = fast.LSTMCell(self.decoder_rnn.input_size, self.hidden)
        self.attention = fast.LocationSensitiveAttention(
            query.in_features, key.in_features, query.out_features, stock.conv.out_channels, stock.conv.kernel_size[0]
        )

    def begin(self, values: Tensor, lengths: Tensor) -> dict[str, Any]:
        keys = self.attention.prepare_keys(values)
        return super().begin(values, lengths) | {"keys": keys, "masks": {"lengths": lengths}}

    def attend(self, query: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        context, weights = self.attention(query, state["keys"], state["history"], state["values"], **state["masks"])
        return context, weights, self.attention.next_history(state["history"], weights)
