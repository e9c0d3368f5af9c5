"""Greedy search."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqattn_kernels.decoding.common import Hypothesis, Rules, Step, begin, call, scatter, select_state, stack


@torch.no_grad()
def greedy_search(
    step: Step,
    state: Any,
    *,
    start: int | Tensor,
    end: int | None,
    max_length: int,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
    memory: Any = None,
    batch_size: int | None = None,
    batch_dim: Any = 0,
) -> list[Hypothesis]:
    """Takes the most probable token at each step, until the end token or `max_length` tokens.

    step, state, memory, batch_dim: see the module's description; state and memory have B rows, one a sentence.
    start: the first token given to the step, one for all sentences or [B].
    end: the end token; None lets every hypothesis run to `max_length`.
    max_length: the largest number of tokens, end token included; 0 gives empty hypotheses.
    min_length: the smallest number of tokens, end token included.
    no_repeat_ngram: no n tokens in a row appear twice in a hypothesis; 0 lets them.
    batch_size: B, needed only where neither `start` nor the state says it.
    Returns a hypothesis for each sentence. A sentence for which every token has probability 0 ends there, unfinished.
    Raises ValueError where the step returns NaN, values above 0 (logits), or wrong shapes.
    """
    tokens, batch = begin(state, start, end, max_length, batch_size, batch_dim)
    rules = Rules(end, max_length, min_length, no_repeat_ngram)

    def choose(log_probs: Tensor) -> tuple[Tensor, Tensor]:
        best, tokens = log_probs.max(dim=1)
        return tokens, best

    return follow(step, state, tokens, batch, choose, rules, end, max_length, memory, batch_dim)


def follow(
    step: Step,
    state: Any,
    tokens: Tensor,
    batch: int,
    choose: Any,
    rules: Rules,
    end: int | None,
    max_length: int,
    memory: Any,
    batch_dim: Any,
) -> list[Hypothesis]:
    """One hypothesis a row: at each step the tokens that `choose(log_probs [N, V])` takes, with their log-probs [N]."""
    active = torch.arange(batch, device=tokens.device)
    total = torch.zeros(batch, device=tokens.device)
    lengths = torch.zeros_like(active)
    finished = torch.zeros_like(active, dtype=torch.bool)
    chosen: list[Tensor] = []
    weights: list[Tensor] = []
    for length in range(1, (max_length if batch else 0) + 1):
        log_probs, state, attention = call(step, tokens, state, memory, end)
        tokens, best = choose(rules.forbid(log_probs, length))
        possible = best > -math.inf
        ended = possible & (tokens == end) if end is not None else torch.zeros_like(possible)
        total = total.to(torch.promote_types(best.dtype, torch.float32))
        total[active] += best.masked_fill(~possible, 0)
        going = possible & ~ended
        lengths[active] += going
        finished[active] = ended
        chosen.append(scatter(tokens, active, batch))
        if attention is not None:
            weights.append(scatter(attention, active, batch))
        rules.extend(None, tokens)
        left = going.nonzero()[:, 0]
        if len(left) == 0:
            break
        if len(left) < len(active):
            active, tokens = active[left], tokens[left]
            state, memory = select_state(state, left, batch_dim), select_state(memory, left)
            rules.select(left)
    table = torch.stack(chosen, dim=1).tolist() if chosen else [[]] * batch
    maps = stack(weights)
    rows = zip(table, lengths.tolist(), total.tolist(), finished.tolist(), strict=True)
    return [
        Hypothesis(row[:n], log_prob, log_prob, is_finished, None if maps is None else maps[b, :n])
        for b, (row, n, log_prob, is_finished) in enumerate(rows)
    ]
