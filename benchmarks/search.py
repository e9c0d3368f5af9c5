"""Decoders that feed themselves: a beam search written in Python over a stock step, and Tacotron 2's frames."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.problems import Named, Problem, double
from examples.stock import AdditiveAttention, padding_mask, weigh
from examples.tacotron2 import StockTacotronDecoder, TacotronDecoder

END, ALPHA = 1, 0.6
TACOTRON_MEMORY = 512


class StockStep(nn.Module):
    """A GRU with additive attention and a layer to words, named as nn.AttentionDecoder names its parts."""

    def __init__(self, hidden: int, words: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(2 * hidden, hidden)])
        self.attention = AdditiveAttention(hidden, hidden, hidden)
        self.output_proj = nn.Linear(2 * hidden, words)

    def forward(self, x: Tensor, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """keys: the values through key_proj -> logits, h."""
        energies = torch.tanh(self.attention.query_proj(h).unsqueeze(1) + keys)
        context, _ = weigh(energies @ self.attention.v, mask, values)
        h = self.cells[0](torch.cat([x, context], 1), h)
        return self.output_proj(torch.cat([h, context], 1)), h


class StockSearch(nn.Module):
    """All hypotheses of all sentences are one batch for the step; what becomes of them is kept in lists."""

    def __init__(self, hidden: int, words: int, beam: int, longest: int) -> None:
        super().__init__()
        self.hidden, self.words, self.beam, self.longest = hidden, words, beam, longest
        self.embed = nn.Embedding(words, hidden)
        self.decoder: Any = StockStep(hidden, words)

    def forward(self, values: Tensor, h: Tensor, lengths: Tensor) -> Tensor:
        """values [B, S, H], h [B, H], lengths [B] -> the best hypothesis' score of each sentence [B]."""
        batch, beam = len(values), self.beam
        rows = torch.arange(batch).repeat_interleave(beam)
        keys = self.decoder.attention.key_proj(values)[rows]
        mask, values, h = padding_mask(lengths, values.shape[1])[rows], values[rows], h[rows]
        words = torch.zeros(batch * beam, dtype=torch.long)
        sequences = words.unsqueeze(1)
        scores = values.new_full((batch, beam), -1e9)
        scores[:, 0] = 0
        scores = scores.flatten()
        finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
        done = [False] * batch
        for length in range(1, self.longest + 1):
            logits, h = self.decoder(self.embed(words), h, keys, values, mask)
            log_probs = (logits.log_softmax(1) + scores.unsqueeze(1)).view(batch, -1)
            best, index = log_probs.topk(2 * beam, 1)
            kept: list[tuple[float, int, int]] = []
            for b in range(batch):
                if done[b]:
                    kept += [(0.0, 0, b * beam)] * beam
                    continue
                going = 0
                for score, place in zip(best[b].tolist(), index[b].tolist(), strict=True):
                    row, word = b * beam + place // self.words, place % self.words
                    if word == END:
                        finished[b].append((score / penalty(length), sequences[row].tolist()))
                    elif going < beam:
                        kept.append((score, word, row))
                        going += 1
                done[b] = len(finished[b]) >= beam
            if all(done):
                break
            scores = values.new_tensor([score for score, _, _ in kept])
            words = torch.tensor([word for _, word, _ in kept])
            order = torch.tensor([row for _, _, row in kept])
            sequences, h = torch.cat([sequences[order], words.unsqueeze(1)], 1), h[order]
        ends = scores.view(batch, beam) / penalty(self.longest)
        return values.new_tensor(
            [max(finished[b])[0] if finished[b] else ends[b].max().item() for b in range(batch)]
        )  # fmt: skip


class OurSearch(StockSearch):
    """The package's search over the package's steps."""

    def __init__(self, hidden: int, words: int, beam: int, longest: int) -> None:
        from seqattn_kernels.nn import AttentionDecoder

        super().__init__(hidden, words, beam, longest)
        self.decoder = AttentionDecoder(
            hidden, hidden, hidden, output_size=words, output_concat=("hidden", "context"), activation="none"
        )

    def forward(self, values: Tensor, h: Tensor, lengths: Tensor) -> Tensor:
        from seqattn_kernels.decoding import beam_search

        def step(words: Tensor, state: Any) -> tuple[Tensor, Any]:
            logits, state = self.decoder.step(self.embed(words), state)
            return logits.log_softmax(1), state

        state = self.decoder.begin(values, state=h, lengths=lengths)
        found = beam_search(
            step, state, start=0, end=END, max_length=self.longest, beam=self.beam, alpha=ALPHA, length_penalty="wu"
        )
        return values.new_tensor([best.score for best, *_ in found])


def penalty(length: int) -> float:
    return ((5 + length) / 6) ** ALPHA


class FreeProblem(Problem):
    """Without gradients: outputs are the next inputs."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        shape = case.shape
        width = shape["H"] if case.operator == "beam_decoder" else TACOTRON_MEMORY
        self.values = self.draw(shape["B"], shape["S"], width)
        self.h = self.draw(shape["B"], shape["H"])
        self.lengths = torch.linspace(shape["S"] / 2, shape["S"], shape["B"]).round().long().flip(0)

    def _make(self, search: type[nn.Module], tacotron: type[nn.Module]) -> nn.Module:
        shape = self.case.shape
        if self.case.operator == "beam_decoder":
            return search(shape["H"], shape["V"], shape["K"], shape["T"])
        # Dropout, which the prenet has in inference too, would draw other numbers for each contestant; gates stay shut.
        module = tacotron(hidden=shape["H"], prenet_dropout=0.0)
        nn.init.constant_(module.gate.bias, -20.0)  # type: ignore[union-attr, arg-type]
        return module

    def _stock(self) -> nn.Module:
        return self._make(StockSearch, StockTacotronDecoder)

    def ours(self) -> nn.Module:
        ours = self._make(OurSearch, TacotronDecoder)
        ours.load_state_dict(self.stock_module.state_dict())
        return ours.train(self.stock_module.training)

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        if self.case.operator == "beam_decoder":
            return lambda: module(self.values, self.h, self.lengths)
        return lambda: module.generate(self.values, self.lengths, self.case.shape["T"])[0]  # type: ignore[operator]

    def outputs(self, result: Any) -> Named:
        return [("scores" if self.case.operator == "beam_decoder" else "frames", result)]

    @property
    def leaves(self) -> Named:
        return []

    def in_float64(self) -> Problem:
        twin = super().in_float64()
        assert isinstance(twin, FreeProblem)
        twin = copy.copy(twin)
        twin.values, twin.h = double(self.values), double(self.h)
        return twin
