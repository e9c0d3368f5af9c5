"""Exponentials of queries and keys in the order the score kernels read them, with the range of each column.

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


@triton.jit
def if_so(mask, flag):
    """`mask` where the scalar `flag` holds. Triton 3.9's interpreter loads by no mask that a scalar was joined to."""
    return (mask & flag) != 0


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
    spans,  # float32 [B, NP / GROUP, 2, AP]: largest and least x of each column of GROUP rows
    lengths,  # [B] or None: rows past it are not looked at
    used,  # uint8 [B, N] or None: likewise rows of zero
    N,
    NP,
    A,
    AP,
    heads,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    UNROLL: tl.constexpr,
    V_COLUMNS: tl.constexpr,  # power of two, at least AP
    COLUMNS: tl.constexpr,
    PAD: tl.constexpr = 2**-16,
):
    chunks = tl.cdiv(AP, COLUMNS)
    chunk = tl.program_id(0) % chunks
    group = tl.program_id(0) // chunks
    groups = NP // GROUP
    b = (group // groups).to(tl.int64)
    first = group % groups * GROUP
    n = first + tl.arange(0, GROUP)
    a = chunk * COLUMNS + tl.arange(0, COLUMNS)
    valid = n < N
    if lengths is not None:
        valid = valid & (n < tl.load(lengths + b))
    if used is not None:
        valid = valid & (tl.load(used + b * N + n, mask=valid, other=0) != 0)
    there = valid[:, None] & (a < A)[None, :]
    rows = x + b * N * A + n.to(tl.int64)[:, None] * A
    block = tl.load(rows + a[None, :], mask=there, other=0.0).to(tl.float32)
    span = spans + group.to(tl.int64) * 2 * AP + a
    # A NaN takes the direct form, which keeps it where it is seen; maxima lose it.
    top = tl.where(block == block, block, float("inf"))
    tl.store(span, tl.max(tl.where(there, top, float("-inf")), 0), mask=a < AP)
    tl.store(span + AP, tl.min(tl.where(there, block, float("inf")), 0), mask=a < AP)
    # Past this the kernels take the direct form; nothing here may overflow.
    e = exp_of_double(tl.minimum(tl.maximum(block, -32.0), 32.0))
    if v is not None:
        v += b % heads * A
        all_a = tl.arange(0, V_COLUMNS)
        all_v = tl.load(v + all_a, mask=all_a < A, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(all_v), 0)
        # What pads A adds a half of PAD and takes it away again.
        column = tl.load(v + a, mask=a < A, other=0.0).to(tl.float32)
        e = e / tl.where(a < A, scaled_v(column, largest), PAD)[None, :]
        if (first == 0) & (chunk == 0) & (b < heads):
            w = tl.where(all_a < A, scaled_v(all_v, largest), PAD)
            inverse = 1.0 / w
            # What is not finite must not enter the merged forms.
            finite = tl.sum(tl.where(tl.abs(all_v) < float("inf"), 0, 1), 0) == 0
            unrolled: tl.constexpr = V_COLUMNS // UNROLL
            stride: tl.constexpr = UNROLL + 1
            coefficients += b * coefficient_count(AP, UNROLL)
            tl.store(coefficients + all_a // UNROLL * stride + all_a % UNROLL, inverse, mask=all_a < AP)
            i = tl.arange(0, unrolled)
            half = 0.5 * tl.sum(tl.reshape(w, (unrolled, UNROLL)), 1)
            tl.store(coefficients + i * stride + UNROLL, half, mask=i < AP // UNROLL)
            end = coefficients + AP // UNROLL * stride
            bits = tl.where(finite, tl.log2(tl.abs(inverse)), float("inf"))
            tl.store(end + all_a, bits, mask=all_a < AP)
            tl.store(end + AP, largest)
    base = out + b * NP * AP + (first // BLOCK).to(tl.int64) * AP * BLOCK
    inside = (n // BLOCK - first // BLOCK) * AP * BLOCK + n % BLOCK
    tl.store(base + inside[:, None] + a[None, :] * BLOCK, e, mask=(a < AP)[None, :])


@triton.jit
def span_of(spans, count, a, AP, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Largest and least x of columns a in `count` groups, AT_ONCE (a power of two) read together."""
    top = tl.full((COLUMNS,), float("-inf"), tl.float32)
    low = tl.full((COLUMNS,), float("inf"), tl.float32)
    for first in range(0, count, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        there = (i < count)[:, None] & (a < AP)[None, :]
        at = spans + i[:, None] * 2 * AP + a[None, :]
        top = tl.maximum(top, tl.max(tl.load(at, mask=there, other=float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.load(at + AP, mask=there, other=float("inf")), 0))
    return top, low


@triton.jit
def size_of(top, low):
    return tl.maximum(tl.max(tl.maximum(top, -low), 0), 0.0)


@triton.jit
def bits_of(x):
    """log2(1 + e^2x)"""
    z = 2.8853900817779268 * x
    return tl.maximum(z, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(z)))


@triton.jit
def form_of(q_size, k_size, exponent):
    """Which form serves a tile: 0 merged, 1 bounded, 2 direct. 2^exponent is the largest product that merging makes."""
    # 1 - 2 / x has an absolute error of a rounding: too large where every tanh is small.
    merged = (q_size <= 32.0) & (k_size <= 32.0) & (exponent < float("inf")) & (q_size + k_size > 0.03125)
    return tl.where(merged, tl.where(exponent <= 125.0, 0, 1), 2)


UNROLL = 16
GROUP = 32  # rows whose columns share a span; a block of fewer rows is a group of its own


def group_of(block: int) -> int:
    return GROUP if block == 1 else min(block, GROUP)


class Side(NamedTuple):
    """Exponentials of queries or keys, rows padded."""

    exponentials: Tensor
    spans: Tensor
    coefficients: Tensor | None


def exponentials(
    x: Tensor,
    block: int,
    v: Tensor | None,
    lengths: Tensor | None = None,
    used: Tensor | None = None,
    unroll: int = UNROLL,
) -> Side:
    batch, rows, width = x.shape
    group = group_of(block)
    rows_padded, columns = padded(rows, max(block, group)), padded(width, unroll)
    out = x.new_empty(batch, rows_padded, columns, dtype=torch.float32)
    spans = x.new_empty(batch, rows_padded // group, 2, columns, dtype=torch.float32)
    coefficients, heads = None, 1
    if v is not None:
        heads = rows_of(v)
        coefficients = x.new_empty(heads, columns // unroll * (unroll + 1) + columns + 1, dtype=torch.float32)
    chunk = 2048 // group
    exponentials_kernel[(batch * (rows_padded // group) * triton.cdiv(columns, chunk),)](
        x,
        v,
        out,
        coefficients,
        spans,
        lengths,
        used,
        rows,
        rows_padded,
        width,
        columns,
        heads,
        BLOCK=block,
        GROUP=group,
        UNROLL=unroll,
        V_COLUMNS=max(triton.next_power_of_2(columns), unroll),
        COLUMNS=chunk,
        num_warps=4,
    )
    return Side(out, spans, coefficients)
