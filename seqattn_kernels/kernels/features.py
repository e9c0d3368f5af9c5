"""Attention over time for each feature: weights [B, S, D], a softmax over s of tanh(inner), times input.

tanh lies in [-1, 1], so that exponentials need no largest one taken off: a pass adds them up, a second one divides by
the sum. Both are of one program where there are enough columns to fill the GPU; else S is split over programs, which
add up in one launch and write in the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.checks import expect_dtype, expect_rank, expect_served, expect_shape, masks_of
from seqattn_kernels.kernels.context import contained
from seqattn_kernels.kernels.exponentials import if_so
from seqattn_kernels.kernels.launch import Masks, on_device, padded, target
from seqattn_kernels.kernels.scores import reciprocal


@triton.jit
def exponential_of_tanh(x, TARGET: tl.constexpr):
    """e^tanh(x): what 1 - 2 / (1 + e^2x) loses of a small tanh is nothing beside 1."""
    r = reciprocal(1.0 + tl.exp2(2.8853900817779268 * tl.minimum(x, 32.0)), TARGET)
    return tl.where(x == x, tl.exp2(1.4426950408889634 - 2.8853900817779268 * r), x)


@triton.jit
def slope_of_tanh(x, TARGET: tl.constexpr):
    """1 - tanh(x)^2 in all its digits: with e = e^-2|x|, 4 e / (1 + e)^2."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    r = reciprocal(1.0 + e, TARGET)
    return 4.0 * (e * r) * r


@triton.jit
def attended_block(start, end, b, lengths, mask, mask_b, S_BLOCK: tl.constexpr):
    """Steps of a block, which of them are there, and which attended to."""
    s = start + tl.arange(0, S_BLOCK)
    inside = s < end
    keep = inside
    if lengths is not None:
        keep = keep & (s < tl.load(lengths + b))
    if mask is not None:
        keep = keep & (tl.load(mask + b * mask_b + s, mask=keep, other=0) != 0)
    return s, inside, keep


@triton.jit
def joined(partial, b, splits, row, rows: tl.constexpr, d, D, SPLITS: tl.constexpr):
    """The sum over splits of a row of partial [B, splits, rows, D]."""
    i = tl.arange(0, SPLITS)
    at = partial + ((b * splits + i) * rows + row)[:, None] * D + d[None, :]
    return tl.sum(tl.load(at, mask=(i < splits)[:, None] & (d < D)[None, :], other=0.0), 0)


