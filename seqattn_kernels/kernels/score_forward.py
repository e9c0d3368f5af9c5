"""Scores [B, T, S] of queries and keys: an outer sum over a, a tile of queries and keys in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.exponentials import (
    Side,
    bits_of,
    coefficient_count,
    exponentials,
    form_of,
    group_of,
    size_of,
    span_of,
)
from seqattn_kernels.kernels.launch import EVERYTHING, Masks, on_device, padded, rows_of, target
from seqattn_kernels.kernels.scores import Score, additive_bounded, additive_merged3, additive_merged4


@triton.constexpr_function
def threes_of(unroll, by_three):
    """Columns of `unroll` that are merged by three; the rest, by four. unroll is 4, 8 or 16."""
    return unroll - 4 * (unroll % 3) if by_three else 0


@triton.jit
def exponent_of(top, bits, UNROLL: tl.constexpr, BY_THREE: tl.constexpr, COLUMNS: tl.constexpr):
    """log2 of the largest product that `merged_tile` makes, from the largest q + k and log2(1/v) of each column."""
    each = tl.reshape(bits_of(top) + bits, (COLUMNS // UNROLL, UNROLL))
    threes: tl.constexpr = threes_of(UNROLL, BY_THREE)
    i = tl.arange(0, UNROLL)
    group = tl.where(i < threes, i // 3, threes // 3 + (i - threes) // 4)[None, :]
    most = 0.0
    for g in tl.static_range(0, threes // 3 + (UNROLL - threes) // 4):
        most = tl.maximum(most, tl.max(tl.sum(tl.where(group == g, each, 0.0), 1), 0))
    return most


@triton.jit
def merged_tile(
    q,
    k,
    coefficients,
    AP,
    T_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    BY_THREE: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
):
    """-1/2 sum_a v tanh(q + k), v scaled. q and k point at the tile's block of exponentials."""
    q += tl.arange(0, T_BLOCK)
    k += tl.arange(0, S_BLOCK)
    acc = tl.zeros((T_BLOCK, S_BLOCK), tl.float32)
    for _ in tl.range(0, AP, UNROLL, num_stages=STAGES):
        threes: tl.constexpr = threes_of(UNROLL, BY_THREE)
        # Without half of sum v, partial sums are as small as those of v * tanh, and so are their rounding errors. Few
        # terms are added up before the whole sum is touched, for the same reason.
        part = tl.zeros((T_BLOCK, S_BLOCK), tl.float32) - tl.load(coefficients + UNROLL)
        for i in tl.static_range(0, threes, 3):
            q0 = tl.load(q + i * T_BLOCK)[:, None]
            q1 = tl.load(q + (i + 1) * T_BLOCK)[:, None]
            q2 = tl.load(q + (i + 2) * T_BLOCK)[:, None]
            k0 = tl.load(k + i * S_BLOCK)[None, :]
            k1 = tl.load(k + (i + 1) * S_BLOCK)[None, :]
            k2 = tl.load(k + (i + 2) * S_BLOCK)[None, :]
            c0 = tl.load(coefficients + i)
            c1 = tl.load(coefficients + i + 1)
            c2 = tl.load(coefficients + i + 2)
            part += additive_merged3(q0, q1, q2, k0, k1, k2, c0, c1, c2, TARGET)
        for i in tl.static_range(threes, UNROLL, 4):
            q0 = tl.load(q + i * T_BLOCK)[:, None]
            q1 = tl.load(q + (i + 1) * T_BLOCK)[:, None]
            q2 = tl.load(q + (i + 2) * T_BLOCK)[:, None]
            q3 = tl.load(q + (i + 3) * T_BLOCK)[:, None]
            k0 = tl.load(k + i * S_BLOCK)[None, :]
            k1 = tl.load(k + (i + 1) * S_BLOCK)[None, :]
            k2 = tl.load(k + (i + 2) * S_BLOCK)[None, :]
            k3 = tl.load(k + (i + 3) * S_BLOCK)[None, :]
            c0 = tl.load(coefficients + i)
            c1 = tl.load(coefficients + i + 1)
            c2 = tl.load(coefficients + i + 2)
            c3 = tl.load(coefficients + i + 3)
            part += additive_merged4(q0, q1, q2, q3, k0, k1, k2, k3, c0, c1, c2, c3, TARGET)
        acc += part
        q += UNROLL * T_BLOCK
        k += UNROLL * S_BLOCK
        coefficients += UNROLL + 1
    return acc


