"""Attention by the name of its score, and scores of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from seqattn_kernels import ops
from seqattn_kernels.functional.arguments import expect_devices, expect_floats, expect_rank, expect_shape
from seqattn_kernels.functional.attention import finish
from seqattn_kernels.functional.masks import resolve_masks
from seqattn_kernels.functional.scoring import attend
from seqattn_kernels.functional.weighting import Weighting, weighting_of
from seqattn_kernels.reference.attention import SCORES


def register_score(name: str, score: Callable[..., Tensor], triton: Any = None) -> None:
    """Makes ``score_attention(name, ...)`` know a score of your own.

    Args:
        name: not yet taken.
        score: ``score(query [B, T, A], keys [B, S, A], v) -> [B, T, S]`` in plain torch, differentiated by autograd. v
            is what the caller of `score_attention` gives, a tensor or None.
        triton: a pair of Triton functions, forward and gradient, for a fused kernel on a GPU; see
            ``seqattn_kernels.kernels.scores``. None: the plain form serves there too.

    Raises:
        ValueError: the name is taken.
    """
    if name in SCORES:
        raise ValueError(f"name: expected one that is not taken, got {name!r}")
    if triton is not None:
        ops.scores.register_kernel(name, triton)
    SCORES[name] = score


def score_attention(
    score: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    v: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Attention with a score by its name: "additive", "dot", or one that `register_score` made known.

    Args:
        query: [B, A] or [B, T, A].
        keys: [B, S, A].
        values: [B, S, D]; the keys by default.
        v: the score's weight, where it has one; [A] for "additive".
        lengths, mask and the others: as in `additive_attention`, and so are the results.
    """
    if score not in SCORES:
        raise ValueError(f"score: expected one of {sorted(SCORES)}, got {score!r}")
    values = keys if values is None else values
    expect_rank("query", query, "[B, A] or [B, T, A]", 2, 3)
    expect_shape("keys", keys, "[B, S, A]", {"B": query.shape[0], "A": query.shape[-1]})
    expect_shape("values", values, "[B, S, D]", {"B": keys.shape[0], "S": keys.shape[1]})
    tensors = {"query": query, "keys": keys, "values": values} | ({} if v is None else {"v": v})
    expect_floats(**tensors)
    expect_devices(**tensors)
    if v is not None and score == "additive":
        expect_shape("v", v, "[A]", {"A": query.shape[-1]})
    lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity, causal)
    single, dtype = query.dim() == 2, query.dtype
    context, weights = attend(
        score,
        query.unsqueeze(1) if single else query,
        keys,
        v,
        values,
        lengths,
        mask,
        weighting=weighting_of(weighting),
        need_weights=need_weights,
        backend=backend,
    )
    return finish(context, weights, single, dtype)
