"""Attention in plain torch: scores, masks, weights, context.

Shapes: query [B, T, Q], keys [B, S, K], values [B, S, D], weights [B, T, S], context [B, T, D]. A mask is boolean
(True: attend) or floating (added to the scores, -inf: don't attend), [B, S], [B, 1, S] or [B, T, S].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels.reference.normalizers import normalize


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
) -> Tensor:
    """sum_a v[a] * tanh(query[t, a] + keys[s, a] + (features[.., s] @ feature_weight)[a]).

    v [A], ones where None, or [H, A]: batch element b has row b % H. features [B, S, F] or [B, T, S, F] with
    feature_weight [F, A].
    """
    inner = query.unsqueeze(2) + keys.unsqueeze(1)
    if features is not None and feature_weight is not None:
        term = features @ feature_weight
        inner = inner + (term.unsqueeze(1) if term.dim() == 3 else term)
    if v is None:
        return inner.tanh().sum(-1)
    if v.dim() == 2:
        return (inner.tanh() @ v.repeat(query.shape[0] // v.shape[0], 1)[:, None, :, None]).squeeze(-1)
    return inner.tanh() @ v


def dot_scores(query: Tensor, keys: Tensor, scale: Tensor | float | None = 1.0) -> Tensor:
    scores = query @ keys.transpose(1, 2)
    return scores if scale is None else scores * scale


# The scores that fused kernels exist for, and those a user registers: (query, keys, v) -> scores.
SCORES: dict[str, Callable[..., Tensor]] = {"additive": additive_scores, "dot": dot_scores}


def cosine_scores(query: Tensor, keys: Tensor, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between query and key; 0 where one is shorter than eps."""
    return dot_scores(F.normalize(query, dim=-1, eps=eps), F.normalize(keys, dim=-1, eps=eps))


def general_scores(query: Tensor, keys: Tensor, weight: Tensor) -> Tensor:
    return query @ weight @ keys.transpose(1, 2)


def concat_scores(query: Tensor, keys: Tensor, weight: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """v . tanh(weight [query; key] + bias)."""
    shape = query.shape[0], query.shape[1], keys.shape[1]
    pairs = torch.cat([query.unsqueeze(2).expand(*shape, -1), keys.unsqueeze(1).expand(*shape, -1)], -1)
    return F.linear(pairs, weight, bias).tanh() @ v


def location_features(history: Tensor, weight: Tensor) -> Tensor:
    """Features [.., S, F] of a history [.., C, S] of weights: a convolution over the keys, weight [F, C, W], W odd."""
    flat = history.reshape(-1, *history.shape[-2:])
    features = F.conv1d(flat, weight, padding=weight.shape[-1] // 2).transpose(1, 2)
    return features.reshape(*history.shape[:-2], *features.shape[1:])


def attended(keys: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which keys each query attends to, [B, 1 or T, S], or None: all."""
    attend = None
    if lengths is not None:
        attend = (torch.arange(keys.shape[1], device=keys.device) < lengths.to(keys.device).unsqueeze(1)).unsqueeze(1)
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask != -torch.inf
        allowed = allowed.unsqueeze(1) if mask.dim() == 2 else allowed
        attend = allowed if attend is None else attend & allowed
    return attend


def masked_softmax(scores: Tensor, attend: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Softmax over the attended keys, 0 elsewhere; all 0 where there are none. A floating mask is added."""
    if mask is not None and mask.is_floating_point():
        scores = scores + (mask.unsqueeze(1) if mask.dim() == 2 else mask)
    return normalize("softmax", scores, mask=attend)


def without_unattended(t: Tensor, attend: Tensor | None) -> Tensor:
    """t [B, S, ...] with zeros where no query attends: whatever stood there must not spread (0 * NaN is NaN)."""
    return t if attend is None else t.masked_fill(~attend.any(1).unsqueeze(-1), 0)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor | None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Context [B, T, D] and weights [B, T, S] of additive attention (Bahdanau et al., 2014)."""
    attend = attended(keys, lengths, mask)
    scores = additive_scores(query, without_unattended(keys, attend), v)
    weights = masked_softmax(scores, attend, mask)
    return weights @ without_unattended(values, attend), weights


def scores_of_rows(inner: Tensor, v: Tensor) -> Tensor:
    """Scores [B, R, S], ``v . tanh(inner)``, of inner [B, S, A] and the rows of v [R, A]."""
    return F.linear(inner.tanh(), v).transpose(1, 2)


def pooling_attention(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    values: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums [B, D] of values [B, S, D] (the input by default) by weights [B, S], softmax of v . tanh(linear(input)).

    input [B, S, K], weight [A, K], v [A]; masks [B, S]. With v [R, A] results are [B, R, D], [B, R, S].
    """
    attend = attended(input, lengths, mask)
    clean = without_unattended(input, attend)
    values = clean if values is None else without_unattended(values, attend)
    scores = scores_of_rows(F.linear(clean, weight, bias), v.unsqueeze(0) if v.dim() == 1 else v)
    weights = masked_softmax(scores, attend, mask)
    context = weights @ values
    return (context.squeeze(1), weights.squeeze(1)) if v.dim() == 1 else (context, weights)


def feature_attention(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attend: Tensor | None = None,
    reduce: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights [B, S, D], a softmax over time of tanh(linear(input)) for each feature, and weights * input.

    attend: [B, S, 1] or None. weight [D, D]. reduce: the sum over time instead, [B, D].
    """
    if attend is not None:
        input = input.masked_fill(~attend, 0)
    scores = F.linear(input, weight, bias).tanh()
    if attend is None:
        weights = scores.softmax(1)
    else:
        weights = scores.masked_fill(~attend, -torch.inf).softmax(1).masked_fill(~attend, 0)
    result = weights * input
    return result.sum(1) if reduce else result, weights
