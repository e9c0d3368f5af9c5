"""Greedy and beam search over any step function, batched, on the device the step runs on.

A step function maps the tokens of N hypotheses and a state to what comes next:

    step(tokens, state) -> (log_probs, state)            tokens [N] int64, log_probs [N, V]
    step(tokens, state) -> (log_probs, state, weights)   weights [N, S]: attention, traced back into alignments

The state is a tensor or a nested tuple, list or dict of tensors, None, plain values that need no reordering, or
anything with a method `select(index)`. Its tensors have the hypotheses in dimension `batch_dim`: one number for all of
them, or a structure of numbers like the state's own, with None for a tensor that is the same for all hypotheses. An
LSTM's `(h, c)` beside an encoder's output is `batch_dim=((1, 1), 0)`.

What stays the same through all steps of a sentence, such as an encoder's output, is better given as `memory`: then the
step is called as `step(tokens, state, memory)`, and memory is only touched where sentences leave the batch. It has the
form of a state, with the sentences in dimension 0 of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Step = Callable[..., tuple[Any, ...]]
LengthPenalty = Literal["wu", "average", "none"]

# Room for rounding in a log_softmax of low precision; a logit passed for a log-probability is far above it.
LARGEST_LOG_PROB = 1e-2


@dataclass(frozen=True)
class Hypothesis:
    """One decoded sequence.

    tokens: without the start token and without the end token.
    log_prob: the sum of the log-probabilities of the tokens, end token included.
    score: `log_prob` after length normalisation; what hypotheses are ranked by.
    finished: whether it came to the end token; False where `max_length` cut it off.
    alignment: the attention weights of each token, [len(tokens), S], or None if the step returns none.
    """

    tokens: list[int]
    log_prob: float
    score: float
    finished: bool
    alignment: Tensor | None = None


def select_state(state: Any, index: Tensor, batch_dim: Any = 0) -> Any:
    """The state of the hypotheses `index` [M] int64, in that order; `batch_dim` as in the module's description."""
    if batch_dim is None or state is None:
        return state
    if isinstance(state, Tensor):
        if not isinstance(batch_dim, int):
            raise TypeError(f"batch_dim: expected an int or None for a tensor of the state, got {batch_dim!r}")
        if state.dim() == 0:
            return state
        return state.index_select(batch_dim, index)
    if hasattr(state, "select"):
        return state.select(index)
    if isinstance(state, dict):
        by_key = batch_dim if isinstance(batch_dim, dict) else dict.fromkeys(state, batch_dim)
        if by_key.keys() != state.keys():
            raise ValueError(f"batch_dim: expected the state's keys {sorted(state)}, got {sorted(by_key)}")
        return {key: select_state(value, index, by_key[key]) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        dims = batch_dim if isinstance(batch_dim, (tuple, list)) else [batch_dim] * len(state)
        if len(dims) != len(state):
            raise ValueError(f"batch_dim: expected {len(state)} entries (from the state), got {len(dims)}")
        parts = [select_state(value, index, dim) for value, dim in zip(state, dims, strict=True)]
        if hasattr(state, "_fields"):
            return type(state)(*parts)
        return type(state)(parts)
    return state


@torch.no_grad()
def greedy_search(
    step: Step,
    state: Any,
    *,
    start: int | Tensor,
    end: int | None,
    max_length: int,
    memory: Any = None,
    batch_size: int | None = None,
    batch_dim: Any = 0,
) -> list[Hypothesis]:
    """Takes the most probable token at each step, until the end token or `max_length` tokens.

    step, state, memory, batch_dim: see the module's description; state and memory have B rows, one a sentence.
    start: the first token given to the step, one for all sentences or [B].
    end: the end token; None lets every hypothesis run to `max_length`.
    max_length: the largest number of tokens, end token included; 0 gives empty hypotheses.
    batch_size: B, needed only where neither `start` nor the state says it.
    Returns a hypothesis for each sentence. A sentence for which every token has probability 0 ends there, unfinished.
    Raises ValueError where the step returns NaN, values above 0 (logits), or wrong shapes.
    """
    tokens, batch = _begin(state, start, end, max_length, batch_size, batch_dim)
    active = torch.arange(batch, device=tokens.device)
    total = torch.zeros(batch, device=tokens.device)
    lengths = torch.zeros_like(active)
    finished = torch.zeros_like(active, dtype=torch.bool)
    chosen: list[Tensor] = []
    weights: list[Tensor] = []
    for _ in range(max_length if batch else 0):
        log_probs, state, attention = _call(step, tokens, state, memory, end)
        best, tokens = log_probs.max(dim=1)
        possible = best > -math.inf
        ended = possible & (tokens == end) if end is not None else torch.zeros_like(possible)
        total = total.to(torch.promote_types(best.dtype, torch.float32))
        total[active] += best.masked_fill(~possible, 0)
        going = possible & ~ended
        lengths[active] += going
        finished[active] = ended
        chosen.append(_scatter(tokens, active, batch))
        if attention is not None:
            weights.append(_scatter(attention, active, batch))
        left = going.nonzero()[:, 0]
        if len(left) == 0:
            break
        if len(left) < len(active):
            active, tokens = active[left], tokens[left]
            state, memory = select_state(state, left, batch_dim), select_state(memory, left)
    table = torch.stack(chosen, dim=1).tolist() if chosen else [[]] * batch
    maps = _stack(weights)
    rows = zip(table, lengths.tolist(), total.tolist(), finished.tolist(), strict=True)
    return [
        Hypothesis(row[:n], log_prob, log_prob, is_finished, None if maps is None else maps[b, :n])
        for b, (row, n, log_prob, is_finished) in enumerate(rows)
    ]


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
    n_best: int = 1,
    memory: Any = None,
    batch_size: int | None = None,
    batch_dim: Any = 0,
) -> list[list[Hypothesis]]:
    """Keeps the `beam` most probable prefixes of each sentence at each step.

    step, state, start, end, max_length, memory, batch_size, batch_dim: as in `greedy_search`. State and memory are
    given with B rows; the step is called with up to B * beam, and with fewer as sentences are done.
    beam: K; it may be wider than the vocabulary.
    length_penalty: how scores of sequences of different lengths are compared. With n tokens, end token included, "wu"
    divides the log-probability by ((5 + n) / 6) ** alpha (Wu et al. 2016, https://arxiv.org/abs/1609.08144), "average"
    divides it by n, "none" leaves it.
    n_best: how many hypotheses to return for each sentence, at most K.

    A sentence is done with K finished hypotheses, or earlier when no prefix left can still come among the `n_best`
    (log-probabilities only fall, so that bound is exact). With `beam=1` this is greedy search; with K = V ** max_length
    it finds the optimum. Prefixes cut off at `max_length` come after the finished hypotheses, whatever their score.
    Returns for each sentence 1 to `n_best` hypotheses, best first. Raises ValueError as `greedy_search` does.
    """
    tokens, batch = _begin(state, start, end, max_length, batch_size, batch_dim)
    if beam < 1:
        raise ValueError(f"beam: expected at least 1, got {beam}")
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best: expected 1 to {beam} (from beam), got {n_best}")
    if length_penalty not in ("wu", "average", "none"):
        raise ValueError(f"length_penalty: expected 'wu', 'average' or 'none', got {length_penalty!r}")
    if length_penalty == "wu" and not alpha >= 0:
        raise ValueError(f"alpha: expected at least 0, got {alpha}")
    if batch == 0 or max_length == 0:
        return [[Hypothesis([], 0.0, 0.0, False)] for _ in range(batch)]

    def penalty(length: int) -> float:
        return {"wu": ((5 + length) / 6) ** alpha, "average": float(length), "none": 1.0}[length_penalty]

    device = tokens.device
    history = _History(batch, beam)
    finished, unfinished = _Pool(batch, beam, device), _Pool(batch, beam, device)
    active = torch.arange(batch, device=device)  # [A]: the sentences that go on
    rows = active.repeat_interleave(beam)
    state, memory, tokens = select_state(state, rows, batch_dim), select_state(memory, rows), tokens[rows]
    # A prefix of -inf is an empty place: the K places of a sentence start as one prefix.
    scores = torch.full((batch, beam), -math.inf, device=device)
    scores[:, 0] = 0
    largest_penalty = penalty(max_length)
    for length in range(1, max_length + 1):
        log_probs, state, weights = _call(step, tokens, state, memory, end)
        vocabulary = log_probs.size(1)
        before = scores.to(torch.promote_types(log_probs.dtype, torch.float32))
        candidates = (before.view(-1, 1) + log_probs).view(len(active), beam * vocabulary)
        # Of 2K candidates at most K end, one for each prefix; so the K best that go on are among them.
        scores, flat = candidates.topk(min(2 * beam, beam * vocabulary), dim=1)
        parents, words = flat // vocabulary, flat % vocabulary
        ends = words == end if end is not None else torch.zeros_like(words, dtype=torch.bool)
        new = scores.masked_fill(~ends, -math.inf)[:, :beam]
        finished.add(active, new / penalty(length), new, parents[:, :beam], length - 1)

        scores, order = scores.masked_fill(ends, -math.inf).topk(min(beam, scores.size(1)), dim=1)
        gap = (0, beam - order.size(1))
        scores, order = pad(scores, gap, value=-math.inf), pad(order, gap)
        parents, words = parents.gather(1, order), words.gather(1, order)
        history.add(active, parents, words, weights)
        if length == max_length:
            slots = torch.arange(beam, device=device).expand_as(scores)
            unfinished.add(active, scores / penalty(length), scores, slots, length)
            break
        stuck = scores[:, 0] == -math.inf
        # A sentence without any token of probability above 0: its best prefix, in place 0, is all there is.
        given_up = before[:, :1].masked_fill(~stuck.unsqueeze(1), -math.inf)
        first = torch.zeros_like(order[:, :1])
        unfinished.add(active, given_up / penalty(max(length - 1, 1)), given_up, first, length - 1)
        # The most a prefix can still reach: its log-probability over the largest penalty.
        reachable = scores[:, 0] / largest_penalty
        done = stuck | (finished.count[active] >= beam) | (finished.score[active, n_best - 1] >= reachable)
        left = (~done).nonzero()[:, 0]
        if len(left) == 0:
            break
        rows = left.unsqueeze(1) * beam + parents[left]
        state = select_state(state, rows.flatten(), batch_dim)
        if len(left) < len(active):
            rows = left.unsqueeze(1) * beam + torch.arange(beam, device=device)
            memory = select_state(memory, rows.flatten())
        tokens, scores, active = words[left].flatten(), scores[left], active[left]

    results: list[list[Hypothesis]] = [[] for _ in range(batch)]
    for pool in (finished, unfinished):
        for b, hypothesis in history.trace(pool, n_best, pool is finished):
            if len(results[b]) < n_best:
                results[b].append(hypothesis)
    return results


