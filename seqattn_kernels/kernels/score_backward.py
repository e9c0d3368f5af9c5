"""Gradients of scores: one kernel, run for the queries (and v) and again for the keys.

A program owns a tile [rows of one side, columns of A] and goes over the rows of the other side, so that nothing is
added up across threads or programs but v: no atomics, the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.exponentials import (
    GROUP,
    UNROLL,
    Side,
    bits_of,
    exponentials,
    form_of,
    if_so,
    size_of,
    span_of,
)
from seqattn_kernels.kernels.launch import EVERYTHING, Masks, on_device, padded, rows_of, target
from seqattn_kernels.kernels.scores import Score, additive_pair, additive_slope, reciprocal


@triton.constexpr_function
def single_of(rows, precise):
    """Rows of `rows` that are taken singly, an even number. Precise terms are of more multiply-adds."""
    return 0 if rows < 8 else rows // 2 if precise else rows // 4


@triton.jit
def row_of(d_scores, other, i, step, AP, n_mask, a_mask, left, MASKED: tl.constexpr):
    """Gradients [N, 1] and exponentials [1, A] of row i of the other side."""
    there = n_mask
    if MASKED:
        there = if_so(n_mask, i < left)
    d = tl.load(d_scores + i * step, mask=there, other=0.0)
    return d[:, None], tl.load(other + i * AP, mask=a_mask, other=0.0)[None, :]


@triton.jit
def raised(own, other, BOUNDED: tl.constexpr):
    """1 + e^2(q + k); bounded where products may overflow, which changes tanh by less than 1e-9."""
    x = own * other + 1.0
    if BOUNDED:
        x = tl.minimum(x, 2147483648.0)
    return x


@triton.jit
def merged_block(
    acc,
    acc_v,
    own,
    other,
    d_scores,
    n_mask,
    a_mask,
    step,
    left,
    AP,
    ROWS: tl.constexpr,
    SINGLE: tl.constexpr,
    MASKED: tl.constexpr,
    WITH_V: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISE: tl.constexpr,
    TARGET: tl.constexpr,
):
    """ROWS rows of the other side. MASKED: only `left` of them are there; those up to a whole group hold e^0, and
    are multiplied by zero."""
    total = 0.0
    # Few terms are added up before the whole sum is touched: fewer roundings are of its size.
    part = acc
    if PRECISE:
        part = tl.zeros(acc.shape, tl.float32)
    # Multiply-adds and special functions are two units: rows taken singly need fewer of the one, pairs of the other.
    for i in tl.static_range(0, SINGLE):
        d, e = row_of(d_scores, other, i, step, AP, n_mask, a_mask, left, MASKED)
        x = raised(own, e, BOUNDED)
        part, acc_v = additive_slope(part, acc_v, d, own, e, reciprocal(x, TARGET), WITH_V, BOUNDED, PRECISE)
        if WITH_V:
            total += d
    for i in tl.static_range(SINGLE, ROWS, 2):
        d0, e0 = row_of(d_scores, other, i, step, AP, n_mask, a_mask, left, MASKED)
        d1, e1 = row_of(d_scores, other, i + 1, step, AP, n_mask, a_mask, left, MASKED)
        r0, r1 = additive_pair(raised(own, e0, BOUNDED), raised(own, e1, BOUNDED), TARGET)
        part, acc_v = additive_slope(part, acc_v, d0, own, e0, r0, WITH_V, BOUNDED, PRECISE)
        part, acc_v = additive_slope(part, acc_v, d1, own, e1, r1, WITH_V, BOUNDED, PRECISE)
        if WITH_V:
            total += d0 + d1
    if WITH_V:
        acc_v -= 0.5 * total
    if PRECISE:
        part += acc
    return part, acc_v


@triton.jit
def merged_rows(
    own,
    other,
    d_scores,
    n_mask,
    a_mask,
    step,
    count,
    AP,
    N_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_V: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISE: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Sums over the other side's rows of d * (r - r^2) and, for v, of d * (r - 1/2)."""
    acc = tl.zeros((N_BLOCK, A_BLOCK), tl.float32)
    acc_v = tl.zeros((N_BLOCK, A_BLOCK), tl.float32)
    whole = tl.maximum(count, 0) // ROWS * ROWS
    for _ in tl.range(0, whole, ROWS, num_stages=STAGES):
        acc, acc_v = merged_block(
            acc,
            acc_v,
            own,
            other,
            d_scores,
            n_mask,
            a_mask,
            step,
            ROWS,
            AP,
            ROWS,
            single_of(ROWS, PRECISE or WITH_V),
            False,
            WITH_V,
            BOUNDED,
            PRECISE,
            TARGET,
        )
        d_scores += ROWS * step
        other += ROWS * AP
    if whole < count:
        acc, acc_v = merged_block(
            acc,
            acc_v,
            own,
            other,
            d_scores,
            n_mask,
            a_mask,
            step,
            count - whole,
            AP,
            ROWS,
            0,
            True,
            WITH_V,
            BOUNDED,
            PRECISE,
            TARGET,
        )
    if PRECISE and not BOUNDED:
        acc *= own
    return acc, acc_v


