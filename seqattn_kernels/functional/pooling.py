"""Attention without a query: over time for each feature, and pooling of a sequence into one vector or a few."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels import ops, reference
from seqattn_kernels.functional.arguments import WIDE, expect_devices, expect_floats, expect_rank, expect_shape
from seqattn_kernels.functional.masks import attended_keys, resolve
from seqattn_kernels.functional.scoring import attend
from seqattn_kernels.functional.weighting import (
    SOFTMAX,
    Weighting,
    choose_backend,
    context_of,
    taken_as_given,
    weigh,
    weighting_of,
)
from seqattn_kernels.reference.attention import attended


def feature_attention(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    reduce: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over time for each feature: ``weights = softmax(tanh(linear(input)), dim=1)``, result weights * input.

    Args:
        input: [B, S, D], states of an encoder.
        weight: [D, D]; bias: [D] or None: those of the linear layer.
        lengths: tensor [B] on any device, zeros allowed; integers or fractions of S.
        mask: boolean [B, S], True where to attend; with ``mask_polarity="ignore"`` where not to.
        reduce: sum over time.
        backend: "cpu", "triton" or "reference"; None chooses.

    Returns:
        weights * input [B, S, D], or its sum over time [B, D]; weights [B, S, D]. Both are zero where not attended to.
    """
    if taken_as_given(input, mask, mask_polarity, backend) and not torch.is_autocast_enabled("cpu"):
        try:
            return ops.features.attention(input, weight, bias, lengths, mask, reduce)
        except (RuntimeError, TypeError, ValueError):
            pass
    expect_rank("input", input, "[B, S, D]", 3)
    sizes = {"D": input.shape[2]}
    expect_shape("weight", weight, "[D, D]", sizes)
    if bias is not None:
        expect_shape("bias", bias, "[D]", sizes)
    if lengths is not None or mask is not None:
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        if isinstance(mask, Tensor):
            expect_shape("mask", mask, "[B, S]", {"B": input.shape[0], "S": input.shape[1]})
        lengths, mask = resolve(input.shape[0], None, input.shape[1], input.device, lengths, mask, mask_polarity)
    if _computed_here(input, choose_backend(input, backend), weight, bias):
        return ops.features.attention(input, weight, bias, lengths, mask, reduce)
    attend = attended(input, lengths, mask)
    attend = None if attend is None else attend.transpose(1, 2)
    return reference.attention.feature_attention(input, weight, bias, attend, reduce)


def _computed_here(input: Tensor, backend: str, *parameters: Tensor | None) -> bool:
    """Whether the operators of this room take them: of one dtype, which autocast would change."""
    return (
        (backend == "triton" or (backend == "cpu" and input.dtype in WIDE))
        and all(t is None or t.dtype == input.dtype for t in parameters)
        and not torch.is_autocast_enabled(input.device.type)
    )


def pooling_attention(
    input: Tensor,
    weight: Tensor,
    v: Tensor,
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
    """Self-attentive pooling of a sequence: scores ``v . tanh(weight @ input[s] + bias)``, without a query.

    With one row of v the pooling of hierarchical attention networks (Yang et al., 2016), with R rows the structured
    self-attention of Lin et al. (2017).

    Args:
        input: [B, S, K].
        weight: [A, K]; bias: [A] or None.
        v: [A], or [R, A] for R poolings at once.
        values: [B, S, D]; the input by default.
        lengths, mask and the others: as in `additive_attention`, masks [B, S].

    Returns:
        pooled [B, D] or [B, R, D], weights [B, S] or [B, R, S].
    """
    chosen = weighting_of(weighting)
    plain = chosen is SOFTMAX or chosen == SOFTMAX
    if plain and taken_as_given(input, mask, mask_polarity, backend) and not torch.is_autocast_enabled("cpu"):
        try:
            found = ops.pooling.attention(input, weight, bias, v, values, lengths, mask)
        except (RuntimeError, TypeError, ValueError):
            pass
        else:
            return found[0], found[1] if need_weights else None
    expect_rank("input", input, "[B, S, K]", 3)
    batch, source, width = input.shape
    expect_shape("weight", weight, "[A, K]", {"K": width})
    expect_rank("v", v, "[A] or [R, A]", 1, 2)
    sizes = {"A": weight.shape[0], "B": batch, "S": source}
    expect_shape("v", v, "[A]" if v.dim() == 1 else "[R, A]", sizes)
    own_values = values
    values = input if values is None else values
    expect_shape("values", values, "[B, S, D]", sizes)
    if bias is not None:
        expect_shape("bias", bias, "[A]", sizes)
    expect_floats(input=input, values=values, weight=weight, v=v)
    expect_devices(input, values=values, weight=weight, v=v)
    lengths, mask = resolve(batch, None, source, input.device, lengths, mask, mask_polarity)
    name = choose_backend(input, backend)
    here = name == "cpu" and _computed_here(input, name, weight, bias, v, own_values)
    if here and plain and not (mask is not None and mask.requires_grad):
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(input.dtype)
        found = ops.pooling.attention(input, weight, bias, v, own_values, lengths, mask)
        return found[0], found[1] if need_weights else None
    clean = attended_keys(input, lengths, mask)
    if v.dim() == 1:
        keys = F.linear(clean, weight)
        query = keys.new_zeros(batch, 1, keys.shape[2]) if bias is None else bias.to(keys.dtype).expand(batch, 1, -1)
        context, weights = attend(
            "additive",
            query,
            keys,
            v,
            values,
            lengths,
            mask,
            weighting=chosen,
            need_weights=need_weights,
            backend=backend,
        )
        return context.squeeze(1).to(input.dtype), None if weights is None else weights.squeeze(1).to(input.dtype)
    inner = F.linear(clean, weight, bias)
    if choose_backend(inner, backend) == "triton":
        scores = ops.pooling.scores_of_rows(inner, v.to(inner.dtype))
    else:
        scores = reference.attention.scores_of_rows(inner, v.to(inner.dtype))
    weights = weigh(scores if scores.dtype in WIDE else scores.float(), lengths, mask, chosen, backend).to(input.dtype)
    return context_of(weights, values, lengths, mask, chosen), weights if need_weights else None
