"""Attention in plain torch: scores, masks, weights, context.

Shapes: query [B, T, Q], keys [B, S, K], values [B, S, D], weights [B, T, S], context [B, T, D]. A mask is boolean
(True: attend) or floating (added to the scores, -inf: don't attend), [B, S], [B, 1, S] or [B, T, S].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def additive_scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """sum_a v[a] * tanh(query[t, a] + keys[s, a])."""
    return (query.unsqueeze(2) + keys.unsqueeze(1)).tanh() @ v


def dot_scores(query: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
    return query @ keys.transpose(1, 2) * scale


def general_scores(query: Tensor, keys: Tensor, weight: Tensor) -> Tensor:
    return query @ weight @ keys.transpose(1, 2)


def concat_scores(query: Tensor, keys: Tensor, weight: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """v . tanh(weight [query; key] + bias)."""
    shape = query.shape[0], query.shape[1], keys.shape[1]
    pairs = torch.cat([query.unsqueeze(2).expand(*shape, -1), keys.unsqueeze(1).expand(*shape, -1)], -1)
    return F.linear(pairs, weight, bias).tanh() @ v


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
    if attend is None:
        return scores.softmax(-1)
    return scores.masked_fill(~attend, -torch.inf).softmax(-1).masked_fill(~attend, 0)


def without_unattended(t: Tensor, attend: Tensor | None) -> Tensor:
    """t [B, S, ...] with zeros where no query attends: whatever stood there must not spread (0 * NaN is NaN)."""
    return t if attend is None else t.masked_fill(~attend.any(1).unsqueeze(-1), 0)


def additive_attention(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Context [B, T, D] and weights [B, T, S] of additive attention (Bahdanau et al., 2014)."""
    attend = attended(keys, lengths, mask)
    scores = additive_scores(query, without_unattended(keys, attend), v)
    weights = masked_softmax(scores, attend, mask)
    return weights @ without_unattended(values, attend), weights


def feature_attention(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, attend: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [B, S, D], a softmax over time of tanh(linear(input)) for each feature, and weights * input.

    attend: [B, S, 1] or None. weight [D, D].
    """
    if attend is None:
        weights = F.linear(input, weight, bias).tanh().softmax(1)
        return weights * input, weights
    clean = input.masked_fill(~attend, 0)
    scores = F.linear(clean, weight, bias).tanh()
    weights = scores.masked_fill(~attend, -torch.inf).softmax(1).masked_fill(~attend, 0)
    return weights * clean, weights
