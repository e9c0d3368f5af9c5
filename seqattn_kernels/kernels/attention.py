"""Attention from scores to context, forward and backward, out of the kernels.

Two phases: scores [B, T, S], then weights in place, then a batched product. For T > 1 the scores cost hundreds of
operations an element, so passing over [B, T, S] once more costs a few per cent; in return every score works with every
normaliser and mask. One query per batch element is bound by reading keys and values, and has a kernel that reads each
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels.kernels.context import contained, product
from seqattn_kernels.kernels.launch import Masks
from seqattn_kernels.kernels.rows import normalize_bwd, normalize_fwd
from seqattn_kernels.kernels.score_backward import scores_bwd
from seqattn_kernels.kernels.score_forward import scores_fwd
from seqattn_kernels.kernels.scores import Score
from seqattn_kernels.kernels.step import STEP_WIDTH, step_bwd, step_fwd

# Queries for each batch element up to which reading keys again for each costs less than a tile of queries.
FEW = 4


def attention_fwd(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor | None,
    masks: Masks,
    need_weights: bool,
    normalizer: str = "softmax",
) -> tuple[Tensor, Tensor | None]:
    """Context and weights (None where not needed) of query [B, A] or [B, T, A]."""
    if query.dim() == 2:
        context, weights = attention_fwd(score, query.unsqueeze(1), keys, values, v, masks, need_weights, normalizer)
        return context.squeeze(1), None if weights is None else weights.squeeze(1)
    if query.shape[1] <= FEW and normalizer == "softmax" and max(query.shape[2], values.shape[2]) <= STEP_WIDTH:
        return step_fwd(score, query, keys, v, values, masks, need_weights)
    scores = scores_fwd(score, query, keys, v, masks)
    weights = scores if query.dtype == torch.float32 else torch.empty_like(scores, dtype=query.dtype)
    normalize_fwd(normalizer, scores, weights, masks)
    context = contained(weights, values) if masks.hide else torch.bmm(weights, values)
    return context, weights if need_weights else None


def attention_bwd(
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor | None,
    weights: Tensor,
    d_context: Tensor | None,
    d_weights: Tensor | None,
    masks: Masks,
    need_values: bool,
    normalizer: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, keys, values (None where not needed) and v."""
    if query.dim() == 2:
        d_query, *rest = attention_bwd(
            score,
            query.unsqueeze(1),
            keys,
            values,
            v,
            weights.unsqueeze(1),
            None if d_context is None else d_context.unsqueeze(1),
            None if d_weights is None else d_weights.unsqueeze(1),
            masks,
            need_values,
            normalizer,
        )
        return d_query.squeeze(1), *rest  # type: ignore[return-value]
    from_context = d_values = None
    if d_context is not None:
        # What values without weight make of it is not looked at.
        from_context = product(d_context, values.transpose(1, 2))
        if need_values:
            by_key = weights.transpose(1, 2)
            d_values = contained(by_key, d_context) if masks.hide else torch.bmm(by_key, d_context)
    elif need_values:
        d_values = torch.zeros_like(values)
    d_scores = torch.empty_like(weights, dtype=torch.float32) if from_context is None else from_context
    if d_weights is not None:
        d_weights = d_weights.contiguous()
    # Softmax and its kin leave no weight where a key is hidden, and so no gradient.
    normalize_bwd(normalizer, weights.contiguous(), from_context, d_weights, d_scores)
    if query.shape[1] == 1 and query.shape[2] <= STEP_WIDTH:
        d_query, d_keys, d_v = step_bwd(score, d_scores.squeeze(1), query.squeeze(1), keys, v)
        return d_query.unsqueeze(1), d_keys, d_values, d_v
    d_query, d_keys, d_v = scores_bwd(score, d_scores, query, keys, v, masks)
    return d_query, d_keys, d_values, d_v
