"""Exponentials of queries and keys in the order the score kernels read them, with their range.

Blocked layout: [B, blocks of BLOCK rows, AP, BLOCK], so that a kernel reads a column of its block with constant
offsets. AP is A padded to a multiple of UNROLL. Rows past N, and keys no query attends to, hold e^0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels.launch import padded, rows_of

ROWS = tl.constexpr(32)  # rows that share an entry in the table of ranges


@triton.jit
def exp_of_double(x):
    """e^2x, |2x| at most 64, within two roundings: the product with log2(e) is carried in two parts."""
    high = x * 2.8853900817779268
    low = tl.fma(x, 2.8853900817779268, -high) + x * 3.8519226e-08
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def scaled_v(v, largest):
    """v / largest, away from zero by 2^-30: that much of the largest v changes no rounding of a sum."""
    w = v / tl.where(largest > 0, largest, 1.0)
    return tl.where(w < 0, tl.minimum(w, -9.313225746154785e-10), tl.maximum(w, 9.313225746154785e-10))


@triton.jit
def coefficient_count(AP, UNROLL):
    return AP // UNROLL * (UNROLL + 1) + AP + 1


@triton.jit(do_not_specialize=["N", "NP", "heads"])
def exponentials_kernel(
    x,  # [B, N, A]
    v,  # [H, A], row b % H: exponentials are divided by v, scaled, and the coefficients written; or None
    out,  # float32 [B, NP / BLOCK, AP, BLOCK], NP >= N
    coefficients,  # float32, for each row of v: see `scores_fwd_kernel`
    ranges,  # float32 [B, NP / 32, 2]: largest and least x of each 32 rows
    tops,  # float32 [B, NP / 32, AP]: largest x of each column of 32 rows; or None
    lengths,  # [B] or None: rows past it are not looked at
    used,  # uint8 [B, N] or None: likewise rows of zero
    N,
    NP,
    A,
    AP,
    heads,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    V_COLUMNS: tl.constexpr,  # power of two, at least AP
    COLUMNS: tl.constexpr,
    SIDE_ROWS: tl.constexpr = ROWS,
    PAD: tl.constexpr = 2**-16,
):
    side_blocks = NP // SIDE_ROWS
    b = (tl.program_id(0) // side_blocks).to(tl.int64)
    first = tl.program_id(0) % side_blocks * SIDE_ROWS
    n = first + tl.arange(0, SIDE_ROWS)
    valid = n < N
    if lengths is not None:
        valid = valid & (n < tl.load(lengths + b))
    if used is not None:
        valid = valid & (tl.load(used + b * N + n, mask=valid, other=0) != 0)
    largest = 1.0
    if v is not None:
        v += b % heads * A
        all_a = tl.arange(0, V_COLUMNS)
        all_v = tl.load(v + all_a, mask=all_a < A, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(all_v), 0)
        if (first == 0) & (b < heads):
            coefficients += b * coefficient_count(AP, UNROLL)
            # What pads A adds a half of it and takes it away again.
            w = tl.where(all_a < A, scaled_v(all_v, largest), PAD)
            inverse = 1.0 / w
            # What is not finite must not enter the merged forms.
            finite = tl.sum(tl.where(tl.abs(all_v) < float("inf"), 0, 1), 0) == 0
            groups: tl.constexpr = V_COLUMNS // UNROLL
            stride: tl.constexpr = UNROLL + 1
            tl.store(coefficients + all_a // UNROLL * stride + all_a % UNROLL, inverse, mask=all_a < AP)
            group = tl.arange(0, groups)
            half = 0.5 * tl.sum(tl.reshape(w, (groups, UNROLL)), 1)
            tl.store(coefficients + group * stride + UNROLL, half, mask=group < AP // UNROLL)
            end = coefficients + AP // UNROLL * stride
            bits = tl.where(finite, tl.log2(tl.abs(inverse)), float("inf"))
            tl.store(end + all_a, bits, mask=all_a < AP)
            tl.store(end + AP, largest)
    base = out + b * NP * AP + (first // BLOCK).to(tl.int64) * AP * BLOCK
    most = tl.full((SIDE_ROWS,), float("-inf"), tl.float32)
    least = tl.full((SIDE_ROWS,), float("inf"), tl.float32)
    row = n.to(tl.int64) * A
    inside = (n // BLOCK - first // BLOCK) * AP * BLOCK + n % BLOCK
    for start in range(0, AP, COLUMNS):
        a = start + tl.arange(0, COLUMNS)
        there = valid[:, None] & (a < A)[None, :]
        block = tl.load(x + b * N * A + row[:, None] + a[None, :], mask=there, other=0.0).to(tl.float32)
        above = tl.where(there, block, float("-inf"))
        if tops is not None:
            tl.store(tops + tl.program_id(0).to(tl.int64) * AP + a, tl.max(above, 0), mask=a < AP)
        most = tl.maximum(most, tl.max(above, 1))
        least = tl.minimum(least, tl.min(tl.where(there, block, float("inf")), 1))
        # Past this the kernels take the direct form; nothing here may overflow.
        e = exp_of_double(tl.minimum(tl.maximum(block, -32.0), 32.0))
        e = tl.where(block == block, e, block)
        if v is not None:
            column = tl.load(v + a, mask=a < A, other=0.0).to(tl.float32)
            e = e / tl.where(a < A, scaled_v(column, largest), PAD)[None, :]
        tl.store(base + inside[:, None] + a[None, :] * BLOCK, e, mask=(a < AP)[None, :] & (n < NP)[:, None])
    entry = ranges + tl.program_id(0) * 2
    tl.store(entry, tl.max(most, 0))
    tl.store(entry + 1, tl.min(least, 0))


@triton.jit
def range_of(ranges, count, FIRST, SIZE: tl.constexpr):
    """Largest and least of `count` entries from FIRST on; SIZE is a power of two and at least `count`."""
    i = tl.arange(0, SIZE)
    there = i < count
    most = tl.max(tl.load(ranges + (FIRST + i) * 2, mask=there, other=float("-inf")), 0)
    least = tl.min(tl.load(ranges + (FIRST + i) * 2 + 1, mask=there, other=float("inf")), 0)
    return most, least


@triton.jit
def bits_of(x):
    """log2(1 + e^2x)"""
    z = 2.8853900817779268 * x
    return tl.maximum(z, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(z)))


@triton.jit
def form_of(q_most, q_least, k_most, k_least, exponent):
    """Which form serves a tile: 0 merged, 1 bounded, 2 direct. 2^exponent is the largest product that merging makes."""
    q_size = tl.maximum(tl.maximum(q_most, -q_least), 0.0)
    k_size = tl.maximum(tl.maximum(k_most, -k_least), 0.0)
    # 1 - 2 / x has an absolute error of a rounding: too large where every tanh is small.
    merged = (q_size <= 32.0) & (k_size <= 32.0) & (exponent < float("inf")) & (q_size + k_size > 0.03125)
    return tl.where(merged, tl.where(exponent <= 125.0, 0, 1), 2)


_SIDE_ROWS = ROWS.value
UNROLL = 16


class Side(NamedTuple):
    """Exponentials of queries or keys, rows padded."""

    exponentials: Tensor
    ranges: Tensor
    tops: Tensor | None
    coefficients: Tensor | None


def exponentials(
    x: Tensor,
    block: int,
    v: Tensor | None,
    lengths: Tensor | None = None,
    used: Tensor | None = None,
    unroll: int = UNROLL,
    tops: bool = True,
) -> Side:
    batch, rows, width = x.shape
    rows_padded, columns = padded(rows, max(block, _SIDE_ROWS)), padded(width, unroll)
    out = x.new_empty(batch, rows_padded, columns, dtype=torch.float32)
    ranges = x.new_empty(batch, rows_padded // _SIDE_ROWS, 2, dtype=torch.float32)
    most = x.new_empty(batch, rows_padded // _SIDE_ROWS, columns, dtype=torch.float32) if tops else None
    coefficients, heads = None, 1
    if v is not None:
        heads = rows_of(v)
        coefficients = x.new_empty(heads, columns // unroll * (unroll + 1) + columns + 1, dtype=torch.float32)
    exponentials_kernel[(batch * (rows_padded // _SIDE_ROWS),)](
        x,
        v,
        out,
        coefficients,
        ranges,
        most,
        lengths,
        used,
        rows,
        rows_padded,
        width,
        columns,
        heads,
        BLOCK=block,
        UNROLL=unroll,
        V_COLUMNS=max(triton.next_power_of_2(columns), unroll),
        COLUMNS=32,
        num_warps=4,
    )
    return Side(out, ranges, most, coefficients)