@triton.jit
def direct_rows(
    own,
    other,
    used,
    d_scores,
    n_mask,
    a_mask,
    step,
    count,
    A,
    FORWARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    OWN_QUERY: tl.constexpr,
    N_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    WITH_V: tl.constexpr,
):
    """Sums over the other side's rows of d * (derivative by the own side) and, for v, of d * term. Any score."""
    acc = tl.zeros((N_BLOCK, A_BLOCK), tl.float32)
    acc_v = tl.zeros((N_BLOCK, A_BLOCK), tl.float32)
    for first in range(0, count, 16):
        part = tl.zeros((N_BLOCK, A_BLOCK), tl.float32)
        for m in range(first, tl.minimum(first + 16, count)):
            d = tl.load(d_scores, mask=n_mask, other=0.0)[:, None]
            there = a_mask
            if used is not None:
                there = if_so(there, tl.load(used + m) != 0)
            row = tl.load(other, mask=there, other=0.0).to(tl.float32)[None, :]
            if OWN_QUERY:
                d_own, _ = GRADIENT(own, row)
            else:
                _, d_own = GRADIENT(row, own)
            # What isn't attended to may be anything.
            part += tl.where(d != 0, d * d_own, 0.0)
            if WITH_V:
                acc_v += tl.where(d != 0, d * FORWARD(own, row), 0.0)
            d_scores += step
            other += A
        acc += part
    return acc, acc_v


