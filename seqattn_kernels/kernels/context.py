"""Weights times values, where a value without weight contributes nothing, whatever it holds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels.launch import on_device


@triton.jit(do_not_specialize=["T", "S", "weights_b", "values_b"])
def contain_kernel(
    weights,  # element (b, t, s) at b * weights_b + t * weights_t + s * weights_s
    values,  # element (b, s, d) at b * values_b + s * values_s + d * values_d
    out,  # [B, T, D]: their product, of which what is not finite is computed again
    T,
    S,
    D,
    weights_b,
    weights_t,
    weights_s,
    values_b,
    values_s,
    values_d,
    T_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    t_blocks, d_blocks = tl.cdiv(T, T_BLOCK), tl.cdiv(D, D_BLOCK)
    tile = tl.program_id(0)
    d_block, t_block = tile % d_blocks, tile // d_blocks % t_blocks
    b = (tile // d_blocks // t_blocks).to(tl.int64)
    t = t_block * T_BLOCK + tl.arange(0, T_BLOCK)
    d = d_block * D_BLOCK + tl.arange(0, D_BLOCK)
    there = (t < T)[:, None] & (d < D)[None, :]
    place = out + (b * T + t.to(tl.int64))[:, None] * D + d[None, :]
    found = tl.load(place, mask=there, other=0.0).to(tl.float32)
    spoiled = tl.where(tl.abs(found) < float("inf"), 0, 1)
    if tl.max(tl.max(spoiled, 1), 0) > 0:
        by_query = weights + b * weights_b + t.to(tl.int64) * weights_t
        by_column = values + b * values_b + d.to(tl.int64) * values_d
        acc = tl.zeros((T_BLOCK, D_BLOCK), tl.float32)
        for _ in range(0, S):
            w = tl.load(by_query, mask=t < T, other=0.0).to(tl.float32)[:, None]
            x = tl.load(by_column, mask=d < D, other=0.0).to(tl.float32)[None, :]
            acc += tl.where(w != 0, w * x, 0.0)
            by_query += weights_s
            by_column += values_s
        tl.store(place, tl.where(spoiled != 0, acc, found).to(out.dtype.element_ty), mask=there)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result, whatever the inputs."""
    if a.dtype == b.dtype == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def contained(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B, T, S] @ values [B, S, D], both of one dtype; what has no weight contributes nothing, NaN included.

    The product is torch's. A value that is not finite leaves its mark there, so only what bears one is looked at again:
    no copy of the values is made without those, and none of them is read twice.
    """
    out = torch.bmm(weights, values)
    if out.numel() == 0 or weights.shape[2] == 0:
        return out
    batch, steps, depth = out.shape
    rows, columns = 16, 64
    with on_device(out):
        contain_kernel[(batch * triton.cdiv(steps, rows) * triton.cdiv(depth, columns),)](
            weights,
            values,
            out,
            steps,
            weights.shape[2],
            depth,
            *weights.stride(),
            *values.stride(),
            T_BLOCK=rows,
            D_BLOCK=columns,
            num_warps=4,
        )
    return out
