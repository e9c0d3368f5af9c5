"""What every search shares: the result, the state's rows, the step's answer, the rules for tokens."""

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


class Rules:
    """Which tokens a hypothesis may not take next: the end token before `min_length` tokens, and those that would
    repeat `no_repeat_ngram` tokens in a row (0: any may)."""

    def __init__(self, end: int | None, max_length: int, min_length: int, no_repeat_ngram: int) -> None:
        if not 0 <= min_length <= max(max_length, 0):
            raise ValueError(f"min_length: expected 0 to {max_length} (from max_length), got {min_length}")
        if no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram: expected at least 0, got {no_repeat_ngram}")
        self.end, self.min_length, self.ngram = end, min_length, no_repeat_ngram
        self.tokens: Tensor | None = None  # [N, t], where n-grams are looked at

    def forbid(self, log_probs: Tensor, length: int) -> Tensor:
        """log_probs [N, V] of the tokens that make hypotheses `length` long, -inf for those not allowed."""
        if self.end is not None and length < self.min_length:
            log_probs = log_probs.index_fill(1, torch.tensor([self.end], device=log_probs.device), -math.inf)
        if self.ngram and self.tokens is not None and self.tokens.size(1) >= self.ngram:
            # Places that come after tokens like the newest ones: the token there would make a second such n-gram.
            windows = self.tokens.unfold(1, self.ngram, 1)
            newest = self.tokens[:, self.tokens.size(1) - self.ngram + 1 :].unsqueeze(1)
            repeats = (windows[..., :-1] == newest).all(-1)
            banned = torch.zeros_like(log_probs).scatter_add_(1, windows[..., -1], repeats.to(log_probs.dtype))
            log_probs = log_probs.masked_fill(banned > 0, -math.inf)
        return log_probs

    def extend(self, rows: Tensor | None, tokens: Tensor) -> None:
        """The hypotheses are now `rows` [N] of those before (None: the same), each with one of `tokens` [N] more."""
        if not self.ngram:
            return
        kept = self.tokens
        if kept is None:
            kept = tokens.new_empty(len(tokens), 0)
        elif rows is not None:
            kept = kept.index_select(0, rows)
        self.tokens = torch.cat([kept, tokens.unsqueeze(1)], 1)

    def select(self, rows: Tensor) -> None:
        """Only the hypotheses `rows` [N] go on."""
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows)


def scatter(rows: Tensor, active: Tensor, batch: int) -> Tensor:
    """[A, ...] -> [B, ...] with zeros for the sentences that are done."""
    if len(active) == batch:
        return rows
    return rows.new_zeros(batch, *rows.shape[1:]).index_copy(0, active, rows)


def stack(maps: list[Tensor]) -> Tensor | None:
    """Attention of each step [M, S] -> [M, T, S], zeros where the memory grew with the steps; None without any."""
    if not maps:
        return None
    width = max(m.size(1) for m in maps)
    return torch.stack([pad(m, (0, width - m.size(1))) for m in maps], dim=1)


def begin(
    state: Any, start: int | Tensor, end: int | None, max_length: int, batch_size: int | None, batch_dim: Any
) -> tuple[Tensor, int]:
    """The first tokens [B] and B, from whichever of `start`, `batch_size` and the state says it."""
    if max_length < 0:
        raise ValueError(f"max_length: expected at least 0, got {max_length}")
    if end is not None and end < 0:
        raise ValueError(f"end: expected a token's number or None, got {end}")
    like, rows = _first_tensor(state, batch_dim)
    device = None if like is None else like.device
    if hasattr(state, "select") and not isinstance(state, Tensor):
        rows, device = getattr(state, "batch_size", None), getattr(state, "device", None)
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
        tokens = torch.full((batch,), start, device=device)
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


def call(step: Step, tokens: Tensor, state: Any, memory: Any, end: int | None) -> tuple[Tensor, Any, Tensor | None]:
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
    # The largest is NaN where any is, and NaN fails the comparison: one look at the device serves both.
    if n and not bool(log_probs.max() <= LARGEST_LOG_PROB):
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