@triton.jit
def bounded_tile(
    q, k, coefficients, AP, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, UNROLL: tl.constexpr, TARGET: tl.constexpr
):
    """The same for exponents whose products may overflow."""
    q += tl.arange(0, T_BLOCK)
    k += tl.arange(0, S_BLOCK)
    acc = tl.zeros((T_BLOCK, S_BLOCK), tl.float32)
    for _ in range(0, AP, UNROLL):
        part = tl.zeros((T_BLOCK, S_BLOCK), tl.float32) - tl.load(coefficients + UNROLL)
        for i in range(0, UNROLL):
            part += additive_bounded(tl.load(q)[:, None], tl.load(k)[None, :], tl.load(coefficients + i), TARGET)
            q += T_BLOCK
            k += S_BLOCK
        acc += part
        coefficients += UNROLL + 1
    return acc


@triton.jit
def direct_tile(query, keys, v, t, s, T, S, A, FORWARD: tl.constexpr, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    """sum_a v * forward(q, k) of any score. query [T, A] and keys [S, A] of one batch element."""
    query += t.to(tl.int64) * A
    keys += s.to(tl.int64) * A
    acc = tl.zeros((T_BLOCK, S_BLOCK), tl.float32)
    for first in range(0, A, 16):
        part = tl.zeros((T_BLOCK, S_BLOCK), tl.float32)
        for a in range(first, tl.minimum(first + 16, A)):
            q = tl.load(query + a, mask=t < T, other=0.0).to(tl.float32)
            k = tl.load(keys + a, mask=s < S, other=0.0).to(tl.float32)
            term = FORWARD(q[:, None], k[None, :])
            if v is not None:
                term *= tl.load(v + a).to(tl.float32)
            part += term
        acc += part
    return acc


@triton.jit(do_not_specialize=["T", "heads"])
def scores_fwd_kernel(
    query,  # [B, T, A]
    keys,  # [B, S, A]
    v,  # [H, A] or None: batch element b has row b % H
    q_exp,  # float32 [B, TP / T_BLOCK, AP, T_BLOCK] / v, blocked; these five only with MERGED
    k_exp,  # float32 [B, SP / S_BLOCK, AP, S_BLOCK], blocked
    coefficients,  # [H, ...]: of each UNROLL columns 1/v and half the sum of v; then log2(1/v) of each column; scale
    q_spans,  # [B, TP / Q_GROUP, 2, AP]
    k_spans,  # [B, SP / K_GROUP, 2, AP]
    lengths,  # [B] or None: tiles past it are left as they are
    out,  # float32 [B, T, S]
    T,
    S,
    A,
    AP,
    heads,
    FORWARD: tl.constexpr,
    MERGED: tl.constexpr,
    T_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    BY_THREE: tl.constexpr,  # reciprocals merge by three as far as they go, or by four
    STAGES: tl.constexpr,  # of the pipeline that brings columns into shared memory
    COLUMNS: tl.constexpr,  # power of two, at least AP
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    TARGET: tl.constexpr,
):
    t_blocks, s_blocks = tl.cdiv(T, T_BLOCK), tl.cdiv(S, S_BLOCK)
    tile = tl.program_id(0)
    s_block, t_block = tile % s_blocks, tile // s_blocks % t_blocks
    b = (tile // s_blocks // t_blocks).to(tl.int64)
    t = t_block * T_BLOCK + tl.arange(0, T_BLOCK)
    s = s_block * S_BLOCK + tl.arange(0, S_BLOCK)
    length = S
    if lengths is not None:
        length = tl.load(lengths + b)
    if s_block * S_BLOCK >= length:
        return
    head = b % heads
    if v is not None:
        v += head * A
    if MERGED:
        coefficients += head * coefficient_count(AP, UNROLL)
        end = coefficients + AP // UNROLL * (UNROLL + 1)
        q_groups: tl.constexpr = T_BLOCK // Q_GROUP
        k_groups: tl.constexpr = S_BLOCK // K_GROUP
        a = tl.arange(0, COLUMNS)
        q_spans += (b * t_blocks + t_block) * q_groups * 2 * AP
        k_spans += (b * s_blocks + s_block) * k_groups * 2 * AP
        q_top, q_low = span_of(q_spans, q_groups, a, AP, COLUMNS, q_groups)
        k_top, k_low = span_of(k_spans, k_groups, a, AP, COLUMNS, k_groups)
        bits = tl.load(end + a, mask=a < AP, other=0.0)
        form = form_of(
            size_of(q_top, q_low), size_of(k_top, k_low), exponent_of(q_top + k_top, bits, UNROLL, BY_THREE, COLUMNS)
        )
        scale = -2.0 * tl.load(end + AP)
        q_tile = q_exp + (b * t_blocks + t_block) * AP * T_BLOCK
        k_tile = k_exp + (b * s_blocks + s_block) * AP * S_BLOCK
        if form == 0:
            acc = scale * merged_tile(
                q_tile, k_tile, coefficients, AP, T_BLOCK, S_BLOCK, UNROLL, BY_THREE, STAGES, TARGET
            )
        elif form == 1:
            acc = scale * bounded_tile(q_tile, k_tile, coefficients, AP, T_BLOCK, S_BLOCK, UNROLL, TARGET)
        else:
            acc = direct_tile(query + b * T * A, keys + b * S * A, v, t, s, T, S, A, FORWARD, T_BLOCK, S_BLOCK)
    else:
        acc = direct_tile(query + b * T * A, keys + b * S * A, v, t, s, T, S, A, FORWARD, T_BLOCK, S_BLOCK)
    place = out + b * T * S + t.to(tl.int64)[:, None] * S + s[None, :]
    tl.store(place, acc, mask=(t < T)[:, None] & (s < S)[None, :])


def scores_fwd(
    score: Score,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    masks: Masks = EVERYTHING,
    tile: tiles.ForwardTile = tiles.FORWARD,
) -> Tensor:
    """float32 [B, T, S]; keys that `masks` leaves out for all queries may be left unwritten."""
    batch, steps, width = query.shape
    source = keys.shape[1]
    out = query.new_empty(batch, steps, source, dtype=torch.float32)
    if out.numel() == 0:
        return out
    query, keys, v = query.contiguous(), keys.contiguous(), None if v is None else v.contiguous()
    merged = score.exponential and v is not None and width > 0
    q = k = Side(None, None, None)  # type: ignore[arg-type]
    with on_device(query):
        if merged:
            q = exponentials(query, tile.T, v, unroll=tile.unroll)
            k = exponentials(keys, tile.S, None, masks.lengths, masks.used(), tile.unroll)
        scores_fwd_kernel[(batch * triton.cdiv(steps, tile.T) * triton.cdiv(source, tile.S),)](
            query,
            keys,
            v,
            q.exponentials,
            k.exponentials,
            q.coefficients,
            q.spans,
            k.spans,
            masks.lengths,
            out,
            steps,
            source,
            width,
            padded(width, tile.unroll),
            rows_of(v),
            FORWARD=score.forward,
            MERGED=merged,
            T_BLOCK=tile.T,
            S_BLOCK=tile.S,
            UNROLL=tile.unroll,
            BY_THREE=tile.by_three,
            STAGES=tile.stages,
            COLUMNS=triton.next_power_of_2(padded(max(width, 1), tile.unroll)),
            Q_GROUP=group_of(tile.T),
            K_GROUP=group_of(tile.S),
            TARGET=target(),
            num_warps=tile.warps,
            **tiles.limits(tile.registers, target()),
        )
    return out
