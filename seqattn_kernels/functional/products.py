"""Attention whose scores are matrix products: dot, general, cosine. Arguments and results are those of
`additive_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels.functional.arguments import expect_devices, expect_floats, expect_rank, explain_shapes
from seqattn_kernels.functional.attention import finish
from seqattn_kernels.functional.masks import attended_keys, resolve_masks
from seqattn_kernels.functional.weighting import Weighting, context_of, products_of, weigh, weighting_of


def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    scale: float | bool | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, Any]:
    """Dot-product attention (Luong, Pham, Manning, 2015): scores ``scale * (query . keys)``.

    Args:
        query: [B, K] or [B, T, K].
        keys: [B, S, K].
        scale: a number; True for 1 / sqrt(K) (Vaswani et al., 2017); None for 1.
        values, lengths, mask and the others: as in `additive_attention`, and so are the results. Computed by torch's
            matrix products, and without weights or masks by its ``scaled_dot_product_attention``.
    """
    values = keys if values is None else values
    expect_rank("query", query, "[B, K] or [B, T, K]", 2, 3)
    if not (
        keys.dim() == 3
        and values.dim() == 3
        and query.shape[0] == keys.shape[0]
        and query.shape[-1] == keys.shape[2]
        and values.shape[:2] == keys.shape[:2]
    ):
        explain_shapes(query, keys, values)
    expect_floats(query=query, keys=keys, values=values)
    expect_devices(query, keys=keys, values=values)
    if lengths is not None or mask is not None or causal:
        lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity, causal)
    factor = query.shape[-1] ** -0.5 if scale is True else 1.0 if scale is None or scale is False else scale
    single = query.dim() == 2
    if single:
        query = query.unsqueeze(1)
    weights: Tensor | None = None
    plain = weighting is None and lengths is None and mask is None
    if plain and not need_weights and keys.shape[1] and _fused_pays(query, keys):
        heads = query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)  # its fast forms ask for four dimensions
        context = F.scaled_dot_product_attention(*heads, scale=factor).squeeze(1)
    else:
        chosen = weighting_of(weighting)
        scores = products_of(query, keys, lengths, mask, factor)
        if plain:
            weights = scores.softmax(-1)
            context = torch.bmm(weights, values)
        else:
            weights = weigh(scores, lengths, mask, chosen)
            context = context_of(weights, values, lengths, mask, chosen)
    return finish(context, weights if need_weights else None, single, query.dtype)


def _fused_pays(query: Tensor, keys: Tensor) -> bool:
    """Whether torch's fused attention is no slower than its parts, as measured.

    On a GPU it lost for single queries, at 0.57 of their speed, and won with 128 and 512; none between was tried.
    """
    if query.device.type == "cpu":
        return query.shape[1] * keys.shape[1] >= 1 << 16
    return query.shape[1] >= 16


def general_attention(
    query: Tensor,
    keys: Tensor,
    weight: Tensor,
    values: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, Any]:
    """Bilinear attention (Luong, Pham, Manning, 2015, "general"): scores ``query @ weight @ key``, weight [Q, K].

    Args:
        query: [B, Q] or [B, T, Q].
        keys: [B, S, K].
        values, lengths, mask and the others: as in `additive_attention`, and so are the results. The shorter of query
            and keys is projected.
    """
    expect_rank("query", query, "[B, Q] or [B, T, Q]", 2, 3)
    expect_rank("keys", keys, "[B, S, K]", 3)
    if weight.shape != (query.shape[-1], keys.shape[2]):
        raise ValueError(
            f"weight: expected [Q, K] with Q={query.shape[-1]} (from query), K={keys.shape[2]} (from keys), "
            f"got {list(weight.shape)}"
        )
    if query.shape[0] != keys.shape[0]:
        raise ValueError(f"keys: expected [B, S, K] with B={query.shape[0]} (from query), got {list(keys.shape)}")
    values = keys if values is None else values
    expect_devices(query, keys=keys, weight=weight)
    if lengths is not None or mask is not None or causal:
        lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity, causal)
    steps = query.shape[1] if query.dim() == 3 else 1
    if steps <= keys.shape[1]:
        query = query @ weight
    else:
        keys = F.linear(attended_keys(keys, lengths, mask), weight)
    return dot_attention(
        query, keys, values, lengths=lengths, mask=mask, weighting=weighting, need_weights=need_weights
    )


def cosine_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    scale: Tensor | float = 1.0,
    eps: float = 1e-8,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, Any]:
    """Content addressing (Graves, Wayne, Danihelka, 2014): scores ``scale * cos(query, key)``.

    Args:
        query: [B, K] or [B, T, K].
        keys: [B, S, K].
        scale: the sharpness beta: a number, or a tensor that broadcasts with a query's leading dimensions ([B], [B, 1]
            or [B, T], or without a dimension, as a parameter is), differentiable.
        eps: vectors shorter than this count as so long: the zero vector is at cosine 0 with all.
        values, lengths, mask and the others: as in `additive_attention`, and so are the results.
    """
    values = keys if values is None else values
    expect_rank("query", query, "[B, K] or [B, T, K]", 2, 3)
    expect_rank("keys", keys, "[B, S, K]", 3)
    if query.shape[0] != keys.shape[0] or query.shape[-1] != keys.shape[2]:
        explain_shapes(query, keys, values)
    expect_devices(query, keys=keys)
    if lengths is not None or mask is not None or causal:
        lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity, causal)
    direction = F.normalize(query, dim=-1, eps=eps)
    if isinstance(scale, Tensor):
        leading = query.shape[:-1]
        fits = all(n in (1, m) for n, m in zip(reversed(scale.shape), reversed(leading), strict=False))
        if scale.dim() > len(leading) or not fits:
            raise ValueError(
                f"scale: expected a shape that broadcasts to {list(query.shape[:-1])} (from query), got "
                f"{list(scale.shape)}"
            )
        direction = direction * scale.unsqueeze(-1)
    elif scale != 1.0:
        direction = direction * scale
    keys = F.normalize(attended_keys(keys, lengths, mask), dim=-1, eps=eps)
    return dot_attention(
        direction, keys, values, lengths=lengths, mask=mask, weighting=weighting, need_weights=need_weights
    )
