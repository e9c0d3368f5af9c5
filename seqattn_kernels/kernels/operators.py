"""The operators on CUDA, as their schemas in csrc/ops.cpp have them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqattn_kernels.kernels import attention, rows, score_backward, score_forward, step
from seqattn_kernels.kernels.checks import expect_dtype, expect_rank, expect_served, expect_shape, masks_of
from seqattn_kernels.kernels.context import contained, product
from seqattn_kernels.kernels.launch import Masks
from seqattn_kernels.kernels.scores import SCORES, Score

NORMALIZERS = ("softmax", "sparsemax", "entmax15", "sigmoid")


def _score(kind: str) -> Score:
    if kind not in SCORES:
        raise ValueError(f"kind: expected one of {sorted(SCORES)}, got {kind!r}")
    return SCORES[kind]


def _check_attention(query: Tensor, keys: Tensor, v: Tensor | None, values: Tensor | None) -> None:
    if query.dim() not in (2, 3):
        raise ValueError(f"query: expected [B, A] or [B, T, A], got {list(query.shape)}")
    expect_served("query", query)
    batch, width = query.shape[0], query.shape[-1]
    if keys.dim() != 3 or keys.shape[0] != batch or keys.shape[2] != width:
        raise ValueError(f"keys: expected [B, S, A] with B={batch}, A={width} (from query), got {list(keys.shape)}")
    expect_dtype("keys", keys, query)
    if v is not None:
        heads = v.shape[0] if v.dim() == 2 else 1
        fits = v.dim() in (1, 2) and v.shape[-1] == width and heads > 0 and batch % heads == 0
        if not fits:
            raise ValueError(
                f"v: expected [A] or [H, A] with A={width}, H dividing B={batch} (from query), got {list(v.shape)}"
            )
        expect_dtype("v", v, query)
    if values is not None:
        if values.dim() != 3 or values.shape[:2] != keys.shape[:2]:
            raise ValueError(
                f"values: expected [B, S, D] with B={batch}, S={keys.shape[1]} (from keys), got {list(values.shape)}"
            )
        expect_dtype("values", values, query)


def additive_pack(keys: Tensor) -> Tensor:
    """There is no order of keys that serves better than their own: a step is bound by reading them, and exponentials in
    float32 would be no less to read; many queries share those that a call computes."""
    raise ValueError(f"keys: expected a tensor on the CPU, got {keys.device}, where keys are read as they are")


def additive_fwd(
    query: Tensor,
    keys: Tensor,
    packed: Tensor | None,
    values: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    _check_attention(query, keys, v, values)
    if packed is not None:
        raise ValueError(f"packed: expected None on {query.device}, where keys are read as they are")
    steps = query.shape[1] if query.dim() == 3 else 1
    masks = masks_of(query.shape[0], steps, keys.shape[1], query, lengths, mask)
    context, weights = attention.attention_fwd(SCORES["additive"], query, keys, values, v, masks, need_weights)
    return context, query.new_empty(0) if weights is None else weights


def additive_bwd(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    weights: Tensor,
    d_context: Tensor | None,
    d_weights: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_attention(query, keys, v, values)
    steps = query.shape[1] if query.dim() == 3 else 1
    masks = masks_of(query.shape[0], steps, keys.shape[1], query, lengths, mask)
    d_query, d_keys, d_values, d_v = attention.attention_bwd(
        SCORES["additive"], query, keys, values, v, weights, d_context, d_weights, masks, need_values
    )
    assert d_v is not None
    return d_query, d_keys, query.new_empty(0) if d_values is None else d_values, d_v


def scores_fwd(
    kind: str,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Scores [B, T, S] of query [B, T, A] and keys [B, S, A]; 0 past `lengths`."""
    score = _score(kind)
    _check_scores(query, keys, v, features, feature_weight)
    masks = masks_of(query.shape[0], query.shape[1], keys.shape[1], query, lengths, None)
    by_step = features is not None and features.dim() == 4
    if features is not None and query.shape[2] <= step.STEP_WIDTH and (by_step or query.shape[1] <= attention.FEW):
        scores = step.step_scores(score, query, keys, v, features, feature_weight)
    elif features is not None and by_step:
        per_step = [
            scores_fwd(kind, query[:, t : t + 1], keys, v, features[:, t], feature_weight, lengths)
            for t in range(query.shape[1])
        ]
        return torch.cat(per_step, 1) if per_step else query.new_empty(query.shape[0], 0, keys.shape[1])
    else:
        scores = _raw_scores(score, query, _with_features(keys, features, feature_weight), v)
    if masks.lengths is not None:
        past = torch.arange(keys.shape[1], device=keys.device) >= masks.lengths.unsqueeze(1)
        scores.masked_fill_(past.unsqueeze(1), 0)
    return scores.to(query.dtype)


