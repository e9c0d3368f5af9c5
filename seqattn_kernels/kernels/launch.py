"""Launches the kernels: allocates, pads, picks tiles. Tensors on one CUDA device, or anywhere under the interpreter."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.exponentials import exponentials_kernel
from seqattn_kernels.kernels.rows import normalize_bwd_kernel, normalize_fwd_kernel
from seqattn_kernels.kernels.score_backward import scores_bwd_kernel
from seqattn_kernels.kernels.score_forward import scores_fwd_kernel
from seqattn_kernels.kernels.scores import Score
from seqattn_kernels.kernels.step import step_bwd_kernel, step_fwd_kernel, step_join_kernel

ROW_LIMIT = 1 << 17  # keys a row kernel holds in registers
_SIDE_ROWS = 32
_UNROLL = 16


def target() -> str:
    """Where the kernels run: "cuda", "hip", or "plain" under the interpreter."""
    if triton.knobs.runtime.interpret:
        return "plain"
    return "hip" if torch.version.hip else "cuda"


def on_device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def padded(n: int, to: int) -> int:
    return triton.cdiv(n, to) * to


def rows_of(v: Tensor | None) -> int:
    """H of v [H, A] or [A]: batch element b has row b % H."""
    return 1 if v is None or v.dim() == 1 else v.shape[0]


class Masks(NamedTuple):
    """Who attends to what. mask [B, 1 or T, S]: uint8, or floating and added; lengths int64 [B]."""

    lengths: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor | None, mask: Tensor | None) -> Masks:
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
            mask = mask.contiguous()
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        return cls(lengths if lengths is None else lengths.contiguous(), mask)

    @property
    def added(self) -> bool:
        return self.mask is not None and self.mask.is_floating_point()

    def strides(self) -> tuple[int, int]:
        if self.mask is None:
            return 0, 0
        return self.mask.stride(0), self.mask.stride(1) if self.mask.shape[1] > 1 else 0

    def used(self) -> Tensor | None:
        """uint8 [B, S]: keys the mask lets some query attend to; None: all."""
        if self.mask is None:
            return None
        allowed = self.mask != (-torch.inf if self.added else 0)
        return (allowed.any(1) if allowed.shape[1] > 1 else allowed.squeeze(1)).to(torch.uint8)


class Side(NamedTuple):
    """Exponentials of queries or keys, rows padded."""

    exponentials: Tensor
    ranges: Tensor
    tops: Tensor | None
    coefficients: Tensor | None


def exponentials(
    x: Tensor, block: int, v: Tensor | None, lengths: Tensor | None = None, used: Tensor | None = None,
    unroll: int = _UNROLL, tops: bool = True,
) -> Side:  # fmt: skip
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
        x, v, out, coefficients, ranges, most, lengths, used, rows, rows_padded, width, columns, heads,
        BLOCK=block, UNROLL=unroll, V_COLUMNS=max(triton.next_power_of_2(columns), unroll), COLUMNS=32, num_warps=4,
    )  # fmt: skip
    return Side(out, ranges, most, coefficients)


def scores_fwd(
    score: Score, query: Tensor, keys: Tensor, v: Tensor | None, masks: Masks = Masks(),  # noqa: B008
    tile: tiles.ForwardTile = tiles.FORWARD,
) -> Tensor:  # fmt: skip
    """float32 [B, T, S]; keys that `masks` leaves out for all queries may be left unwritten."""
    batch, steps, width = query.shape
    source = keys.shape[1]
    out = query.new_empty(batch, steps, source, dtype=torch.float32)
    if out.numel() == 0:
        return out
    query, keys, v = query.contiguous(), keys.contiguous(), None if v is None else v.contiguous()
    merged = score.exponential and v is not None and width > 0
    q = k = Side(None, None, None, None)  # type: ignore[arg-type]
    with on_device(query):
        if merged:
            q = exponentials(query, tile.T, v, unroll=tile.unroll)
            k = exponentials(keys, tile.S, None, masks.lengths, masks.used(), tile.unroll)
        scores_fwd_kernel[(batch * triton.cdiv(steps, tile.T) * triton.cdiv(source, tile.S),)](
            query, keys, v, q.exponentials, k.exponentials, q.coefficients, q.ranges, k.ranges,
            q.tops, k.tops, masks.lengths, out,
            steps, source, width, padded(width, tile.unroll), rows_of(v),
            FORWARD=score.forward, MERGED=merged, T_BLOCK=tile.T, S_BLOCK=tile.S, UNROLL=tile.unroll, STAGES=tile.stages,
            COLUMNS=triton.next_power_of_2(padded(max(width, 1), tile.unroll)), TARGET=target(),
            num_warps=tile.warps, **tile.limits(),
        )  # fmt: skip
    return out


def scores_bwd(
    score: Score, d_scores: Tensor, query: Tensor, keys: Tensor, v: Tensor | None, masks: Masks = Masks(),  # noqa: B008
    tile: tiles.BackwardTile = tiles.BACKWARD,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
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
    q = k = Side(None, None, None, None)  # type: ignore[arg-type]
    with on_device(query):
        if merged:
            q = exponentials(query, 1, None, tops=False)
            k = exponentials(keys, 1, None, masks.lengths, used, tops=False)
        columns = padded(width, _UNROLL)
        rows_q, rows_k = padded(steps, _SIDE_ROWS), padded(source, _SIDE_ROWS)
        partial = None
        if v is not None:
            partial = query.new_empty(batch, triton.cdiv(steps, tile.N), width, dtype=torch.float32)
        for own_query in (True, False):
            own, other = (query, keys) if own_query else (keys, query)
            a, b = (q, k) if own_query else (k, q)
            n, m = own.shape[1], other.shape[1]
            n_rows, m_rows = (rows_q, rows_k) if own_query else (rows_k, rows_q)
            scores_bwd_kernel[(batch * triton.cdiv(n, tile.N) * triton.cdiv(width, tile.A),)](
                own, other, v, a.exponentials, b.exponentials, a.ranges, b.ranges, d_scores, masks.lengths, used,
                d_query if own_query else d_keys, partial if own_query else None, n, m, width, columns, n_rows, m_rows,
                source if own_query else 1, 1 if own_query else source, rows_of(v),
                FORWARD=score.forward, GRADIENT=score.gradient, MERGED=merged, OWN_QUERY=own_query,
                WITH_V=own_query and v is not None, N_BLOCK=tile.N, A_BLOCK=tile.A, STAGES=tile.stages,
                ROWS=tile.rows,
                OWN_ENTRIES=triton.next_power_of_2(n_rows // _SIDE_ROWS),
                OTHER_ENTRIES=triton.next_power_of_2(m_rows // _SIDE_ROWS), TARGET=target(), num_warps=tile.warps,
                **tile.limits(),
            )  # fmt: skip
        if v is not None and partial is not None:
            d_v = partial.view(batch // rows_of(v), rows_of(v), -1, width).sum((0, 2)).view_as(v).to(v.dtype)
    return d_query.to(query.dtype), d_keys.to(keys.dtype), d_v


def _row_block(source: int) -> tuple[int, int]:
    block = triton.next_power_of_2(max(source, 1))
    if block > ROW_LIMIT:
        raise ValueError(f"keys: expected at most {ROW_LIMIT} of them in the Triton row kernels, got {source}")
    return block, max(1, min(32, block // 512))


def normalize_fwd(
    kind: str, scores: Tensor, weights: Tensor, masks: Masks = Masks(), scale: float = 1.0,  # noqa: B008
    temperature: float = 1.0, fill: float = -math.inf, zero_empty: bool = True,
) -> Tensor:  # fmt: skip
    """Weights of scores [B, T, S], written to `weights`, which may be the scores themselves.

    ``kind`` of ``(scale * scores + mask) / temperature``, with `fill` where lengths or a boolean mask hide a key.
    """
    _, steps, source = scores.shape
    if scores.numel():
        block, warps = _row_block(source)
        with on_device(scores):
            normalize_fwd_kernel[(scores.shape[0] * steps,)](
                scores, weights, masks.lengths, masks.mask, *masks.strides(), steps, source, float(scale),
                float(temperature), float(fill),
                KIND=kind, ADDED=masks.added, SCALED=scale != 1 or temperature != 1, FILLED=fill != -math.inf,
                ZERO_EMPTY=zero_empty, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return weights


def normalize_bwd(
    kind: str, weights: Tensor, d_weights: Tensor | None, d_weights_too: Tensor | None, d_scores: Tensor,
    masks: Masks = Masks(), factor: float = 1.0,  # noqa: B008
) -> Tensor:  # fmt: skip
    """`factor` times the gradient of what was normalised, [B, T, S], from that of the weights; 0 at hidden keys.

    Written to `d_scores`, which may be a gradient. `masks` is needed only where hidden keys have weight.
    """
    _, steps, source = weights.shape
    if weights.numel():
        block, warps = _row_block(source)
        with on_device(weights):
            normalize_bwd_kernel[(weights.shape[0] * steps,)](
                weights, d_weights, d_weights_too, d_scores, masks.lengths, masks.mask, *masks.strides(), steps, source,
                float(factor), KIND=kind, ADDED=masks.added, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return d_scores


STEP_WIDTH = 4096  # columns a step kernel holds in registers


def step_fwd(
    score: Score, query: Tensor, keys: Tensor, v: Tensor | None, values: Tensor, masks: Masks, need_weights: bool,
    tile: tiles.StepTile = tiles.STEP,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Softmax attention of a few queries [B, T, A] for each batch element: context [B, T, D], weights [B, T, S]."""
    (batch, steps, _), source, depth = query.shape, keys.shape[1], values.shape[2]
    context = query.new_empty(batch, steps, depth)
    weights = query.new_empty(batch, steps, source) if need_weights else None
    if batch == 0 or source == 0 or steps == 0:
        return context.zero_(), weights
    scores = query.new_empty(batch, steps, source, dtype=torch.float32) if need_weights else None
    partial = _step(score, query, keys, v, values, masks, scores, context, weights, tile)
    if partial is not None:
        splits, join = partial.shape[2], min(128, triton.next_power_of_2(max(depth, 16)))
        with on_device(query):
            step_join_kernel[(batch * steps * max(1, triton.cdiv(depth, join)),)](
                scores, partial, masks.lengths, context, weights, steps, source, depth, splits,
                SPLITS=triton.next_power_of_2(splits), S_BLOCK=512, D_BLOCK=join, num_warps=4,
            )  # fmt: skip
    return context, weights


