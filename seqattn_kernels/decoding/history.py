"""What a beam search remembers: the best hypotheses of each sentence, and each step's prefixes to trace them back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqattn_kernels.decoding.common import Hypothesis, scatter, stack


class Pool:
    """Each sentence's K best hypotheses so far: their scores, and where in the history their last tokens are."""

    def __init__(self, batch: int, beam: int, device: torch.device) -> None:
        self.score = torch.full((batch, beam), -math.inf, device=device)
        self.log_prob = torch.full((batch, beam), -math.inf, device=device)
        self.slot = torch.zeros(batch, beam, dtype=torch.long, device=device)
        self.length = torch.zeros(batch, beam, dtype=torch.long, device=device)
        self.count = torch.zeros(batch, dtype=torch.long, device=device)
        self.empty = True

    def add(self, active: Tensor, score: Tensor, log_prob: Tensor, slot: Tensor, length: int) -> None:
        """score, log_prob, slot: [A, M] for the sentences `active` [A], each of `length` tokens; -inf is none."""
        found = score > -math.inf
        if not bool(found.any()):
            return
        self.empty = False
        beam = self.score.size(1)
        self.count[active] += found.sum(1)
        self.score, self.log_prob = self.score.to(score.dtype), self.log_prob.to(score.dtype)
        best, order = torch.cat([self.score[active], score], 1).topk(beam, dim=1)
        self.score[active] = best
        self.log_prob[active] = torch.cat([self.log_prob[active], log_prob], 1).gather(1, order)
        self.slot[active] = torch.cat([self.slot[active], slot], 1).gather(1, order)
        lengths = torch.cat([self.length[active], torch.full_like(slot, length)], 1)
        self.length[active] = lengths.gather(1, order)


class History:
    """Each step's K prefixes of each sentence: their last tokens, the places they come from, the attention."""

    def __init__(self, batch: int, beam: int) -> None:
        self.batch, self.beam = batch, beam
        self.words: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.weights: list[Tensor] = []

    def add(self, active: Tensor, parents: Tensor, words: Tensor, weights: Tensor | None) -> None:
        """parents, words: [A, K]; weights: [A * K, S], by the places the prefixes had before this step."""
        self.parents.append(scatter(parents, active, self.batch))
        self.words.append(scatter(words, active, self.batch))
        if weights is not None:
            self.weights.append(scatter(weights.view(len(active), self.beam, -1), active, self.batch))

    def trace(self, pool: Pool, n_best: int, finished: bool) -> list[tuple[int, Hypothesis]]:
        """The `n_best` hypotheses of each sentence in the pool, by sentence and score."""
        sentence, place = (pool.score[:, :n_best] > -math.inf).nonzero(as_tuple=True)
        slot, length = pool.slot[sentence, place], pool.length[sentence, place]
        longest = int(length.max()) if len(length) else 0
        words = torch.zeros(len(sentence), longest, dtype=torch.long, device=slot.device)
        # At least one step's, so that an empty hypothesis has an alignment of no rows.
        maps = stack([m.new_zeros(len(sentence), m.size(2)) for m in self.weights[: max(longest, 1)]])
        for t in range(longest - 1, -1, -1):
            inside = length > t
            words[:, t] = self.words[t][sentence, slot]
            slot = torch.where(inside, self.parents[t][sentence, slot], slot)
            if maps is not None:
                maps[:, t, : self.weights[t].size(2)] = self.weights[t][sentence, slot]
        rows = zip(
            sentence.tolist(),
            words.tolist(),
            length.tolist(),
            pool.log_prob[sentence, place].tolist(),
            pool.score[sentence, place].tolist(),
            strict=True,
        )
        return [
            (b, Hypothesis(row[:n], log_prob, score, finished, None if maps is None else maps[i, :n]))
            for i, (b, row, n, log_prob, score) in enumerate(rows)
        ]
