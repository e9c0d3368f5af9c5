"""Beam search."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqattn_kernels.decoding.common import Hypothesis, LengthPenalty, Rules, Step, begin, call, select_state
from seqattn_kernels.decoding.history import History, Pool
from seqattn_kernels.ops import search


@torch.no_grad()
def beam_search(
    step: Step,
    state: Any,
    *,
    start: int | Tensor,
    end: int | None,
    max_length: int,
    beam: int = 5,
    length_penalty: LengthPenalty = "wu",
    alpha: float = 0.6,
    coverage_penalty: float = 0.0,
    source_lengths: Tensor | None = None,
    n_best: int = 1,
    groups: int = 1,
    diversity: float = 0.5,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
    stop: Literal["beam", "bound"] = "beam",
    memory: Any = None,
    batch_size: int | None = None,
    batch_dim: Any = 0,
) -> list[list[Hypothesis]]:
    """Keeps the `beam` most probable prefixes of each sentence at each step.

    step, state, start, end, max_length, min_length, no_repeat_ngram, memory, batch_size, batch_dim: as in
    `greedy_search`. State and memory are given with B rows; the step is called with up to B * beam, and with fewer as
    sentences are done.
    beam: K; it may be wider than the vocabulary.
    length_penalty: how scores of sequences of different lengths are compared. With n tokens, end token included, "wu"
    divides the log-probability by ((5 + n) / 6) ** alpha (Wu et al. 2016, https://arxiv.org/abs/1609.08144), "average"
    divides it by n, "none" leaves it.
    coverage_penalty: beta of Wu et al.: beta * sum over source positions of log(min(attention it got in all, 1)) is
    added to a finished hypothesis' score. The step must return weights. source_lengths [B]: positions past them don't
    count.
    n_best: how many hypotheses to return for each sentence, at most K.
    groups: the beam is cut into as many groups of equal size, each of which avoids the tokens that groups before it
    took at the same step, by `diversity` each (Vijayakumar et al., 2018, https://arxiv.org/abs/1610.02424). Scores of
    hypotheses are without it.
    stop: when a sentence is done. "bound": when no prefix left can still come among the `n_best`; log-probabilities
    only fall and penalties only take, so this is exact: the result is that of going on to `max_length`. "beam": then,
    or with K finished hypotheses.

    With `beam=1` this is greedy search; with K = V ** max_length it finds the optimum. Prefixes cut off at `max_length`
    come after the finished hypotheses, whatever their score. Returns for each sentence 1 to `n_best` hypotheses, best
    first. Raises ValueError as `greedy_search` does.
    """
    tokens, batch = begin(state, start, end, max_length, batch_size, batch_dim)
    rules = Rules(end, max_length, min_length, no_repeat_ngram)
    if beam < 1:
        raise ValueError(f"beam: expected at least 1, got {beam}")
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best: expected 1 to {beam} (from beam), got {n_best}")
    if length_penalty not in ("wu", "average", "none"):
        raise ValueError(f"length_penalty: expected 'wu', 'average' or 'none', got {length_penalty!r}")
    if length_penalty == "wu" and not alpha >= 0:
        raise ValueError(f"alpha: expected at least 0, got {alpha}")
    if groups < 1 or beam % groups:
        raise ValueError(f"groups: expected a divisor of {beam} (beam), got {groups}")
    if not diversity >= 0:
        raise ValueError(f"diversity: expected at least 0, got {diversity}")
    if stop not in ("beam", "bound"):
        raise ValueError(f"stop: expected 'beam' or 'bound', got {stop!r}")
    if batch == 0 or max_length == 0:
        return [[Hypothesis([], 0.0, 0.0, False)] for _ in range(batch)]

    def penalty(length: int) -> float:
        return {"wu": ((5 + length) / 6) ** alpha, "average": float(length), "none": 1.0}[length_penalty]

    device = tokens.device
    coverage = _Coverage(coverage_penalty, source_lengths, batch)
    history = History(batch, beam)
    finished, unfinished = Pool(batch, beam, device), Pool(batch, beam, device)
    active = torch.arange(batch, device=device)  # [A]: the sentences that go on
    rows = active.repeat_interleave(beam)
    state, memory, tokens = select_state(state, rows, batch_dim), select_state(memory, rows), tokens[rows]
    # A prefix of -inf is an empty place: the places of a sentence's group start as one prefix.
    size = beam // groups
    scores = torch.full((batch, beam), -math.inf, device=device)
    scores[:, ::size] = 0
    largest_penalty = penalty(max_length)
    for length in range(1, max_length + 1):
        log_probs, state, weights = call(step, tokens, state, memory, end)
        log_probs = rules.forbid(log_probs, length)
        before = scores.to(torch.promote_types(log_probs.dtype, torch.float32))
        coverage.add(active, weights, beam)

        def keep(pool: Pool, log_prob: Tensor, slots: Tensor, past: int, n: int) -> None:
            pool.add(active, log_prob / penalty(n) + coverage.of(slots), log_prob, slots, past)  # noqa: B023

        scores, parents, words, ended, ended_parents = _grow(log_probs, before, groups, diversity, end)
        keep(finished, ended, ended_parents, length - 1, length)
        history.add(active, parents, words, weights)
        if length == max_length:
            # What the new prefixes have covered is what their parents have.
            unfinished.add(
                active,
                scores / penalty(length) + coverage.of(parents),
                scores,
                torch.arange(beam, device=device).expand_as(scores),
                length,
            )
            break
        best = scores[:, 0] if groups == 1 else scores.max(1).values
        stuck = best == -math.inf
        places = torch.arange(len(active), device=device)
        if not finished.empty or bool(stuck.any()):
            # A sentence without any token of probability above 0: its best prefix is all there is.
            given_up, slot = before.max(1, keepdim=True)
            given_up = given_up.masked_fill(~stuck.unsqueeze(1), -math.inf)
            keep(unfinished, given_up, slot, length - 1, max(length - 1, 1))
            # The most a prefix can still reach: its log-probability over the largest penalty.
            done = stuck | (finished.score[active, n_best - 1] >= best / largest_penalty)
            if stop == "beam":
                done |= finished.count[active] >= beam
            places = (~done).nonzero()[:, 0]
            if len(places) == 0:
                break
        if len(places) < len(active):
            same = places.unsqueeze(1) * beam + torch.arange(beam, device=device)
            memory = select_state(memory, same.flatten())
            scores, parents, words, active = scores[places], parents[places], words[places], active[places]
        rows, tokens = (places.unsqueeze(1) * beam + parents).flatten(), words.flatten()
        state = select_state(state, rows, batch_dim)
        rules.extend(rows, tokens)
        coverage.select(rows, beam)

    results: list[list[Hypothesis]] = [[] for _ in range(batch)]
    for pool in (finished, unfinished):
        for b, hypothesis in history.trace(pool, n_best, pool is finished):
            if len(results[b]) < n_best:
                results[b].append(hypothesis)
    return results


def _grow(log_probs: Tensor, before: Tensor, groups: int, diversity: float, end: int | None) -> search.Grown:
    """The prefixes of the next step, log_probs [A * K, V] after those of log-probs before [A, K]: log-probs, parents
    and words [A, K], each group's best first; and of those that end, log-probs and parents [A, M], -inf where there is
    none."""
    if groups == 1 and search.serves(log_probs, before):
        return search.beam_grow(log_probs, before, end)
    batch, beam = before.shape
    candidates = (before.view(-1, 1) + log_probs).view(batch, beam, -1)
    size, vocabulary = beam // groups, candidates.shape[2]
    taken = None
    parts = []
    for g in range(groups):
        own = candidates[:, g * size : (g + 1) * size]
        flat = own.reshape(batch, size * vocabulary)
        # Of 2K candidates at most K end, one for each prefix; so the K best that go on are among them.
        count = min(2 * size, size * vocabulary)
        if taken is None:
            scores, chosen = flat.topk(count, dim=1)
        else:
            ranked, chosen = (own - diversity * taken.unsqueeze(1)).reshape(flat.shape).topk(count, dim=1)
            scores = flat.gather(1, chosen)
        parents, words = chosen // vocabulary + g * size, chosen % vocabulary
        ends = words == end if end is not None else torch.zeros_like(words, dtype=torch.bool)
        ended = scores.masked_fill(~ends, -math.inf)[:, :size]
        ended_parents = parents[:, :size]
        rank = scores if taken is None else ranked
        order = rank.masked_fill(ends, -math.inf).topk(min(size, count), dim=1).indices
        scores = scores.masked_fill(ends, -math.inf).gather(1, order)
        parents, words = parents.gather(1, order), words.gather(1, order)
        gap = (0, size - order.size(1))
        scores = pad(scores, gap, value=-math.inf)
        # An empty place comes from a place of its own group, so that groups stay apart.
        parents, words = pad(parents, gap, value=g * size), pad(words, gap)
        parts.append((scores, parents, words, ended, ended_parents))
        if g + 1 < groups:
            alive = (scores > -math.inf).to(candidates.dtype)
            taken = candidates.new_zeros(batch, vocabulary) if taken is None else taken
            taken = taken.scatter_add(1, words, alive)
    if groups == 1:
        return parts[0]
    scores, parents, words, ended, ended_parents = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return scores, parents, words, ended, ended_parents


class _Coverage:
    """How much attention each prefix has given each source position, and the penalty of it (Wu et al., 2016)."""

    def __init__(self, beta: float, lengths: Tensor | None, batch: int) -> None:
        if not beta >= 0:
            raise ValueError(f"coverage_penalty: expected at least 0, got {beta}")
        if lengths is not None and lengths.shape != (batch,):
            raise ValueError(f"source_lengths: expected [B] with B={batch}, got {list(lengths.shape)}")
        self.beta, self.lengths = beta, lengths
        self.total: Tensor | None = None  # [A, K, S]
        self.penalty: Tensor | None = None  # [A, K]

    def add(self, active: Tensor, weights: Tensor | None, beam: int) -> None:
        """The weights [A * K, S] of one step."""
        if not self.beta:
            return
        if weights is None:
            raise ValueError("coverage_penalty: expected a step that returns weights, got (log_probs, state)")
        now = weights.view(len(active), beam, -1)
        if self.total is not None:
            now = now + pad(self.total, (0, now.size(2) - self.total.size(2)))
        self.total = now
        logs = now.clamp(torch.finfo(now.dtype).tiny, 1).log()
        if self.lengths is not None:
            inside = torch.arange(now.size(2), device=now.device) < self.lengths.to(now.device)[active].unsqueeze(1)
            logs = logs.masked_fill(~inside.unsqueeze(1), 0)
        self.penalty = self.beta * logs.sum(2)

    def of(self, slots: Tensor) -> Tensor | float:
        """The penalty of the prefixes in places `slots` [A, M]."""
        return 0.0 if self.penalty is None else self.penalty.gather(1, slots)

    def select(self, rows: Tensor, beam: int) -> None:
        """Prefixes `rows` [A' * K] of those before go on."""
        if self.total is not None:
            self.total = self.total.flatten(0, 1).index_select(0, rows).view(-1, beam, self.total.size(2))
