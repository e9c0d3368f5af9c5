"""Monotonic alignment (Raffel et al., 2017): where attention stands after each step, and gradients.

With q[s] = (1 - p[s - 1]) * q[s - 1] + previous[s], the probability that attention comes by key s, the weights of a
step are p[s] * q[s], and they are `previous` of the next. Steps follow each other; within one, the recurrence over keys
is a scan of affine maps: products of factors in [0, 1] and sums, no quotient, whatever the length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels.checks import expect_dtype, expect_rank, expect_shape
from seqattn_kernels.kernels.launch import on_device


@triton.jit
def then(a, b, c, d):
    """x -> a x + b, then x -> c x + d."""
    return a * c, b * c + d


@triton.jit
def come_by(choose, stands, s, first, carried, S, BLOCK: tl.constexpr):
    """p and q of the keys s of a block that begins at `first`, and what passes its last key; `carried` came to it."""
    p = tl.load(choose + s, mask=s < S, other=0.0)
    before = tl.load(choose + s - 1, mask=(s > first) & (s < S), other=0.0)
    start = tl.load(stands + s, mask=s < S, other=0.0)
    factor, q = tl.associative_scan((1.0 - before, start), 0, then)
    q += factor * carried
    return p, q, tl.sum(tl.where(s == first + BLOCK - 1, (1.0 - p) * q, 0.0), 0)


@triton.jit
def monotonic_fwd_kernel(
    choose,  # [B, T, S]
    previous,  # [B, S]
    weights,  # [B, T, S]
    T,
    S,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    choose += b * T * S
    weights += b * T * S
    stands = previous + b * S
    for _ in range(0, T):
        carried = 0.0  # what passes the keys before the block
        for first in range(0, S, BLOCK):
            s = first + tl.arange(0, BLOCK)
            p, q, carried = come_by(choose, stands, s, first, carried, S, BLOCK)
            tl.store(weights + s, p * q, mask=s < S)
        # Other threads of this program may read what was stored here.
        tl.debug_barrier()
        stands = weights
        choose += S
        weights += S


@triton.jit
def monotonic_bwd_kernel(
    choose,  # [B, T, S]
    previous,  # [B, S]
    weights,  # [B, T, S]
    d_weights,  # [B, T, S]
    d_choose,  # [B, T, S]; holds q until the gradient takes its place
    d_previous,  # [B, S]: gradient of what stands at key s, from the steps after
    d_beyond,  # [B, S]: the same at key s + 1
    T,
    S,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    end = (b + 1) * T * S
    choose += end
    weights += end
    d_weights += end
    d_choose += end
    previous += b * S
    d_previous += b * S
    d_beyond += b * S
    blocks = tl.cdiv(S, BLOCK)
    for i in range(0, T):
        choose -= S
        weights -= S
        d_weights -= S
        d_choose -= S
        stands = tl.where(i == T - 1, previous, weights - S)
        carried = 0.0
        for first in range(0, S, BLOCK):
            s = first + tl.arange(0, BLOCK)
            _, q, carried = come_by(choose, stands, s, first, carried, S, BLOCK)
            tl.store(d_choose + s, q, mask=s < S)
        tl.debug_barrier()
        # Gradients of what goes on from key s, y[s] = g[s + 1] p[s + 1] + (1 - p[s + 1]) y[s + 1], where g[s] is that
        # of the weight. All of the next key is read from memory: nothing is handed from thread to thread but y.
        carried = 0.0
        for block in range(0, blocks):
            first = (blocks - 1 - block) * BLOCK
            s = first + tl.arange(0, BLOCK)
            inside, next_inside = s < S, s + 1 < S
            p = tl.load(choose + s, mask=inside, other=0.0)
            q = tl.load(d_choose + s, mask=inside, other=0.0)
            g = tl.load(d_weights + s, mask=inside, other=0.0)
            next_p = tl.load(choose + s + 1, mask=next_inside, other=0.0)
            next_g = tl.load(d_weights + s + 1, mask=next_inside, other=0.0)
            if i > 0:
                g += tl.load(d_previous + s, mask=inside, other=0.0)
                next_g += tl.load(d_beyond + s, mask=inside, other=0.0)
            factor, y = tl.associative_scan((1.0 - next_p, next_g * next_p), 0, then, reverse=True)
            y += factor * carried
            comes = g * p + (1.0 - p) * y
            tl.store(d_choose + s, (g - y) * q, mask=inside)
            tl.store(d_previous + s, comes, mask=inside)
            tl.store(d_beyond + s, y, mask=inside)
            carried = tl.sum(tl.where(s == first, y, 0.0), 0)
        tl.debug_barrier()


LARGEST_BLOCK = 1024  # keys a program scans at a time


def _block(source: int) -> tuple[int, int]:
    """Keys of a block, and warps."""
    block = min(LARGEST_BLOCK, triton.next_power_of_2(max(source, 32)))
    return block, max(1, block // 256)


def _check(choose: Tensor, previous: Tensor) -> None:
    expect_rank("choose", choose, "[B, T, S]")
    if choose.dtype != torch.float32:
        raise TypeError(f"choose: expected torch.float32, got {choose.dtype}")
    batch, _, source = choose.shape
    expect_shape("previous", previous, f"[B, S] with B={batch}, S={source} (from choose)", (batch, source))
    expect_dtype("previous", previous, choose, source="choose")


def monotonic_fwd(choose: Tensor, previous: Tensor) -> Tensor:
    """Weights [B, T, S] from the probabilities of stopping and from where attention stood before, [B, S]."""
    _check(choose, previous)
    choose, previous = choose.contiguous(), previous.contiguous()
    weights = torch.empty_like(choose)
    if choose.numel():
        batch, steps, source = choose.shape
        block, warps = _block(source)
        with on_device(choose):
            monotonic_fwd_kernel[(batch,)](choose, previous, weights, steps, source, BLOCK=block, num_warps=warps)
    return weights


def monotonic_bwd(choose: Tensor, previous: Tensor, weights: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of choose and previous."""
    _check(choose, previous)
    for name, t in (("weights", weights), ("d_weights", d_weights)):
        expect_shape(name, t, f"the shape of choose, {list(choose.shape)}", choose.shape)
        expect_dtype(name, t, choose, source="choose")
    choose, previous = choose.contiguous(), previous.contiguous()
    if choose.numel() == 0:
        return torch.zeros_like(choose), torch.zeros_like(previous)
    d_choose, d_previous, d_beyond = torch.empty_like(choose), torch.empty_like(previous), torch.empty_like(previous)
    batch, steps, source = choose.shape
    block, warps = _block(source)
    with on_device(choose):
        monotonic_bwd_kernel[(batch,)](
            choose,
            previous,
            weights.contiguous(),
            d_weights.contiguous(),
            d_choose,
            d_previous,
            d_beyond,
            steps,
            source,
            BLOCK=block,
            num_warps=warps,
        )
    return d_choose, d_previous
