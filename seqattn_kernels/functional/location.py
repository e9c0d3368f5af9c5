"""Attention that knows where it looked before: location-sensitive and coverage attention, one decoder step a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqattn_kernels import ops
from seqattn_kernels.functional.arguments import WIDE, expect_devices, expect_floats, expect_rank, expect_shape
from seqattn_kernels.functional.attention import PreparedKeys, finish
from seqattn_kernels.functional.masks import resolve_masks
from seqattn_kernels.functional.scoring import attend, score_backend
from seqattn_kernels.functional.weighting import Weighting, context_of, weigh, weighting_of
from seqattn_kernels.reference.attention import attended, location_features, without_unattended


def location_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    v: Tensor,
    history: Tensor,
    conv_weight: Tensor,
    feature_weight: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    history_gradient: bool = True,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Location-sensitive attention (Chorowski et al., 2015; Tacotron 2): features of earlier weights in the score.

    Scores are ``sum_a v[a] * tanh(query[a] + keys[a] + bias[a] + (feature_weight @ features)[a])``, with features the
    convolution of `history` by `conv_weight` over the keys.

    Args:
        query: [B, A] or, with a history for each query, [B, T, A]; already projected.
        keys: [B, S, A], already projected, or prepared.
        v: [A].
        history: [B, S], the last weights, or [B, C, S], say the last and the sum of all before; with a query
            [B, T, A], [B, T, C, S].
        conv_weight: [F, C, W] of a convolution without bias that keeps the length; W odd.
        feature_weight: [A, F], of the linear layer on the features.
        history_gradient: whether gradients flow back through the history into earlier steps.
        bias, values, lengths, mask and the others: as in `additive_attention`, and so are the results.
    """
    query_shape = query.shape
    expect_rank("query", query, "[B, A] or [B, T, A]", 2, 3)
    keys = _plain(keys)
    single = query.dim() == 2
    expect_shape("keys", keys, "[B, S, A]", {"B": query_shape[0], "A": query_shape[-1]})
    expect_rank("conv_weight", conv_weight, "[F, C, W]", 3)
    filters, channels, width = conv_weight.shape
    if width % 2 == 0:
        raise ValueError(f"conv_weight: expected [F, C, W] with W odd, got {list(conv_weight.shape)}")
    sizes = {"B": query_shape[0], "S": keys.shape[1], "A": query_shape[-1], "F": filters, "C": channels}
    if single:
        if history.dim() == 2:
            history = history.unsqueeze(1)
        expect_shape("history", history, "[B, C, S]", sizes)
    else:
        expect_shape("history", history, "[B, T, C, S]", sizes | {"T": query_shape[1]})
    expect_shape("feature_weight", feature_weight, "[A, F]", sizes)
    expect_floats(query=query, history=history, conv_weight=conv_weight, feature_weight=feature_weight)
    expect_devices(query, history=history, conv_weight=conv_weight, feature_weight=feature_weight)
    if not history_gradient:
        history = history.detach()
    masks = resolve_masks(query, keys, lengths, mask, mask_polarity)
    wide = query.dtype in WIDE and all(t.dtype == query.dtype for t in (history, conv_weight, feature_weight))
    if wide and score_backend("additive", query, backend) == "cpu" and not torch.is_autocast_enabled("cpu"):
        return _in_one(
            query, keys, v, (history, conv_weight, feature_weight), values, bias, masks, weighting, need_weights
        )
    features = location_features(history, conv_weight)
    return _with_features(
        query, keys, v, features, feature_weight.t(), values, bias, masks, weighting, need_weights, backend
    )


def _in_one(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    location: tuple[Tensor, Tensor, Tensor],
    values: Tensor | None,
    bias: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    weighting: Weighting | str | None,
    need_weights: bool,
) -> tuple[Tensor, Any]:
    """By the CPU's operator of location-sensitive scores; `location` is history, conv_weight, feature_weight."""
    query, values = _checked(query, keys, v, values, bias)
    chosen = weighting_of(weighting)
    lengths, mask = masks
    clean = keys if mask is None else without_unattended(keys, attended(keys, None, mask))
    scores = ops.location.scores(query, clean, v, *location, lengths)
    single = query.dim() == 2
    weights = weigh(scores.unsqueeze(1) if single else scores, lengths, mask, chosen)
    context = context_of(weights, values, lengths, mask, chosen)
    return finish(context, weights if need_weights else None, single, query.dtype)


