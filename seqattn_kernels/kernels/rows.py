"""From scores to weights, a row at a time: mask, then softmax, sparsemax or entmax-1.5; and back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sparsemax_row(x, keep):
    """Martins, Astudillo, 2016: (x - tau)_+ with sum 1. tau by Newton's method, from below: finitely many steps."""
    tau = tl.max(x, 0) - 1.0
    before = tau - 1.0
    while tau > before:
        support = keep & (x > tau)
        count = tl.sum(support.to(tl.float32), 0)
        before = tau
        tau = before + (tl.sum(tl.where(support, x - before, 0.0), 0) - 1.0) / count
    return tl.maximum(x - tau, 0.0)


@triton.jit
def entmax15_row(x, keep):
    """Peters, Niculae, Martins, 2019: (x / 2 - tau)_+^2 with sum 1. tau by Newton's method, from below."""
    x = 0.5 * x
    tau = tl.max(x, 0) - 1.0
    before = tau - 1.0
    while tau > before:
        rest = tl.where(keep, tl.maximum(x - tau, 0.0), 0.0)
        before = tau
        tau = before + (tl.sum(rest * rest, 0) - 1.0) / (2.0 * tl.sum(rest, 0))
    rest = tl.maximum(x - tau, 0.0)
    return rest * rest


@triton.jit(do_not_specialize=["T"])
def normalize_fwd_kernel(
    scores,  # [B, T, S]
    weights,  # [B, T, S], may be the scores themselves
    lengths,  # [B] or None
    mask,  # element (b, t, s) at b * mask_b + t * mask_t + s: uint8, nonzero where to attend, or added; or None
    mask_b,
    mask_t,
    T,
    S,
    KIND: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    s = tl.arange(0, BLOCK)
    inside = s < S
    keep = inside
    if lengths is not None:
        keep = keep & (s < tl.load(lengths + b))
    x = tl.load(scores + row * S + s, mask=keep, other=float("-inf")).to(tl.float32)
    if mask is not None:
        at = mask + b * mask_b + (row % T) * mask_t + s
        if ADDED:
            bias = tl.load(at, mask=keep, other=float("-inf")).to(tl.float32)
            keep = keep & (bias != float("-inf"))
            x += bias
        else:
            keep = keep & (tl.load(at, mask=keep, other=0) != 0)
    x = tl.where(keep, x, float("-inf"))
    top = tl.max(x, 0)
    x -= top
    if KIND == "softmax":
        p = tl.exp(x)
        p /= tl.sum(tl.where(keep, p, 0.0), 0)
    elif KIND == "sparsemax":
        p = sparsemax_row(x, keep)
    else:
        p = entmax15_row(x, keep)
    tl.store(weights + row * S + s, tl.where(keep, p, 0.0).to(weights.dtype.element_ty), mask=inside)


@triton.jit
def normalize_bwd_kernel(
    weights,  # [R, S]
    d_weights,  # [R, S] or None
    d_weights_too,  # [R, S], added; or None
    d_scores,  # [R, S], may be one of the gradients
    S,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * S
    s = tl.arange(0, BLOCK)
    inside = s < S
    w = tl.load(weights + row + s, mask=inside, other=0.0).to(tl.float32)
    d = tl.zeros((BLOCK,), tl.float32)
    if d_weights is not None:
        d += tl.load(d_weights + row + s, mask=inside, other=0.0).to(tl.float32)
    if d_weights_too is not None:
        d += tl.load(d_weights_too + row + s, mask=inside, other=0.0).to(tl.float32)
    d = tl.where(w != 0, d, 0.0)
    if KIND == "softmax":
        d = w * (d - tl.sum(w * d, 0))
    else:
        share = (w > 0).to(tl.float32)
        if KIND == "entmax15":
            share = tl.sqrt(w)
        d = share * (d - tl.sum(share * d, 0) / tl.maximum(tl.sum(share, 0), 1e-30))
    tl.store(d_scores + row + s, d.to(d_scores.dtype.element_ty), mask=inside)