class _Pool:
    """Each sentence's K best hypotheses so far: their scores, and where in the history their last tokens are."""

    def __init__(self, batch: int, beam: int, device: torch.device) -> None:
        self.score = torch.full((batch, beam), -math.inf, device=device)
        self.log_prob = torch.full((batch, beam), -math.inf, device=device)
        self.slot = torch.zeros(batch, beam, dtype=torch.long, device=device)
        self.length = torch.zeros(batch, beam, dtype=torch.long, device=device)
        self.count = torch.zeros(batch, dtype=torch.long, device=device)

    def add(self, active: Tensor, score: Tensor, log_prob: Tensor, slot: Tensor, length: int) -> None:
        """score, log_prob, slot: [A, M] for the sentences `active` [A], each of `length` tokens; -inf is none."""
        beam = self.score.size(1)
        self.count[active] += (score > -math.inf).sum(1)
        self.score, self.log_prob = self.score.to(score.dtype), self.log_prob.to(score.dtype)
        best, order = torch.cat([self.score[active], score], 1).topk(beam, dim=1)
        self.score[active] = best
        self.log_prob[active] = torch.cat([self.log_prob[active], log_prob], 1).gather(1, order)
        self.slot[active] = torch.cat([self.slot[active], slot], 1).gather(1, order)
        lengths = torch.cat([self.length[active], torch.full_like(slot, length)], 1)
        self.length[active] = lengths.gather(1, order)