def coverage_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    v: Tensor,
    coverage: Tensor,
    coverage_weight: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Coverage attention (Tu et al., 2016; See, Liu, Manning, 2017): how much was said of a key counts in its score.

    Scores are ``sum_a v[a] * tanh(query[a] + keys[a] + bias[a] + coverage_weight[a] * coverage[s])``.

    Args:
        query: [B, A], already projected.
        keys: [B, S, A], already projected, or prepared.
        v: [A].
        coverage: [B, S], the sum of all weights so far, divided by the fertility of each key where wanted (Tu et al.'s
            linguistic form, see `fertility`); or F features of each key, [B, S, F] (their neural form).
        coverage_weight: [A], with features [A, F].
        bias, values, lengths, mask and the others: as in `additive_attention`, and so are the results.
    """
    expect_rank("query", query, "[B, A]", 2)
    keys = _plain(keys)
    expect_shape("keys", keys, "[B, S, A]", {"B": query.shape[0], "A": query.shape[1]})
    expect_rank("coverage", coverage, "[B, S] or [B, S, F]", 2, 3)
    features = coverage.unsqueeze(-1) if coverage.dim() == 2 else coverage
    if coverage_weight.dim() == 1 and coverage.dim() == 2:
        coverage_weight = coverage_weight.unsqueeze(-1)
    sizes = {"B": query.shape[0], "S": keys.shape[1], "A": query.shape[1], "F": features.shape[2]}
    expect_shape("coverage", features, "[B, S, F]", sizes)
    expect_shape("coverage_weight", coverage_weight, "[A, F]", sizes)
    expect_floats(query=query, coverage=coverage, coverage_weight=coverage_weight)
    expect_devices(query, coverage=coverage, coverage_weight=coverage_weight)
    return _with_features(
        query,
        keys,
        v,
        features,
        coverage_weight.t(),
        values,
        bias,
        resolve_masks(query, keys, lengths, mask, mask_polarity),
        weighting,
        need_weights,
        backend,
    )


def coverage_loss(weights: Tensor, coverage: Tensor) -> Tensor:
    """See, Liu, Manning (2017), equation 12: ``sum_s min(weights, coverage)``, one number for each query.

    weights, coverage: [B, S] or [B, T, S], coverage before this step.
    """
    if weights.shape != coverage.shape:
        raise ValueError(f"coverage: expected {list(weights.shape)} (from weights), got {list(coverage.shape)}")
    return torch.minimum(weights, coverage).sum(-1)


def fertility(keys: Tensor, weight: Tensor, most: float = 2.0) -> Tensor:
    """How many target words each key stands for (Tu et al., 2016, equation 9): ``most * sigmoid(keys @ weight)``.

    keys [B, S, K], weight [K] -> [B, S].
    """
    expect_rank("keys", keys, "[B, S, K]", 3)
    expect_shape("weight", weight, "[K]", {"K": keys.shape[2]})
    return most * (keys @ weight).sigmoid()


def _plain(keys: Tensor | PreparedKeys) -> Tensor:
    """Keys without their exponentials, which a term besides query and keys makes useless."""
    if not isinstance(keys, PreparedKeys):
        expect_rank("keys", keys, "[B, S, A]", 3)
        return keys
    if keys.heads != 1:
        raise ValueError(f"keys: expected them prepared for one head, got {keys.heads}")
    keys.check_unchanged()
    return keys.keys


def _with_features(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    features: Tensor,
    feature_weight: Tensor,
    values: Tensor | None,
    bias: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    weighting: Weighting | str | None,
    need_weights: bool,
    backend: str | None,
) -> tuple[Tensor, Any]:
    single, dtype = query.dim() == 2, query.dtype
    query, values = _checked(query, keys, v, values, bias)
    context, weights = attend(
        "additive",
        query.unsqueeze(1) if single else query,
        keys,
        v,
        values,
        *masks,
        features=features,
        feature_weight=feature_weight,
        weighting=weighting_of(weighting),
        need_weights=need_weights,
        backend=backend,
    )
    return finish(context, weights, single, dtype)


def _checked(
    query: Tensor, keys: Tensor, v: Tensor, values: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Query with the bias, and values."""
    values = keys if values is None else values
    expect_shape("v", v, "[A]", {"A": query.shape[-1]})
    expect_shape("values", values, "[B, S, D]", {"B": query.shape[0], "S": keys.shape[1]})
    expect_floats(query=query, keys=keys, values=values, v=v)
    expect_devices(query, keys=keys, values=values, v=v)
    if bias is not None:
        expect_shape("bias", bias, "[A]", {"A": v.shape[0]})
        query = (query if query.dtype in WIDE else query.float()) + bias
    return query, values
