"""From scores to weights, a row at a time: masks, then softmax, sparsemax, entmax-1.5 or sigmoid; and back."""

from __future__ import annotations

import triton
import triton.language as tl


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
        if FILLED:
            p = tl.where(tl.max(free.to(tl.int32), 0) > 0, p, 0.0)
        else:
            p = tl.where(free, p, 0.0)
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
    d *= factor
    if lengths is not None or mask is not None:
        _, free, _ = visible(s, S, row // T, row % T, lengths, mask, mask_b, mask_t, ADDED)
        d = tl.where(free, d, 0.0)
    tl.store(d_scores + place + s, d.to(d_scores.dtype.element_ty), mask=inside)
