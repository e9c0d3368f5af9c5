"""A decoder step: one query for each batch element (or a few), keys and values read once, S split over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.launch import EVERYTHING, Masks, on_device, padded, rows_of, target
from seqattn_kernels.kernels.scores import Score, rounded_product


@triton.jit
def store_weights(scores, weights, first, step, S, end, top, inverse, BLOCK: tl.constexpr):
    for start in range(first, S, step):
        s = start + tl.arange(0, BLOCK)
        x = tl.load(scores + s, mask=s < end, other=float("-inf"))
        p = tl.where(x == float("-inf"), 0.0, tl.exp(x - top) * inverse)
        tl.store(weights + s, p.to(weights.dtype.element_ty), mask=s < S)


@triton.jit(do_not_specialize=["T", "S", "SPLIT", "heads"])
def step_fwd_kernel(
    query,  # [B, T, A]
    keys,  # [B, S, A]
    v,  # [H, A] or None: batch element b has row b % H
    values,  # [B, S, D]; None: only scores are wanted
    features,  # a term of keys: element (b, t, s, f) at b * features_b + t * features_t + s * F + f; or None
    feature_weight,  # [F, A]
    features_b,
    features_t,
    lengths,  # [B] or None
    mask,  # element (b, t, s) at b * mask_b + t * mask_t + s: uint8, nonzero where to attend, or added; or None
    mask_b,
    mask_t,
    scores,  # float32 [B, T, S]: masked scores, or None
    partial,  # float32 [B, T, splits, D + 2]: context, sum and largest score of each split; None with WHOLE
    context,  # [B, T, D], with WHOLE
    weights,  # [B, T, S], or None, with WHOLE
    T,
    S,
    A,
    D,
    F,
    SPLIT,  # keys of a split
    heads,
    FORWARD: tl.constexpr,
    QUICK: tl.constexpr,
    ADDED: tl.constexpr,
    S_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,  # powers of two, at least A and D
    D_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # one split holds all keys: there is nothing to join
    STAGES: tl.constexpr,  # of the pipeline that brings keys and values into shared memory
    TARGET: tl.constexpr,
    W_BLOCK: tl.constexpr = 512,
):
    splits = tl.cdiv(S, SPLIT)
    row = (tl.program_id(0) // splits).to(tl.int64)
    b, t = row // T, row % T
    first = tl.program_id(0) % splits * SPLIT
    last = tl.minimum(first + SPLIT, S)
    end = last
    if lengths is not None:
        end = tl.minimum(end, tl.load(lengths + b)).to(tl.int32)
    a = tl.arange(0, A_BLOCK)
    d = tl.arange(0, D_BLOCK)
    if v is not None:
        v += b % heads * A
    q = tl.load(query + row * A + a, mask=a < A, other=0.0).to(tl.float32)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((S_BLOCK, D_BLOCK), tl.float32)
    for start in tl.range(first, end, S_BLOCK, num_stages=STAGES):
        s = start + tl.arange(0, S_BLOCK)
        keep = s < end
        if mask is not None:
            at = mask + b * mask_b + t * mask_t + s
            if ADDED:
                bias = tl.load(at, mask=keep, other=float("-inf")).to(tl.float32)
                keep = keep & (bias != float("-inf"))
            else:
                keep = keep & (tl.load(at, mask=keep, other=0) != 0)
        rows = b * S + s.to(tl.int64)
        k = tl.load(keys + rows[:, None] * A + a[None, :], mask=keep[:, None] & (a < A)[None, :], other=0.0)
        if values is not None:
            h = tl.load(values + rows[:, None] * D + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0)
        k = k.to(tl.float32)
        if features is not None:
            for f in range(0, F):
                feature = tl.load(features + b * features_b + t * features_t + s * F + f, mask=keep, other=0.0)
                weight = tl.load(feature_weight + f * A + a, mask=a < A, other=0.0)
                k += feature.to(tl.float32)[:, None] * weight.to(tl.float32)[None, :]
        if QUICK is None:
            term = FORWARD(q[None, :], k)
        else:
            term, _, _ = QUICK(q[None, :], k, TARGET)
        if v is not None:
            weight = tl.load(v + a, mask=a < A, other=0.0).to(tl.float32)
            term = rounded_product(term, weight[None, :], TARGET)
        else:
            term = tl.where((a < A)[None, :], rounded_product(term, tl.full((1, 1), 1.0, tl.float32), TARGET), 0.0)
        x = tl.sum(term, 1)
        if mask is not None and ADDED:
            x += bias
        x = tl.where(keep, x, float("-inf"))
        if scores is not None:
            tl.store(scores + row * S + s, x, mask=s < last)
        if values is not None:
            best = tl.maximum(top, tl.max(x, 0))
            # Where nothing was attended to so far, both are -inf: 0, not NaN.
            shrink = tl.where(top == best, 1.0, tl.exp(top - best))
            p = tl.where(keep, tl.exp(x - best), 0.0)
            total = total * shrink + tl.sum(p, 0)
            acc = acc * shrink + p[:, None] * h.to(tl.float32)
            top = best
    if values is not None:
        if WHOLE:
            inverse = tl.where(total != 0, 1.0 / total, 0.0)
            joined = tl.sum(acc, 0) * inverse
            tl.store(context + row * D + d, joined.to(context.dtype.element_ty), mask=d < D)
            if weights is not None:
                # Other threads of this program stored what is read here.
                tl.debug_barrier()
                store_weights(scores + row * S, weights + row * S, 0, W_BLOCK, S, end, top, inverse, W_BLOCK)
        else:
            at = partial + tl.program_id(0).to(tl.int64) * (D + 2)
            tl.store(at + d, tl.sum(acc, 0), mask=d < D)
            tl.store(at + D, total)
            tl.store(at + D + 1, top)


@triton.jit(do_not_specialize=["T", "S", "splits"])
def step_join_kernel(
    scores,  # float32 [B, T, S]; or None
    partial,  # float32 [B, T, splits, D + 2]
    lengths,  # [B] or None
    context,  # [B, T, D]
    weights,  # [B, T, S]; or None
    T,
    S,
    D,
    splits,
    SPLITS: tl.constexpr,  # power of two, at least splits
    S_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    d_blocks = tl.cdiv(D, D_BLOCK)
    row = (tl.program_id(0) // d_blocks).to(tl.int64)
    d_block = tl.program_id(0) % d_blocks
    i = tl.arange(0, SPLITS)
    d = d_block * D_BLOCK + tl.arange(0, D_BLOCK)
    rows = partial + (row * splits + i) * (D + 2)
    total = tl.load(rows + D, mask=i < splits, other=0.0)
    top = tl.load(rows + D + 1, mask=i < splits, other=float("-inf"))
    best = tl.max(top, 0)
    shrink = tl.where(total != 0, tl.exp(top - best), 0.0)
    total = tl.sum(total * shrink, 0)
    inverse = tl.where(total != 0, 1.0 / total, 0.0)
    part = tl.load(rows[:, None] + d[None, :], mask=(i < splits)[:, None] & (d < D)[None, :], other=0.0)
    joined = tl.sum(part * shrink[:, None], 0) * inverse
    tl.store(context + row * D + d, joined.to(context.dtype.element_ty), mask=d < D)
    if weights is not None:
        end = S
        if lengths is not None:
            end = tl.minimum(end, tl.load(lengths + row // T)).to(tl.int32)
        store_weights(
            scores + row * S, weights + row * S, d_block * S_BLOCK, d_blocks * S_BLOCK, S, end, best, inverse, S_BLOCK
        )


@triton.jit(do_not_specialize=["S", "SPLIT", "heads"])
def step_bwd_kernel(
    query,  # [B, A]
    keys,  # [B, S, A]
    v,  # [H, A] or None: batch element b has row b % H
    d_scores,  # float32 [B, S]; zero where the query doesn't attend: such keys don't enter, whatever they hold
    d_keys,  # [B, S, A]
    partial,  # float32 [B, splits, 2, A]: sums of the derivative by q, before v, and of the terms
    S,
    A,
    SPLIT,
    heads,
    FORWARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    QUICK: tl.constexpr,
    S_BLOCK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
):
    splits = tl.cdiv(S, SPLIT)
    b = (tl.program_id(0) // splits).to(tl.int64)
    first = tl.program_id(0) % splits * SPLIT
    end = tl.minimum(first + SPLIT, S)
    a = tl.arange(0, A_BLOCK)
    a_mask = a < A
    if v is not None:
        v += b % heads * A
    q = tl.load(query + b * A + a, mask=a_mask, other=0.0).to(tl.float32)[None, :]
    factor = tl.full((1, A_BLOCK), 1.0, tl.float32)
    if v is not None:
        factor = tl.load(v + a, mask=a_mask, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((S_BLOCK, A_BLOCK), tl.float32)
    acc_v = tl.zeros((S_BLOCK, A_BLOCK), tl.float32)
    some = tl.zeros((S_BLOCK,), tl.int32)
    for start in tl.range(first, end, S_BLOCK, num_stages=STAGES):
        s = start + tl.arange(0, S_BLOCK)
        inside = s < end
        d = tl.load(d_scores + b * S + s, mask=inside, other=0.0)
        attended = d != 0
        some |= attended.to(tl.int32)
        d = d[:, None]
        place = (b * S + s.to(tl.int64))[:, None] * A + a[None, :]
        k = tl.load(keys + place, mask=attended[:, None] & a_mask[None, :], other=0.0).to(tl.float32)
        if QUICK is None:
            term = FORWARD(q, k)
            d_q, d_k = GRADIENT(q, k)
        else:
            term, d_q, d_k = QUICK(q, k, TARGET)
        acc += d * d_q
        acc_v += d * term
        d_k = (d * d_k * factor).to(d_keys.dtype.element_ty)
        tl.store(d_keys + place, d_k, mask=attended[:, None] & a_mask[None, :])
        tl.store(d_keys + place, tl.zeros_like(d_k), mask=(inside & (attended == 0))[:, None] & a_mask[None, :])
    # A query that attends to nothing may be NaN.
    attends = tl.max(some, 0) > 0
    at = partial + tl.program_id(0).to(tl.int64) * 2 * A + a
    tl.store(at, tl.where(attends, tl.sum(acc, 0), 0.0), mask=a_mask)
    tl.store(at + A, tl.where(attends, tl.sum(acc_v, 0), 0.0), mask=a_mask)


STEP_WIDTH = 4096  # columns a step kernel holds in registers


def step_fwd(
    score: Score,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    values: Tensor,
    masks: Masks,
    need_weights: bool,
    tile: tiles.StepTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of a few queries [B, T, A] for each batch element: context [B, T, D], weights [B, T, S]."""
    (batch, steps, _), source, depth = query.shape, keys.shape[1], values.shape[2]
    context = query.new_empty(batch, steps, depth)
    weights = query.new_empty(batch, steps, source) if need_weights else None
    if batch == 0 or source == 0 or steps == 0:
        return context.zero_(), weights
    scores = query.new_empty(batch, steps, source, dtype=torch.float32) if need_weights else None
    partial = _step(
        score, query, keys, v, values, masks, scores, context, weights, tile or tiles.STEP[keys.element_size()]
    )
    if partial is not None:
        splits, join = partial.shape[2], min(128, triton.next_power_of_2(max(depth, 16)))
        with on_device(query):
            step_join_kernel[(batch * steps * max(1, triton.cdiv(depth, join)),)](
                scores,
                partial,
                masks.lengths,
                context,
                weights,
                steps,
                source,
                depth,
                splits,
                SPLITS=triton.next_power_of_2(splits),
                S_BLOCK=512,
                D_BLOCK=join,
                num_warps=4,
            )
    return context, weights


