"""Scores of self-attentive pooling: v @ tanh(inner), for a few rows of v; tanh is never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.checks import expect_dtype, expect_rank, expect_served, expect_shape
from seqattn_kernels.kernels.launch import on_device, padded, precision_of, target
from seqattn_kernels.kernels.scores import tanh


@triton.jit(do_not_specialize=["S", "R"])
def pool_fwd_kernel(
    inner,  # [B, S, A]
    v,  # [R, A]
    scores,  # [B, R, S]
    S,
    A,
    R,
    R_BLOCK: tl.constexpr,  # power of two, at least R and 16
    S_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):
    s_blocks = tl.cdiv(S, S_BLOCK)
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    s = tl.program_id(0) % s_blocks * S_BLOCK + tl.arange(0, S_BLOCK)
    r = tl.arange(0, R_BLOCK)
    rows = inner + (b * S + s.to(tl.int64))[:, None] * A
    acc = tl.zeros((S_BLOCK, R_BLOCK), tl.float32)
    for first in range(0, A, A_BLOCK):
        a = first + tl.arange(0, A_BLOCK)
        x = tl.load(rows + a[None, :], mask=(s < S)[:, None] & (a < A)[None, :], other=0.0)
        w = tl.load(v + r[None, :] * A + a[:, None], mask=(r < R)[None, :] & (a < A)[:, None], other=0.0)
        acc = tl.dot(tanh(x.to(tl.float32)).to(w.dtype), w, acc, input_precision=precision_of(TARGET))
    place = scores + b * R * S + r[None, :] * S + s[:, None]
    tl.store(place, acc.to(scores.dtype.element_ty), mask=(s < S)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["S", "R", "SPLIT"])
def pool_bwd_kernel(
    d_scores,  # [B, R, S]
    inner,  # [B, S, A]
    v,  # [R, A]
    d_inner,  # [B, S, A]
    partial,  # float32 [B, splits, R, A]: gradients of v
    S,
    A,
    R,
    SPLIT,  # steps of a program
    R_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):
    a_blocks, splits = tl.cdiv(A, A_BLOCK), tl.cdiv(S, SPLIT)
    tile = tl.program_id(0)
    a_block, split = tile % a_blocks, tile // a_blocks % splits
    b = (tile // a_blocks // splits).to(tl.int64)
    a = a_block * A_BLOCK + tl.arange(0, A_BLOCK)
    r = tl.arange(0, R_BLOCK)
    of_v = (r < R)[:, None] & (a < A)[None, :]
    w = tl.load(v + r[:, None] * A + a[None, :], mask=of_v, other=0.0)
    acc = tl.zeros((R_BLOCK, A_BLOCK), tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, S), S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        there = (s < S)[:, None] & (a < A)[None, :]
        place = (b * S + s.to(tl.int64))[:, None] * A + a[None, :]
        t = tanh(tl.load(inner + place, mask=there, other=0.0).to(tl.float32))
        g = tl.load(
            d_scores + b * R * S + r[:, None] * S + s[None, :], mask=(r < R)[:, None] & (s < S)[None, :], other=0.0
        )
        acc = tl.dot(g, t.to(g.dtype), acc, input_precision=precision_of(TARGET))
        d_x = tl.dot(tl.trans(g), w, input_precision=precision_of(TARGET)) * (1.0 - t * t)
        tl.store(d_inner + place, d_x.to(d_inner.dtype.element_ty), mask=there)
    tl.store(partial + (b * splits + split) * R * A + r[:, None] * A + a[None, :], acc, mask=of_v)


def _check(inner: Tensor, v: Tensor) -> None:
    expect_rank("inner", inner, "[B, S, A]")
    expect_served("inner", inner)
    expect_rank("v", v, "[R, A]")
    expect_shape("v", v, f"[R, A] with A={inner.shape[2]} (from inner)", (v.shape[0], inner.shape[2]))
    expect_dtype("v", v, inner, source="inner")


def _rows(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


def pool_fwd(inner: Tensor, v: Tensor, tile: tiles.PoolTile = tiles.POOL) -> Tensor:
    """Scores [B, R, S] of inner [B, S, A] and v [R, A]."""
    _check(inner, v)
    inner = inner.contiguous()
    batch, source, width = inner.shape
    found = [inner.new_empty(batch, part.shape[0], source) for part in v.split(tile.R)]
    with on_device(inner):
        for scores, part in zip(found, v.split(tile.R), strict=True):
            if scores.numel():
                pool_fwd_kernel[(batch * triton.cdiv(source, tile.S),)](
                    inner,
                    part.contiguous(),
                    scores,
                    source,
                    width,
                    part.shape[0],
                    R_BLOCK=_rows(part.shape[0]),
                    S_BLOCK=tile.S,
                    A_BLOCK=tile.A,
                    TARGET=target(),
                    num_warps=tile.warps,
                )
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def pool_bwd(d_scores: Tensor, inner: Tensor, v: Tensor, tile: tiles.PoolTile = tiles.POOL) -> tuple[Tensor, Tensor]:
    """Gradients of inner and v."""
    _check(inner, v)
    batch, source, width = inner.shape
    expect_shape("d_scores", d_scores, "[B, R, S], the shape of the scores", (batch, v.shape[0], source))
    expect_dtype("d_scores", d_scores, inner, source="inner")
    if inner.numel() == 0 or v.numel() == 0:
        return torch.zeros_like(inner), torch.zeros_like(v)
    inner = inner.contiguous()
    columns = batch * triton.cdiv(width, tile.A)
    splits = min(triton.cdiv(tile.programs, columns), triton.cdiv(source, tile.S))
    split = padded(triton.cdiv(source, splits), tile.S)
    splits = triton.cdiv(source, split)
    of_inner, of_v = [], []
    with on_device(inner):
        for g, part in zip(d_scores.split(tile.R, 1), v.split(tile.R), strict=True):
            of_inner.append(torch.empty_like(inner))
            partial = inner.new_empty(batch * splits, *part.shape, dtype=torch.float32)
            pool_bwd_kernel[(columns * splits,)](
                g.contiguous(),
                inner,
                part.contiguous(),
                of_inner[-1],
                partial,
                source,
                width,
                part.shape[0],
                split,
                R_BLOCK=_rows(part.shape[0]),
                S_BLOCK=tile.S,
                A_BLOCK=tile.A,
                TARGET=target(),
                num_warps=tile.warps,
            )
            of_v.append(partial.sum(0).to(v.dtype))
    return (of_inner[0], of_v[0]) if len(of_v) == 1 else (torch.stack(of_inner).sum(0), torch.cat(of_v))