class _History:
    """Each step's K prefixes of each sentence: their last tokens, the places they come from, the attention."""

    def __init__(self, batch: int, beam: int) -> None:
        self.batch, self.beam = batch, beam
        self.words: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.weights: list[Tensor] = []

    def add(self, active: Tensor, parents: Tensor, words: Tensor, weights: Tensor | None) -> None:
        """parents, words: [A, K]; weights: [A * K, S], by the places the prefixes had before this step."""
        self.parents.append(_scatter(parents, active, self.batch))
        self.words.append(_scatter(words, active, self.batch))
        if weights is not None:
            self.weights.append(_scatter(weights.view(len(active), self.beam, -1), active, self.batch))

    def trace(self, pool: _Pool, n_best: int, finished: bool) -> list[tuple[int, Hypothesis]]:
        """The `n_best` hypotheses of each sentence in the pool, by sentence and score."""
        sentence, place = (pool.score[:, :n_best] > -math.inf).nonzero(as_tuple=True)
        slot, length = pool.slot[sentence, place], pool.length[sentence, place]
        longest = int(length.max()) if len(length) else 0
        words = torch.zeros(len(sentence), longest, dtype=torch.long, device=slot.device)
        # At least one step's, so that an empty hypothesis has an alignment of no rows.
        maps = _stack([m.new_zeros(len(sentence), m.size(2)) for m in self.weights[: max(longest, 1)]])
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