def step_scores(
    score: Score,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
) -> Tensor:
    """Scores alone, float32 [B, T, S], of a few queries [B, T, A]; features [B, S, F] or [B, T, S, F]."""
    scores = query.new_empty(*query.shape[:2], keys.shape[1], dtype=torch.float32)
    if scores.numel():
        tile = tiles.STEP[keys.element_size()]
        _step(score, query, keys, v, None, EVERYTHING, scores, None, None, tile, features, feature_weight)
    return scores


def _step(
    score: Score,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    values: Tensor | None,
    masks: Masks,
    scores: Tensor | None,
    context: Tensor | None,
    weights: Tensor | None,
    tile: tiles.StepTile,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
) -> Tensor | None:
    """Launches the kernel; returns what is to be joined, or None where one program held all keys of its query."""
    (batch, steps, width), source = query.shape, keys.shape[1]
    depth = 0 if values is None else values.shape[2]
    query, keys, v = query.contiguous(), keys.contiguous(), None if v is None else v.contiguous()
    values = None if values is None else values.contiguous()
    features_b = features_t = filters = 0
    if features is not None and feature_weight is not None:
        features, feature_weight = features.contiguous(), feature_weight.contiguous()
        filters = features.shape[-1]
        features_b, features_t = features.stride(0), features.stride(1) if features.dim() == 4 else 0
    a_block, d_block = (triton.next_power_of_2(max(n, 16)) for n in (width, depth))
    block = max(1, min(32, tile.elements // max(a_block, d_block)))
    # With enough queries to fill the GPU, each is left whole; else keys are split, as far as it takes.
    splits = min(triton.cdiv(tile.programs, batch * steps), triton.cdiv(source, 4 * block))
    split = padded(triton.cdiv(source, splits), block)
    splits = triton.cdiv(source, split)
    partial = None
    if values is not None and splits > 1:
        partial = query.new_empty(batch, steps, splits, depth + 2, dtype=torch.float32)
    with on_device(query):
        step_fwd_kernel[(batch * steps * splits,)](
            query,
            keys,
            v,
            values,
            features,
            feature_weight,
            features_b,
            features_t,
            masks.lengths,
            masks.mask,
            *masks.strides(),
            scores,
            partial,
            context,
            weights,
            steps,
            source,
            width,
            depth,
            filters,
            split,
            rows_of(v),
            FORWARD=score.forward,
            QUICK=None if values is None else score.quick,
            ADDED=masks.added,
            S_BLOCK=block,
            A_BLOCK=a_block,
            D_BLOCK=d_block,
            WHOLE=splits == 1,
            STAGES=tile.stages,
            TARGET=target(),
            num_warps=tile.warps,
        )
    return partial


def step_bwd(
    score: Score,
    d_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    tile: tiles.StepTile = tiles.STEP_BACKWARD,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of query [B, A], keys and v; d_scores [B, S] must be zero where the query doesn't attend."""
    (batch, width), source = query.shape, keys.shape[1]
    query, keys, v = query.contiguous(), keys.contiguous(), None if v is None else v.contiguous()
    if batch == 0 or source == 0 or width == 0:
        return torch.zeros_like(query), torch.zeros_like(keys), None if v is None else torch.zeros_like(v)
    d_keys = torch.empty_like(keys)
    a_block = triton.next_power_of_2(max(width, 16))
    block = max(1, min(32, tile.elements // a_block))
    splits = min(triton.cdiv(tile.programs, batch), triton.cdiv(source, 4 * block))
    split = padded(triton.cdiv(source, splits), block)
    splits = triton.cdiv(source, split)
    partial = query.new_empty(batch, splits, 2, width, dtype=torch.float32)
    with on_device(query):
        step_bwd_kernel[(batch * splits,)](
            query,
            keys,
            v,
            d_scores.contiguous(),
            d_keys,
            partial,
            source,
            width,
            split,
            rows_of(v),
            FORWARD=score.forward,
            GRADIENT=score.gradient,
            QUICK=score.quick,
            S_BLOCK=block,
            A_BLOCK=a_block,
            STAGES=tile.stages,
            TARGET=target(),
            num_warps=tile.warps,
        )
    d_query, d_v = partial.sum(1).unbind(1)
    if v is None:
        return d_query.to(query.dtype), d_keys, None
    heads = rows_of(v)
    d_query = d_query.view(-1, heads, width) * v.view(heads, width).float()
    d_v = d_v.reshape(-1, heads, width).sum(0).view_as(v)
    return d_query.view_as(query).to(query.dtype), d_keys, d_v.to(v.dtype)