def scores_bwd(
    kind: str,
    d_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys, v, features and feature_weight, empty where there is none.

    A score whose gradient is 0 contributes nothing, even where query or key is NaN.
    """
    score = _score(kind)
    _check_scores(query, keys, v, features, feature_weight)
    masks = masks_of(query.shape[0], query.shape[1], keys.shape[1], query, lengths, None)
    expect_shape("d_scores", d_scores, "[B, T, S]", (*query.shape[:2], keys.shape[1]))
    d_scores = d_scores.float()
    if masks.lengths is not None:
        past = torch.arange(keys.shape[1], device=keys.device) >= masks.lengths.unsqueeze(1)
        d_scores = d_scores.masked_fill(past.unsqueeze(1), 0)
    if features is not None and features.dim() == 4:
        assert feature_weight is not None
        return _scores_bwd_by_step(score, d_scores, query, keys, v, features, feature_weight)
    inner = _with_features(keys, features, feature_weight)
    d_query, d_inner, d_v = _raw_gradients(score, d_scores, query, inner, v, masks)
    empty = query.new_empty(0)
    d_features = d_weight = empty
    if features is not None and feature_weight is not None:
        d_features = (d_inner.float() @ feature_weight.float().t()).to(features.dtype)
        by_column = d_inner.float().flatten(0, 1).t().unsqueeze(0)
        d_weight = contained(by_column, features.float().flatten(0, 1).unsqueeze(0))[0].t().to(feature_weight.dtype)
    return d_query, d_inner.to(keys.dtype), empty if d_v is None else d_v, d_features, d_weight


def _scores_bwd_by_step(
    score: Score,
    d_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    features: Tensor,
    feature_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features of each query by themselves: a step at a time, or the term [B, T, S, A] would have to be stored."""
    d_keys = torch.zeros_like(keys, dtype=torch.float32)
    d_weight = torch.zeros_like(feature_weight, dtype=torch.float32)
    d_v = None if v is None else torch.zeros_like(v, dtype=torch.float32)
    d_query, d_features = torch.zeros_like(query), torch.zeros_like(features)
    for t in range(query.shape[1]):
        at = slice(t, t + 1)
        found = scores_bwd(score.name, d_scores[:, at], query[:, at], keys, v, features[:, t], feature_weight)
        d_query[:, at], d_features[:, t] = found[0], found[3]
        d_keys += found[1]
        d_weight += found[4]
        if d_v is not None:
            d_v += found[2]
    empty = query.new_empty(0)
    return (
        d_query,
        d_keys.to(keys.dtype),
        empty if v is None or d_v is None else d_v.to(v.dtype),
        d_features,
        d_weight.to(feature_weight.dtype),
    )


def _check_scores(
    query: Tensor, keys: Tensor, v: Tensor | None, features: Tensor | None, feature_weight: Tensor | None
) -> None:
    expect_rank("query", query, "[B, T, A]")
    _check_attention(query, keys, v, None)
    if (features is None) != (feature_weight is None):
        raise ValueError("feature_weight: expected it together with features, got one without the other")
    if features is not None and feature_weight is not None:
        batch, steps, width = query.shape
        source = keys.shape[1]
        if feature_weight.dim() != 2 or feature_weight.shape[1] != width:
            raise ValueError(
                f"feature_weight: expected [F, A] with A={width} (from query), got {list(feature_weight.shape)}"
            )
        count = feature_weight.shape[0]
        text = f"[B, S, F] or [B, T, S, F] with B={batch}, T={steps}, S={source}, F={count}"
        expect_shape("features", features, text, (batch, source, count), (batch, steps, source, count))
        expect_dtype("features", features, query)
        expect_dtype("feature_weight", feature_weight, query)


def _with_features(keys: Tensor, features: Tensor | None, feature_weight: Tensor | None) -> Tensor:
    """Features [B, S, F] are the same for all queries: their term belongs to the keys."""
    if features is None or feature_weight is None:
        return keys
    return keys.float() + features.float() @ feature_weight.float()


def _raw_scores(score: Score, query: Tensor, keys: Tensor, v: Tensor | None) -> Tensor:
    if score.product and v is None:
        return product(query, keys.transpose(1, 2))
    if v is None and score.exponential:
        v = query.new_ones(query.shape[2])
    if query.shape[1] <= attention.FEW and query.shape[2] <= step.STEP_WIDTH:
        return step.step_scores(score, query, keys, v)
    return score_forward.scores_fwd(score, query, keys, v)


def _raw_gradients(
    score: Score, d_scores: Tensor, query: Tensor, keys: Tensor, v: Tensor | None, masks: Masks
) -> tuple[Tensor, Tensor, Tensor | None]:
    if score.product and v is None:
        d_query = contained(d_scores, keys.float()).to(query.dtype)
        return d_query, contained(d_scores.transpose(1, 2), query.float()).to(keys.dtype), None
    weight = query.new_ones(query.shape[2]) if v is None and score.exponential else v
    if query.shape[1] == 1 and query.shape[2] <= step.STEP_WIDTH:
        d_query, d_keys, d_v = step.step_bwd(score, d_scores.squeeze(1), query.squeeze(1), keys, weight)
        d_query = d_query.unsqueeze(1)
    else:
        d_query, d_keys, d_v = score_backward.scores_bwd(score, d_scores, query, keys, weight, masks)
    return d_query, d_keys, None if v is None else d_v


def normalize_fwd(
    kind: str,
    scores: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    fill: float = -math.inf,
    zero_empty: bool = True,
) -> Tensor:
    """Weights [B, T, S] of ``(scale * scores + mask) / temperature``, with `fill` where a key is hidden."""
    _check_rows(kind, scores)
    batch, steps, source = scores.shape
    masks = masks_of(batch, steps, source, scores, lengths, mask)
    scores = scores.contiguous()
    return rows.normalize_fwd(kind, scores, torch.empty_like(scores), masks, scale, temperature, fill, zero_empty)


def normalize_bwd(
    kind: str,
    d_weights: Tensor,
    weights: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """The gradient of the scores, where `factor` is scale / temperature; 0 at hidden keys and where a weight is 0."""
    _check_rows(kind, weights)
    expect_shape("d_weights", d_weights, "the shape of weights", weights.shape)
    batch, steps, source = weights.shape
    masks = masks_of(batch, steps, source, weights, lengths, mask)
    weights = weights.contiguous()
    return rows.normalize_bwd(kind, weights, d_weights.contiguous(), None, torch.empty_like(weights), masks, factor)


def context_fwd(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B, T, S] times values [B, S, D]. A value without weight contributes nothing, even if it is NaN."""
    expect_rank("weights", weights, "[B, T, S]")
    expect_served("weights", weights)
    expect_rank("values", values, "[B, S, D]")
    batch, _, source = weights.shape
    expect_shape("values", values, f"[B, S, D] with B={batch}, S={source}", (batch, source, values.shape[2]))
    expect_dtype("values", values, weights, source="weights")
    return contained(weights, values)


def _check_rows(kind: str, scores: Tensor) -> None:
    if kind not in NORMALIZERS:
        raise ValueError(f"kind: expected one of {list(NORMALIZERS)}, got {kind!r}")
    expect_rank("scores", scores, "[B, T, S]")
    expect_served("scores", scores)
