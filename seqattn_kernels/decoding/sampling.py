"""Sampling, with temperature, top-k and nucleus."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqattn_kernels.decoding.common import Hypothesis, Rules, Step, begin, select_state
from seqattn_kernels.decoding.greedy import follow


@torch.no_grad()
def sample_search(
    step: Step,
    state: Any,
    *,
    start: int | Tensor,
    end: int | None,
    max_length: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
    generator: torch.Generator | None = None,
    memory: Any = None,
    batch_size: int | None = None,
    batch_dim: Any = 0,
) -> list[list[Hypothesis]]:
    """Draws tokens by their probabilities, until the end token or `max_length` tokens.

    step, state, start, end, max_length, min_length, no_repeat_ngram, memory, batch_size, batch_dim: as in
    `greedy_search`; the step is called with up to B * samples rows.
    samples: hypotheses drawn for each sentence, independent of each other.
    temperature: log-probabilities are divided by it; 0 takes the most probable token.
    top_k: only the k most probable tokens are drawn from (Fan, Lewis, Dauphin, 2018).
    top_p: only the fewest most probable tokens whose probabilities add up to p (the nucleus of Holtzman et al., 2020,
    https://arxiv.org/abs/1904.09751); after temperature and top_k. 1 leaves all.
    generator: of random numbers, on the step's device; torch's own by default.

    Returns `samples` hypotheses for each sentence, in the order drawn; `log_prob` and `score` are the step's own
    log-probabilities, before temperature and cuts. Raises ValueError as `greedy_search` does.
    """
    tokens, batch = begin(state, start, end, max_length, batch_size, batch_dim)
    rules = Rules(end, max_length, min_length, no_repeat_ngram)
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and at most 1 or None, got {top_p}")

    def choose(log_probs: Tensor) -> tuple[Tensor, Tensor]:
        # A row of -inf alone has nothing to draw: the first token stands in, whose log-probability says so.
        nothing = (log_probs == -math.inf).all(1, keepdim=True)
        wide = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)).masked_fill(nothing, 0)
        if temperature == 0:
            chosen = wide.argmax(1, keepdim=True)
        else:
            cut = keep_likely(wide / temperature, top_k, top_p)
            chosen = torch.multinomial(cut.softmax(1), 1, generator=generator)
        return chosen[:, 0], log_probs.gather(1, chosen)[:, 0]

    if samples > 1:
        rows = torch.arange(batch, device=tokens.device).repeat_interleave(samples)
        state, memory, tokens = select_state(state, rows, batch_dim), select_state(memory, rows), tokens[rows]
    found = follow(step, state, tokens, batch * samples, choose, rules, end, max_length, memory, batch_dim)
    return [found[b * samples : (b + 1) * samples] for b in range(batch)]


def keep_likely(log_probs: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """log_probs [N, V] with -inf for tokens outside the k most probable, then outside the nucleus of mass p."""
    if top_k is not None and top_k < log_probs.size(1):
        values, tokens = log_probs.topk(top_k, dim=1)
        log_probs = torch.full_like(log_probs, -math.inf).scatter(1, tokens, values)
    if top_p is not None and top_p < 1:
        values, tokens = log_probs.sort(dim=1, descending=True)
        probs = values.softmax(1)
        # The token that passes p belongs to the nucleus: what came before it is below p.
        outside = probs.cumsum(1) - probs >= top_p
        outside[:, 0] = False
        log_probs = log_probs.scatter(1, tokens, values.masked_fill(outside, -math.inf))
    return log_probs
