"""The demo's model with its loop over phonemes as one operator, in training and in search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels.accelerate import register_replacement
from seqattn_kernels.demo.model import G2P
from seqattn_kernels.nn import AttentionDecoder


class FusedG2P(G2P):
    """Same parameters, same results. The decoder's parts are handed to an `AttentionDecoder`, which owns nothing."""

    def forward(self, letters: Tensor, lengths: Tensor, phonemes: Tensor) -> Tensor:
        values, last = self.encoder(letters, lengths)
        embedded = self.decoder.embedding(phonemes)
        embedded, scale = self._drop(embedded)
        out = self._loop()(embedded, values, state=torch.tanh(self.bridge(last)), lengths=lengths)
        outputs = torch.cat([out.output, out.contexts], dim=2)
        return self.decoder.output(outputs if scale is None else outputs * scale)

    def searcher(self, letters: Tensor, lengths: Tensor) -> tuple:
        values, last = self.encoder(letters, lengths)
        loop, decoder = self._loop(), self.decoder

        def step(phoneme: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
            hidden, state = loop.step(decoder.embedding(phoneme), state)
            logits = decoder.output(torch.cat([hidden, state.context], dim=1))
            return logits.log_softmax(dim=1), state, state.weights

        return step, loop.begin(values, state=torch.tanh(self.bridge(last)), lengths=lengths), None

    def _loop(self) -> AttentionDecoder:
        decoder = self.decoder
        embedding, hidden, memory = decoder.embedding.embedding_dim, decoder.cell.hidden_size, self.bridge.in_features
        with torch.device("meta"):
            loop = AttentionDecoder(embedding, hidden, memory)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(loop.cells[0], name, getattr(decoder.cell, name))
        loop.attention.query_proj, loop.attention.key_proj = decoder.attention.W, decoder.attention.U
        del loop.attention.v
        loop.attention.v = decoder.attention.v.weight[0]  # a row of the parameter; gradients reach it
        # Parts are read once: in training for this pass, in search for this batch.
        return loop.train(self.training)

    def _drop(self, embedded: Tensor) -> tuple[Tensor, Tensor | None]:
        """The embeddings after dropout, and what dropout multiplies the outputs by: drawn in the order of the steps."""
        dropout = self.decoder.dropout
        if not (self.training and dropout.p):
            return embedded, None
        width = self.decoder.output.in_features
        batch, steps, _ = embedded.shape
        ones, more = embedded.new_ones(batch, embedded.shape[2]), embedded.new_ones(batch, width)
        drawn = [(F.dropout(ones, dropout.p), F.dropout(more, dropout.p)) for _ in range(steps)]
        inputs, outputs = (torch.stack(masks, dim=1) for masks in zip(*drawn, strict=True))
        return embedded * inputs, outputs


def register() -> None:
    register_replacement(G2P, FusedG2P)
