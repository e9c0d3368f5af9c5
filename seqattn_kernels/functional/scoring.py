"""What the attention functions share once arguments are checked: the choice of a backend, scores, context."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import ops, reference
from seqattn_kernels.functional.weighting import (
    SOFTMAX,
    Weighting,
    choose_backend,
    computed_wide,
    context_of,
    products_of,
    weigh,
)
from seqattn_kernels.reference.attention import SCORES, attended, without_unattended


def score_backend(kind: str, query: Tensor, wish: str | None) -> str:
    """Who computes the scores; the reference where no kernel knows the kind (torch's product is anybody's)."""
    name = choose_backend(query, wish)
    if kind == "dot" or name == "reference" or kind in ops.scores.native_kinds(query.device.type):
        return name
    if wish is not None:
        raise RuntimeError(f"backend {wish!r} can't serve: it has no kernel of the score {kind!r}")
    return "reference"


def scores_of(
    kind: str,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores [B, T, S]; those of keys no query attends to are arbitrary numbers, whatever stands in such keys."""
    if kind == "dot":
        return products_of(query, keys, lengths, mask)
    if score_backend(kind, query, backend) == "reference":
        clean = without_unattended(keys, attended(keys, lengths, mask))
        extra = () if features is None else (features, feature_weight)
        return SCORES[kind](query, clean, v, *extra)
    if mask is not None:
        keys = without_unattended(keys, attended(keys, None, mask))
    return ops.scores.scores(kind, query, keys, v, features, feature_weight, lengths)


def attend(
    kind: str,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    values: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    *,
    packed: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    weighting: Weighting = SOFTMAX,
    score_bias: Tensor | float | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Context [B, T, D] and weights [B, T, S] of query [B, T, A], by one fused operator where there is one.

    Arguments are checked and the masks resolved. score_bias is added to the scores. packed: `ops.attention.pack_keys`
    of these keys.
    """
    name = score_backend(kind, query, backend)
    dtype = query.dtype
    given = (query, keys, values, v, features, feature_weight)
    mixed = any(t is not None and t.dtype != query.dtype for t in given)  # under autocast
    if computed_wide(query, name) or mixed:
        query, keys, values = _wide(query), _wide(keys), _wide(values)
        v, features, feature_weight = (t if t is None else _wide(t) for t in (v, features, feature_weight))
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    fused = kind == "additive" and v is not None and features is None and weighting.is_softmax
    weights: Tensor | None
    if fused and v is not None and (mask is None or not mask.requires_grad):
        if isinstance(score_bias, Tensor):
            v = v + 0 * score_bias  # no softmax depends on it, but it has a gradient: zero
        factor = weighting.scale / weighting.temperature
        if factor != 1:
            v = v * factor
        if mask is not None and weighting.temperature != 1 and mask.dtype != torch.bool:
            mask = mask / weighting.temperature
        # With dropout the context has to wait for the weights.
        now = values if not weighting.dropout else values[..., :0]
        if name == "reference":
            context, weights = reference.attention.additive_attention(query, keys, now, v, lengths, mask)
        else:
            context, weights = ops.attention.additive(
                query, keys, packed, now, v, lengths, mask, need_weights or weighting.dropout > 0
            )
        if weighting.dropout:
            context = context_of(weights, values, lengths, mask, weighting)
    else:
        scores = scores_of(kind, query, keys, v, lengths, mask, features, feature_weight, backend)
        if score_bias is not None:
            scores = scores + score_bias
        weights = weigh(scores, lengths, mask, weighting, backend)
        context = context_of(weights, values, lengths, mask, weighting)
    if context.dtype != dtype:
        context, weights = context.to(dtype), weights.to(dtype)
    return context, weights if need_weights else None


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
