"""From scores to weights, a row at a time: masks, then softmax, sparsemax, entmax-1.5 or sigmoid; and back."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels.launch import EVERYTHING, Masks, on_device


@triton.jit
def sparsemax_row(x):
    """Martins, Astudillo, 2016: (x - tau)_+ with sum 1; x is at most 0. tau by Newton's method, from below: the sum is
    piecewise linear, so that finitely many steps end at the exact one."""
    tau = -1.0
    before = -2.0
    while tau > before:
        support = x > tau
        before = tau
        excess = tl.sum(tl.where(support, x - before, 0.0), 0) - 1.0
        tau = before + excess / tl.sum(support.to(tl.float32), 0)
    return tl.where(x > tau, x - tau, 0.0)


@triton.jit
def entmax15_row(x):
    """Peters, Niculae, Martins, 2019: (x / 2 - tau)_+^2 with sum 1; x is at most 0. tau by Newton's method, from
    below: the sum is convex, so that steps grow shorter until rounding ends them."""
    x = 0.5 * x
    tau = -1.0
    before = -2.0
    while tau > before:
        rest = tl.where(x > tau, x - tau, 0.0)
        before = tau
        tau = before + (tl.sum(rest * rest, 0) - 1.0) / (2.0 * tl.sum(rest, 0))
    rest = tl.where(x > tau, x - tau, 0.0)
    return rest * rest


@triton.jit
def visible(s, S, b, t, lengths, mask, mask_b, mask_t, ADDED: tl.constexpr):
    """Which keys lengths and a boolean mask leave, which of them an added mask leaves, and that mask."""
    shown = s < S
    if lengths is not None:
        shown = shown & (s < tl.load(lengths + b))
    free = shown
    bias = tl.zeros(s.shape, tl.float32)
    if mask is not None:
        at = mask + b * mask_b + t * mask_t + s
        if ADDED:
            bias = tl.load(at, mask=s < S, other=0.0).to(tl.float32)
            free = shown & (bias != float("-inf"))
        else:
            shown = shown & (tl.load(at, mask=s < S, other=0) != 0)
            free = shown
    return shown, free, bias


@triton.jit(do_not_specialize=["T", "scale", "temperature", "fill"])
def normalize_fwd_kernel(
    scores,  # [B, T, S]
    weights,  # [B, T, S], may be the scores themselves
    lengths,  # [B] or None
    mask,  # element (b, t, s) at b * mask_b + t * mask_t + s: uint8, nonzero where to attend, or added; or None
    mask_b,
    mask_t,
    T,
    S,
    scale,
    temperature,
    fill,
    KIND: tl.constexpr,
    ADDED: tl.constexpr,
    SCALED: tl.constexpr,  # scale or temperature is not 1
    FILLED: tl.constexpr,  # fill is not -inf
    ZERO_EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK)
    inside = s < S
    shown, free, bias = visible(s, S, row // T, row % T, lengths, mask, mask_b, mask_t, ADDED)
    x = tl.load(scores + row * S + s, mask=free, other=float("-inf")).to(tl.float32)
    if SCALED:
        x *= scale
    if ADDED:
        x += bias
    x = tl.where(free, x, float("-inf"))
    if FILLED:
        x = tl.where(inside & (shown == 0), fill, x)
    if SCALED:
        x /= temperature
    if KIND == "sigmoid":
        p = 1.0 / (1.0 + tl.exp(-x))
    else:
        x -= tl.max(x, 0)
        # Maxima and comparisons lose a NaN, sums don't.
        spread = tl.sum(tl.where(inside & (x != x), x, 0.0), 0)
        if KIND == "softmax":
            p = tl.where(inside, tl.exp(x), 0.0)
            p /= tl.sum(p, 0)
        elif KIND == "sparsemax":
            p = sparsemax_row(x) + spread
        else:
            p = entmax15_row(x) + spread
    if ZERO_EMPTY:
        some = free
        if FILLED:
            some = tl.max(free.to(tl.int32), 0) > 0
        p = tl.where(some, p, 0.0)
    tl.store(weights + row * S + s, p.to(weights.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "factor"])
def normalize_bwd_kernel(
    weights,  # [B, T, S]
    d_weights,  # [B, T, S] or None
    d_weights_too,  # [B, T, S], added; or None
    d_scores,  # [B, T, S], may be one of the gradients
    lengths,
    mask,
    mask_b,
    mask_t,
    T,
    S,
    factor,
    KIND: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = row * S
    s = tl.arange(0, BLOCK)
    inside = s < S
    w = tl.load(weights + place + s, mask=inside, other=0.0).to(tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    if d_weights is not None:
        d += tl.load(d_weights + place + s, mask=inside, other=0.0).to(tl.float32)
    if d_weights_too is not None:
        d += tl.load(d_weights_too + place + s, mask=inside, other=0.0).to(tl.float32)
    d = tl.where(w != 0, d, 0.0)
    if KIND == "softmax":
        d = w * (d - tl.sum(w * d, 0))
    elif KIND == "sigmoid":
        d = w * (1.0 - w) * d
    else:
        share = (w > 0).to(tl.float32)
        if KIND == "entmax15":
            share = tl.sqrt(w)
        d = share * (d - tl.sum(share * d, 0) / tl.maximum(tl.sum(share, 0), 1e-30))
        d = tl.where(w == w, d, w)
    # Where a row is NaN, what has no weight has no gradient still.
    d = tl.where(w != 0, d * factor, 0.0)
    if lengths is not None or mask is not None:
        _, free, _ = visible(s, S, row // T, row % T, lengths, mask, mask_b, mask_t, ADDED)
        d = tl.where(free, d, 0.0)
    tl.store(d_scores + place + s, d.to(d_scores.dtype.element_ty), mask=inside)


ROW_LIMIT = 1 << 17  # keys a row kernel holds in registers


def _row_block(source: int) -> tuple[int, int]:
    block = triton.next_power_of_2(max(source, 1))
    if block > ROW_LIMIT:
        raise ValueError(f"keys: expected at most {ROW_LIMIT} of them in the Triton row kernels, got {source}")
    return block, max(1, min(32, block // 512))


def normalize_fwd(
    kind: str,
    scores: Tensor,
    weights: Tensor,
    masks: Masks = EVERYTHING,
    scale: float = 1.0,
    temperature: float = 1.0,
    fill: float = -math.inf,
    zero_empty: bool = True,
) -> Tensor:
    """Weights of scores [B, T, S], written to `weights`, which may be the scores themselves.

    ``kind`` of ``(scale * scores + mask) / temperature``, with `fill` where lengths or a boolean mask hide a key.
    """
    _, steps, source = scores.shape
    if scores.numel():
        block, warps = _row_block(source)
        with on_device(scores):
            normalize_fwd_kernel[(scores.shape[0] * steps,)](
                scores,
                weights,
                masks.lengths,
                masks.mask,
                *masks.strides(),
                steps,
                source,
                float(scale),
                float(temperature),
                float(fill),
                KIND=kind,
                ADDED=masks.added,
                SCALED=scale != 1 or temperature != 1,
                FILLED=fill != -math.inf,
                ZERO_EMPTY=zero_empty,
                BLOCK=block,
                num_warps=warps,
            )
    return weights


def normalize_bwd(
    kind: str,
    weights: Tensor,
    d_weights: Tensor | None,
    d_weights_too: Tensor | None,
    d_scores: Tensor,
    masks: Masks = EVERYTHING,
    factor: float = 1.0,
) -> Tensor:
    """`factor` times the gradient of what was normalised, [B, T, S], from that of the weights; 0 at hidden keys.

    Written to `d_scores`, which may be a gradient. `masks` is needed only where hidden keys have weight.
    """
    _, steps, source = weights.shape
    if weights.numel():
        block, warps = _row_block(source)
        with on_device(weights):
            normalize_bwd_kernel[(weights.shape[0] * steps,)](
                weights,
                d_weights,
                d_weights_too,
                d_scores,
                masks.lengths,
                masks.mask,
                *masks.strides(),
                steps,
                source,
                float(factor),
                KIND=kind,
                ADDED=masks.added,
                BLOCK=block,
                num_warps=warps,
            )
    return d_scores