@triton.jit(do_not_specialize=["N", "M", "heads"])
def scores_bwd_kernel(
    own,  # [B, N, A]: queries or keys, whose gradient this is
    other,  # [B, M, A]
    v,  # [H, A] or None: batch element b has row b % H
    own_exp,  # float32 [B, NP, AP]; the four only with MERGED
    other_exp,  # float32 [B, MP, AP]
    own_spans,  # [B, NP / GROUP_ROWS, 2, AP]
    other_spans,  # [B, MP / GROUP_ROWS, 2, AP]
    d_scores,  # float32 [B, T, S]; zero where a query doesn't attend
    lengths,  # [B] or None
    used,  # uint8 [B, S] or None: keys of zero don't enter, whatever they hold
    d_own,  # float32 [B, N, A]
    d_v,  # float32 [B, blocks of N, A], with WITH_V
    N,
    M,
    A,
    AP,
    NP,
    MP,
    n_step,  # strides of d_scores along N and M: S and 1 for queries
    m_step,
    heads,
    FORWARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    MERGED: tl.constexpr,
    OWN_QUERY: tl.constexpr,
    WITH_V: tl.constexpr,
    N_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # of the pipeline that brings rows of the other side into shared memory
    ROWS: tl.constexpr,  # of the other side at a time, by which GROUP_ROWS is divisible
    PRECISE: tl.constexpr,  # errors of the size of stock float32; halves don't show them
    GROUP_ROWS: tl.constexpr,
    TARGET: tl.constexpr,
):
    n_blocks, a_blocks = tl.cdiv(N, N_BLOCK), tl.cdiv(A, A_BLOCK)
    tile = tl.program_id(0)
    a_block, n_block = tile % a_blocks, tile // a_blocks % n_blocks
    b = (tile // a_blocks // n_blocks).to(tl.int64)
    n = n_block * N_BLOCK + tl.arange(0, N_BLOCK)
    a = a_block * A_BLOCK + tl.arange(0, A_BLOCK)
    n_wide = n.to(tl.int64)
    n_mask, a_mask = n < N, a < A
    count = M
    valid = n_mask
    if lengths is not None:
        length = tl.load(lengths + b)
        if OWN_QUERY:
            count = tl.minimum(length, M).to(tl.int32)
        else:
            valid = valid & (n < length)
    if used is not None and not OWN_QUERY:
        valid = valid & (tl.load(used + b * N + n, mask=n_mask, other=0) != 0)
    d_scores += b * N * M + n_wide * n_step
    place = b * N * A + n_wide[:, None] * A + a[None, :]
    there = n_mask[:, None] & a_mask[None, :]
    clean = valid[:, None] & a_mask[None, :]
    used_row = used
    if used is not None:
        used_row = used + b * M
    if MERGED:
        own_groups: tl.constexpr = (N_BLOCK + GROUP_ROWS - 1) // GROUP_ROWS
        own_spans += (b * (NP // GROUP_ROWS) + n_block * N_BLOCK // GROUP_ROWS) * 2 * AP
        own_there = tl.minimum(own_groups, NP // GROUP_ROWS - n_block * N_BLOCK // GROUP_ROWS)
        top, low = span_of(own_spans, own_there, a, AP, A_BLOCK, own_groups)
        other_spans += b * (MP // GROUP_ROWS) * 2 * AP
        other_top, other_low = span_of(other_spans, MP // GROUP_ROWS, a, AP, A_BLOCK, 8)
        exponent = 2.0 * tl.max(bits_of(top + other_top), 0)
        other_size = size_of(other_top, other_low)
        form = form_of(size_of(top, low), other_size, exponent)
        if PRECISE:
            # Products of a gradient and an exponential of the other side stay in range.
            form = tl.where((form == 0) & (other_size > 16.0), 1, form)
        e = tl.load(own_exp + b * NP * AP + n_wide[:, None] * AP + a[None, :], mask=there, other=1.0)
        rows = other_exp + b * MP * AP + a
        if form == 0:
            acc, acc_v = merged_rows(
                e,
                rows,
                d_scores,
                n_mask,
                a_mask,
                m_step,
                count,
                AP,
                N_BLOCK,
                A_BLOCK,
                ROWS,
                STAGES,
                WITH_V,
                False,
                PRECISE,
                TARGET,
            )
            acc *= 4.0
            acc_v *= -2.0
        elif form == 1:
            acc, acc_v = merged_rows(
                e,
                rows,
                d_scores,
                n_mask,
                a_mask,
                m_step,
                count,
                AP,
                N_BLOCK,
                A_BLOCK,
                2,
                1,
                WITH_V,
                True,
                PRECISE,
                TARGET,
            )
            acc *= 4.0
            acc_v *= -2.0
        else:
            own_block = tl.load(own + place, mask=clean, other=0.0).to(tl.float32)
            acc, acc_v = direct_rows(
                own_block,
                other + b * M * A + a,
                used_row if OWN_QUERY else None,
                d_scores,
                n_mask,
                a_mask,
                m_step,
                count,
                A,
                FORWARD,
                GRADIENT,
                OWN_QUERY,
                N_BLOCK,
                A_BLOCK,
                WITH_V,
            )
    else:
        own_block = tl.load(own + place, mask=clean, other=0.0).to(tl.float32)
        acc, acc_v = direct_rows(
            own_block,
            other + b * M * A + a,
            used_row if OWN_QUERY else None,
            d_scores,
            n_mask,
            a_mask,
            m_step,
            count,
            A,
            FORWARD,
            GRADIENT,
            OWN_QUERY,
            N_BLOCK,
            A_BLOCK,
            WITH_V,
        )
    if v is not None:
        acc *= tl.load(v + b % heads * A + a, mask=a_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(d_own + place, acc, mask=there)
    if WITH_V:
        total = tl.sum(tl.where(n_mask[:, None], acc_v, 0.0), 0)
        tl.store(d_v + (b * n_blocks + n_block) * A + a, total, mask=a_mask)


def scores_bwd(
    score: Score,
    d_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    masks: Masks = EVERYTHING,
    tile: tiles.BackwardTile = tiles.BACKWARD,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query, keys and v. d_scores [B, T, S] must be zero where a query doesn't attend."""
    query, keys, v = query.contiguous(), keys.contiguous(), None if v is None else v.contiguous()
    d_scores = d_scores.contiguous()
    (batch, steps, width), source = query.shape, keys.shape[1]
    # In float32 whatever the inputs: a narrower store would choose a layout that the inner loop pays for.
    d_query, d_keys = (torch.empty_like(t, dtype=torch.float32) for t in (query, keys))
    d_v = None if v is None else torch.zeros_like(v)
    if batch == 0 or steps == 0 or source == 0 or width == 0:
        return torch.zeros_like(query), torch.zeros_like(keys), d_v
    merged = score.exponential and v is not None
    used = masks.used()
    q = k = Side(None, None, None)  # type: ignore[arg-type]
    with on_device(query):
        if merged:
            q = exponentials(query, 1, None)
            k = exponentials(keys, 1, None, masks.lengths, used)
        columns = padded(width, UNROLL)
        rows_q, rows_k = padded(steps, GROUP), padded(source, GROUP)
        partial = None
        if v is not None:
            partial = query.new_empty(batch, triton.cdiv(steps, tile.N), width, dtype=torch.float32)
        for own_query in (True, False):
            own, other = (query, keys) if own_query else (keys, query)
            a, b = (q, k) if own_query else (k, q)
            n, m = own.shape[1], other.shape[1]
            n_rows, m_rows = (rows_q, rows_k) if own_query else (rows_k, rows_q)
            scores_bwd_kernel[(batch * triton.cdiv(n, tile.N) * triton.cdiv(width, tile.A),)](
                own,
                other,
                v,
                a.exponentials,
                b.exponentials,
                a.spans,
                b.spans,
                d_scores,
                masks.lengths,
                used,
                d_query if own_query else d_keys,
                partial if own_query else None,
                n,
                m,
                width,
                columns,
                n_rows,
                m_rows,
                source if own_query else 1,
                1 if own_query else source,
                rows_of(v),
                FORWARD=score.forward,
                GRADIENT=score.gradient,
                MERGED=merged,
                OWN_QUERY=own_query,
                WITH_V=own_query and v is not None,
                N_BLOCK=tile.N,
                A_BLOCK=tile.A,
                STAGES=tile.stages,
                ROWS=tile.rows,
                PRECISE=query.dtype == torch.float32,
                GROUP_ROWS=GROUP,
                TARGET=target(),
                num_warps=tile.warps,
                **tiles.limits(tile.registers if own_query else tile.key_registers, target()),
            )
        if v is not None and partial is not None:
            d_v = partial.view(batch // rows_of(v), rows_of(v), -1, width).sum((0, 2)).view_as(v).to(v.dtype)
    return d_query.to(query.dtype), d_keys.to(keys.dtype), d_v
