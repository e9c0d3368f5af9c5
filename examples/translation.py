"""Translation: a bidirectional GRU reads, a decoder with attention writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from examples.stock import BahdanauDecoder, InputFeedingDecoder, padding_mask
from seqattn_kernels import nn as fast
from seqattn_kernels.decoding import Hypothesis, beam_search
from seqattn_kernels.functional import DecoderState


class StockTranslator(nn.Module):
    """Bahdanau, Cho, Bengio (2014): GRUs, additive attention with the state before."""

    def __init__(self, source: int, target: int, embedding: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(source, embedding), nn.Embedding(target, embedding)
        self.encoder = nn.GRU(embedding, hidden // 2, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(hidden, hidden)
        self.decoder: Any = BahdanauDecoder(embedding, hidden, hidden, hidden)
        self.predict = nn.Linear(2 * hidden, target)

    def encode(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """words [B, S], lengths [B] -> states [B, S, H], the decoder's first state [B, H]."""
        packed = pack_padded_sequence(self.source(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, last = self.encoder(packed)
        states, _ = pad_packed_sequence(output, batch_first=True, total_length=words.shape[1])
        return states, torch.tanh(self.bridge(torch.cat([last[0], last[1]], 1)))

    def forward(self, words: Tensor, lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """target [B, T], the words before each -> logits [B, T, V], weights [B, T, S]."""
        states, h = self.encode(words, lengths)
        mask = padding_mask(lengths, words.shape[1])
        outputs, contexts, weights = self.decoder(self.target(target), h, states, mask)
        return self.predict(torch.cat([outputs, contexts], 2)), weights


class Translator(StockTranslator):
    """The same with this package's encoder and decoder."""

    def __init__(self, source: int, target: int, embedding: int = 32, hidden: int = 48) -> None:
        super().__init__(source, target, embedding, hidden)
        self.encoder = fast.GRU(embedding, hidden // 2, batch_first=True, bidirectional=True)
        self.decoder = fast.AttentionDecoder(embedding, hidden, hidden, attention_size=hidden)

    def encode(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states, last = self.encoder(self.source(words), lengths=lengths)
        return states, torch.tanh(self.bridge(torch.cat([last[0], last[1]], 1)))

    def forward(self, words: Tensor, lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        states, h = self.encode(words, lengths)
        out = self.decoder(self.target(target), states, state=h, lengths=lengths)
        return self.predict(torch.cat([out.output, out.contexts], 2)), out.weights

    @torch.no_grad()
    def translate(self, words: Tensor, lengths: Tensor, start: int, end: int, beam: int = 5) -> list[Hypothesis]:
        """The best translation of each sentence, with its alignment."""
        states, h = self.encode(words, lengths)

        def step(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Tensor]:
            output, state = self.decoder.step(self.target(tokens), state)
            logits = self.predict(torch.cat([output, state.context], 1))
            assert state.weights is not None
            return logits.log_softmax(1), state, state.weights

        state = self.decoder.begin(states, state=h, lengths=lengths)
        longest = 2 * words.shape[1] + 5
        found = beam_search(step, state, start=start, end=end, max_length=longest, beam=beam, coverage_penalty=0.2,
                            source_lengths=lengths, stop="bound")  # fmt: skip
        return [best for best, *_ in found]


class StockInputFeeding(nn.Module):
    """Luong, Pham, Manning (2015): two LSTM layers, general attention, input feeding."""

    def __init__(self, source: int, target: int, embedding: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(source, embedding), nn.Embedding(target, embedding)
        self.encoder = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.decoder: Any = InputFeedingDecoder(embedding, hidden, hidden, hidden)
        self.predict = nn.Linear(hidden, target, bias=False)

    def forward(self, words: Tensor, lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """target [B, T], the words before each -> logits [B, T, V], weights [B, T, S]."""
        states, _ = self.encoder(self.source(words))
        outputs, weights = self.decoder(self.target(target), states, padding_mask(lengths, words.shape[1]))
        return self.predict(outputs), weights


class InputFeeding(StockInputFeeding):
    """The same with this package's encoder and decoder."""

    def __init__(self, source: int, target: int, embedding: int = 32, hidden: int = 48) -> None:
        super().__init__(source, target, embedding, hidden)
        self.encoder = fast.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.decoder = fast.AttentionDecoder(
            embedding, hidden, hidden, cell="lstm", num_layers=2, score="general", order="luong",
            feedback="attentional", output_size=hidden,
        )  # fmt: skip

    def forward(self, words: Tensor, lengths: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.encoder(self.source(words))
        out = self.decoder(self.target(target), states, lengths=lengths)
        return self.predict(out.output), out.weights

    @torch.no_grad()
    def translate(self, words: Tensor, lengths: Tensor, start: int, end: int) -> list[list[int]]:
        """Greedy translations, all steps in one operator."""
        states, _ = self.encoder(self.source(words))
        state = self.decoder.begin(states, lengths=lengths)
        longest = 2 * words.shape[1] + 5
        found = self.decoder.generate(state, self.target, self.predict, start=start, end=end, max_length=longest)
        counts = (found.lengths - found.finished.long()).tolist()
        return [row[:n] for row, n in zip(found.words.tolist(), counts, strict=True)]