def step_scores(score: Score, query: Tensor, keys: Tensor, v: Tensor | None) -> Tensor:
    """Scores alone, float32 [B, T, S], of a few queries [B, T, A]."""
    scores = query.new_empty(*query.shape[:2], keys.shape[1], dtype=torch.float32)
    if scores.numel():
        _step(score, query, keys, v, None, Masks(), scores, None, None, tiles.STEP)
    return scores


def _step(
    score: Score, query: Tensor, keys: Tensor, v: Tensor | None, values: Tensor | None, masks: Masks,
    scores: Tensor | None, context: Tensor | None, weights: Tensor | None, tile: tiles.StepTile,
) -> Tensor | None:  # fmt: skip
    """Launches the kernel; returns what is to be joined, or None where one program held all keys of its query."""
    (batch, steps, width), source = query.shape, keys.shape[1]
    depth = 0 if values is None else values.shape[2]
    query, keys, values, v = (t if t is None else t.contiguous() for t in (query, keys, values, v))
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
            query, keys, v, values, masks.lengths, masks.mask, *masks.strides(), scores, partial, context, weights,
            steps, source, width, depth, split, rows_of(v),
            FORWARD=score.forward, QUICK=None if values is None else score.quick, ADDED=masks.added, S_BLOCK=block,
            A_BLOCK=a_block, D_BLOCK=d_block, WHOLE=splits == 1, STAGES=tile.stages, TARGET=target(),
            num_warps=tile.warps,
        )  # fmt: skip
    return partial


def step_bwd(
    score: Score, d_scores: Tensor, query: Tensor, keys: Tensor, v: Tensor | None, masks: Masks,
    tile: tiles.StepTile = tiles.STEP_BACKWARD,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
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
            query, keys, v, d_scores.contiguous(), masks.lengths, masks.used(), d_keys, partial, source, width, split, rows_of(v),
            FORWARD=score.forward, GRADIENT=score.gradient, QUICK=score.quick, S_BLOCK=block, A_BLOCK=a_block,
            STAGES=tile.stages, TARGET=target(), num_warps=tile.warps,
        )  # fmt: skip
    d_query, d_v = partial.sum(1).unbind(1)
    if v is None:
        return d_query.to(query.dtype), d_keys, None
    heads = rows_of(v)
    d_query = d_query.view(-1, heads, width) * v.view(heads, width).float()
    d_v = d_v.reshape(-1, heads, width).sum(0).view_as(v)
    return d_query.view_as(query).to(query.dtype), d_keys, d_v.to(v.dtype)