@triton.jit(do_not_specialize=["S", "SPLIT", "splits"])
def feature_fwd_kernel(
    inner,  # [B, S, D]
    input,  # [B, S, D]
    lengths,  # [B] or None
    mask,  # uint8 [B, S], nonzero where to attend; or None
    mask_b,
    partial,  # float32 [B, splits, 2, D]: sums of exponentials and, with REDUCE, of them times input; None with both
    weights,  # [B, S, D]
    result,  # [B, S, D], or [B, D] with REDUCE
    S,
    D,
    SPLIT,  # steps of a split
    splits,
    ADD: tl.constexpr,  # the first pass
    WRITE: tl.constexpr,  # the second
    REDUCE: tl.constexpr,
    SPLITS: tl.constexpr,  # power of two, at least splits
    S_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
):
    d_blocks = tl.cdiv(D, D_BLOCK)
    tile = tl.program_id(0)
    d_block, split = tile % d_blocks, tile // d_blocks % splits
    b = (tile // d_blocks // splits).to(tl.int64)
    first = split * SPLIT
    end = tl.minimum(first + SPLIT, S)
    d = d_block * D_BLOCK + tl.arange(0, D_BLOCK)
    d_mask = d < D
    if ADD:
        sums = tl.zeros((S_BLOCK, D_BLOCK), tl.float32)
        products = tl.zeros((S_BLOCK, D_BLOCK), tl.float32)
        for start in tl.range(first, end, S_BLOCK, num_stages=STAGES):
            s, _, keep = attended_block(start, end, b, lengths, mask, mask_b, S_BLOCK)
            place = (b * S + s.to(tl.int64))[:, None] * D + d[None, :]
            there = keep[:, None] & d_mask[None, :]
            x = tl.load(inner + place, mask=there, other=0.0).to(tl.float32)
            e = tl.where(there, exponential_of_tanh(x, TARGET), 0.0)
            sums += e
            if REDUCE:
                products += e * tl.load(input + place, mask=there, other=0.0).to(tl.float32)
        total = tl.sum(sums, 0)
        reduced = tl.sum(products, 0)
    if WRITE:
        if not ADD:
            total = joined(partial, b, splits, 0, 2, d, D, SPLITS)
            if REDUCE:
                reduced = joined(partial, b, splits, 1, 2, d, D, SPLITS)
        # Where nothing is attended to the sum is 0.
        inverse = tl.where(total != 0, 1.0 / total, 0.0)
        for start in tl.range(first, end, S_BLOCK, num_stages=STAGES):
            s, inside, keep = attended_block(start, end, b, lengths, mask, mask_b, S_BLOCK)
            place = (b * S + s.to(tl.int64))[:, None] * D + d[None, :]
            there = keep[:, None] & d_mask[None, :]
            x = tl.load(inner + place, mask=there, other=0.0).to(tl.float32)
            w = tl.where(there, exponential_of_tanh(x, TARGET) * inverse[None, :], 0.0)
            written = inside[:, None] & d_mask[None, :]
            tl.store(weights + place, w.to(weights.dtype.element_ty), mask=written)
            if not REDUCE:
                w *= tl.load(input + place, mask=there, other=0.0).to(tl.float32)
                tl.store(result + place, w.to(result.dtype.element_ty), mask=written)
        if REDUCE:
            tl.store(
                result + b * D + d, (reduced * inverse).to(result.dtype.element_ty), mask=if_so(d_mask, split == 0)
            )
    else:
        at = partial + (b * splits + split) * 2 * D + d
        tl.store(at, total, mask=d_mask)
        if REDUCE:
            tl.store(at + D, reduced, mask=d_mask)


@triton.jit
def weight_gradient(
    input,
    d_result,
    d_weights,
    place,
    there,
    b,
    d,
    D,
    REDUCE: tl.constexpr,
    S_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """Gradients of a block of weights, and of the result beside them."""
    d_w = tl.zeros((S_BLOCK, D_BLOCK), tl.float32)
    d_r = tl.zeros((S_BLOCK, D_BLOCK), tl.float32)
    if d_result is not None:
        if REDUCE:
            d_r += tl.load(d_result + b * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        else:
            d_r += tl.load(d_result + place, mask=there, other=0.0).to(tl.float32)
        d_w += d_r * tl.load(input + place, mask=there, other=0.0).to(tl.float32)
    if d_weights is not None:
        d_w += tl.load(d_weights + place, mask=there, other=0.0).to(tl.float32)
    return d_w, d_r


@triton.jit(do_not_specialize=["S", "SPLIT", "splits"])
def feature_bwd_kernel(
    inner,  # [B, S, D]
    input,  # [B, S, D]
    weights,  # [B, S, D]
    d_result,  # [B, S, D], or [B, D] with REDUCE; or None
    d_weights,  # [B, S, D] or None
    lengths,  # [B] or None
    mask,  # uint8 [B, S], nonzero where to attend; or None
    mask_b,
    partial,  # float32 [B, splits, D]: sums of weights times their gradients; None with both
    d_inner,  # [B, S, D]
    d_input,  # [B, S, D]
    S,
    D,
    SPLIT,
    splits,
    ADD: tl.constexpr,
    WRITE: tl.constexpr,
    REDUCE: tl.constexpr,
    SPLITS: tl.constexpr,
    S_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
):
    d_blocks = tl.cdiv(D, D_BLOCK)
    tile = tl.program_id(0)
    d_block, split = tile % d_blocks, tile // d_blocks % splits
    b = (tile // d_blocks // splits).to(tl.int64)
    first = split * SPLIT
    end = tl.minimum(first + SPLIT, S)
    d = d_block * D_BLOCK + tl.arange(0, D_BLOCK)
    d_mask = d < D
    if ADD:
        sums = tl.zeros((S_BLOCK, D_BLOCK), tl.float32)
        for start in tl.range(first, end, S_BLOCK, num_stages=STAGES):
            s, _, keep = attended_block(start, end, b, lengths, mask, mask_b, S_BLOCK)
            place = (b * S + s.to(tl.int64))[:, None] * D + d[None, :]
            there = keep[:, None] & d_mask[None, :]
            w = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
            d_w, _ = weight_gradient(input, d_result, d_weights, place, there, b, d, D, REDUCE, S_BLOCK, D_BLOCK)
            sums += w * d_w
        total = tl.sum(sums, 0)
    if WRITE:
        if not ADD:
            total = joined(partial, b, splits, 0, 1, d, D, SPLITS)
        for start in tl.range(first, end, S_BLOCK, num_stages=STAGES):
            s, inside, keep = attended_block(start, end, b, lengths, mask, mask_b, S_BLOCK)
            place = (b * S + s.to(tl.int64))[:, None] * D + d[None, :]
            there = keep[:, None] & d_mask[None, :]
            w = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
            x = tl.load(inner + place, mask=there, other=0.0).to(tl.float32)
            d_w, d_r = weight_gradient(input, d_result, d_weights, place, there, b, d, D, REDUCE, S_BLOCK, D_BLOCK)
            d_x = tl.where(there, w * (d_w - total[None, :]) * slope_of_tanh(x, TARGET), 0.0)
            written = inside[:, None] & d_mask[None, :]
            tl.store(d_inner + place, d_x.to(d_inner.dtype.element_ty), mask=written)
            tl.store(d_input + place, tl.where(there, d_r * w, 0.0).to(d_input.dtype.element_ty), mask=written)
    else:
        tl.store(partial + (b * splits + split) * D + d, total, mask=d_mask)


class _Launch(NamedTuple):
    """How [B, S, D] is shared among programs."""

    programs: int
    splits: int
    split: int
    options: dict[str, Any]

    @classmethod
    def of(cls, input: Tensor, tile: tiles.FeatureTile) -> _Launch:
        batch, source, width = input.shape
        columns = batch * triton.cdiv(width, tile.D)
        splits = max(1, min(triton.cdiv(tile.programs, columns), triton.cdiv(source, 4 * tile.S)))
        split = padded(triton.cdiv(source, splits), tile.S)
        splits = triton.cdiv(source, split)
        options = {
            "SPLITS": triton.next_power_of_2(splits),
            "S_BLOCK": tile.S,
            "D_BLOCK": tile.D,
            "STAGES": tile.stages,
            "TARGET": target(),
            "num_warps": tile.warps,
        }
        return cls(columns * splits, splits, split, options)

    def passes(self) -> list[dict[str, bool]]:
        if self.splits == 1:
            return [{"ADD": True, "WRITE": True}]
        return [{"ADD": True, "WRITE": False}, {"ADD": False, "WRITE": True}]


def weighted_fwd(
    inner: Tensor, input: Tensor, masks: Masks, reduce: bool, tile: tiles.FeatureTile = tiles.FEATURES
) -> tuple[Tensor, Tensor]:
    """weights * input, [B, S, D] or its sum over s [B, D], and the weights; 0 where not attended to."""
    batch, source, width = input.shape
    weights = torch.empty_like(input)
    result = input.new_empty(batch, width) if reduce else torch.empty_like(input)
    if input.numel() == 0:
        return result.zero_(), weights
    launch = _Launch.of(input, tile)
    partial = input.new_empty(batch, launch.splits, 2, width, dtype=torch.float32) if launch.splits > 1 else None
    with on_device(input):
        for which in launch.passes():
            feature_fwd_kernel[(launch.programs,)](
                inner,
                input,
                masks.lengths,
                masks.mask,
                masks.strides()[0],
                partial,
                weights,
                result,
                source,
                width,
                launch.split,
                launch.splits,
                REDUCE=reduce,
                **which,
                **launch.options,
            )
    return result, weights


def weighted_bwd(
    inner: Tensor,
    input: Tensor,
    weights: Tensor,
    d_result: Tensor | None,
    d_weights: Tensor | None,
    masks: Masks,
    reduce: bool,
    tile: tiles.FeatureTile = tiles.FEATURES,
) -> tuple[Tensor, Tensor]:
    """Gradients of inner, and of input where it is multiplied with the weights."""
    batch, source, width = input.shape
    d_inner, d_input = torch.empty_like(input), torch.empty_like(input)
    if input.numel() == 0:
        return d_inner, d_input
    launch = _Launch.of(input, tile)
    partial = input.new_empty(batch, launch.splits, width, dtype=torch.float32) if launch.splits > 1 else None
    with on_device(input):
        for which in launch.passes():
            feature_bwd_kernel[(launch.programs,)](
                inner,
                input,
                weights,
                d_result,
                d_weights,
                masks.lengths,
                masks.mask,
                masks.strides()[0],
                partial,
                d_inner,
                d_input,
                source,
                width,
                launch.split,
                launch.splits,
                REDUCE=reduce,
                **which,
                **launch.options,
            )
    return d_inner, d_input


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, mask: Tensor | None) -> Masks:
    expect_rank("input", input, "[B, S, D]")
    expect_served("input", input)
    width = input.shape[2]
    expect_shape("weight", weight, f"[D, D] with D={width} (from input)", (width, width))
    expect_dtype("weight", weight, input, source="input")
    if bias is not None:
        expect_shape("bias", bias, f"[D] with D={width} (from input)", (width,))
        expect_dtype("bias", bias, input, source="input")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    return masks_of(input.shape[0], 1, input.shape[1], input, lengths, mask)


def feature_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    reduce: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """weights * input, [B, S, D] or its sum over s [B, D]; the weights; with `keep` what tanh was taken of, of which
    backward has the slope in all its digits. 0 where not attended to; what stands there may be anything."""
    masks = _check(input, weight, bias, lengths, mask)
    input = input.contiguous()
    inner = F.linear(input, weight, bias)
    result, weights = weighted_fwd(inner, input, masks, reduce)
    return result, weights, inner if keep else input.new_empty(0)


def feature_bwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    tangents: Tensor,
    d_result: Tensor | None,
    d_weights: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    reduce: bool,
    need_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input (empty unless needed), weight and bias (empty without one). tangents: what forward kept."""
    masks = _check(input, weight, bias, lengths, mask)
    batch, _, width = input.shape
    shape = (batch, width) if reduce else input.shape
    given = [("weights", weights, input.shape), ("tangents", tangents, input.shape)]
    if d_result is not None:
        given.append(("d_result", d_result, torch.Size(shape)))
    if d_weights is not None:
        given.append(("d_weights", d_weights, input.shape))
    for name, t, expected in given:
        expect_shape(name, t, str(list(expected)), expected)
        expect_dtype(name, t, input, source="input")
    input = input.contiguous()
    d_inner, d_input = weighted_bwd(
        tangents.contiguous(),
        input,
        weights.contiguous(),
        None if d_result is None else d_result.contiguous(),
        None if d_weights is None else d_weights.contiguous(),
        masks,
        reduce,
    )
    rows, by_column = input.flatten(0, 1), d_inner.flatten(0, 1).t()
    d_weight = contained(by_column.unsqueeze(0), rows.unsqueeze(0))[0] if masks.hide else by_column @ rows
    if need_input:
        d_input = torch.addmm(d_input.flatten(0, 1), by_column.t(), weight).view_as(input)
    d_bias = input.new_empty(0) if bias is None else d_inner.sum((0, 1))
    return d_input if need_input else input.new_empty(0), d_weight, d_bias