def _scatter(rows: Tensor, active: Tensor, batch: int) -> Tensor:
    """[A, ...] -> [B, ...] with zeros for the sentences that are done."""
    if len(active) == batch:
        return rows
    return rows.new_zeros(batch, *rows.shape[1:]).index_copy(0, active, rows)


def _stack(maps: list[Tensor]) -> Tensor | None:
    """Attention of each step [M, S] -> [M, T, S], zeros where the memory grew with the steps; None without any."""
    if not maps:
        return None
    width = max(m.size(1) for m in maps)
    return torch.stack([pad(m, (0, width - m.size(1))) for m in maps], dim=1)


def _begin(
    state: Any, start: int | Tensor, end: int | None, max_length: int, batch_size: int | None, batch_dim: Any
) -> tuple[Tensor, int]:
    """The first tokens [B] and B, from whichever of `start`, `batch_size` and the state says it."""
    if max_length < 0:
        raise ValueError(f"max_length: expected at least 0, got {max_length}")
    if end is not None and end < 0:
        raise ValueError(f"end: expected a token's number or None, got {end}")
    like, rows = _first_tensor(state, batch_dim)
    if isinstance(start, Tensor):
        if start.dim() != 1 or start.is_floating_point():
            raise ValueError(f"start: expected [B] of integers, got {list(start.shape)} of {start.dtype}")
        tokens, source = start.long(), "start"
        batch = len(tokens)
    else:
        if batch_size is None and rows is None:
            raise ValueError("batch_size: expected a number, since neither start nor the state says it, got None")
        source = "the state" if batch_size is None else "batch_size"
        batch = batch_size if batch_size is not None else rows or 0
        tokens = torch.full((batch,), start, device=None if like is None else like.device)
    for name, other in (("batch_size", batch_size), ("the state", rows)):
        if other is not None and other != batch:
            raise ValueError(f"{name}: expected B={batch} (from {source}), got {other}")
    return tokens, batch


def _first_tensor(state: Any, batch_dim: Any) -> tuple[Tensor | None, int | None]:
    """Some tensor of the state and its size in the batch dimension."""
    if isinstance(state, Tensor):
        return state, state.size(batch_dim) if isinstance(batch_dim, int) and state.dim() else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(state, dict):
        pairs = [(v, batch_dim[k] if isinstance(batch_dim, dict) else batch_dim) for k, v in state.items()]
    elif isinstance(state, (tuple, list)):
        dims = batch_dim if isinstance(batch_dim, (tuple, list)) else [batch_dim] * len(state)
        pairs = list(zip(state, dims, strict=True))
    found = [_first_tensor(value, dim) for value, dim in pairs]
    found = [(tensor, size) for tensor, size in found if tensor is not None]
    return next((f for f in found if f[1] is not None), found[0] if found else (None, None))


def _call(step: Step, tokens: Tensor, state: Any, memory: Any, end: int | None) -> tuple[Tensor, Any, Tensor | None]:
    """One step, its answer checked."""
    answer = step(tokens, state) if memory is None else step(tokens, state, memory)
    if not isinstance(answer, tuple) or len(answer) not in (2, 3):
        raise TypeError(
            f"step: expected (log_probs, state) or (log_probs, state, weights), got {type(answer).__name__}"
        )
    log_probs, state, weights = answer if len(answer) == 3 else (*answer, None)
    n = len(tokens)
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        raise TypeError(f"step: expected log_probs to be a floating-point tensor, got {_describe(log_probs)}")
    if log_probs.dim() != 2 or log_probs.size(0) != n or log_probs.size(1) == 0:
        raise ValueError(f"step: expected log_probs [N, V] with N={n} (from tokens), got {list(log_probs.shape)}")
    if end is not None and end >= log_probs.size(1):
        raise ValueError(f"end: expected a token below V={log_probs.size(1)} (from log_probs), got {end}")
    if weights is not None and (not isinstance(weights, Tensor) or weights.dim() != 2 or weights.size(0) != n):
        raise ValueError(f"step: expected weights [N, S] with N={n} (from tokens), got {_describe(weights)}")
    # NaN fails the comparison too, so one look at the device serves both.
    if not bool((log_probs <= LARGEST_LOG_PROB).all()):
        if bool(log_probs.isnan().any()):
            raise ValueError("step: expected log-probabilities, got NaN")
        raise ValueError(
            f"step: expected log-probabilities, got {log_probs.max().item():.4g} > 0; apply log_softmax to logits"
        )
    return log_probs, state, weights


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {value.dtype}"
    return type(value).__name__
