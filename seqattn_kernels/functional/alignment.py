"""Attention that knows where it is: local windows, and monotonic alignment."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqattn_kernels import ops
from seqattn_kernels.functional.arguments import expect_devices, expect_floats, expect_rank, explain_shapes
from seqattn_kernels.functional.attention import PreparedKeys, finish
from seqattn_kernels.functional.masks import resolve, resolve_masks
from seqattn_kernels.functional.scoring import attend, scores_of
from seqattn_kernels.functional.weighting import Weighting, choose_backend, context_of, weighting_of
from seqattn_kernels.reference import alignment
from seqattn_kernels.reference.attention import attended


def local_attention(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    window: float,
    values: Tensor | None = None,
    *,
    score: str = "dot",
    v: Tensor | None = None,
    gaussian: bool = True,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Local attention (Luong, Pham, Manning, 2015): softmax over a window of keys around a position.

    Args:
        query: [B, A] or [B, T, A].
        keys: [B, S, A].
        position: [B] or [B, T], floating, in keys. local-m: the number of the step; local-p: ``S * sigmoid(..)`` of the
            query, see `predict_position`.
        window: D: keys within D of the position are attended to.
        score: "dot", "additive" (then with v [A]), or a name of `register_score`.
        gaussian: multiply the weights with a Gaussian of deviation D / 2 around the position, as local-p does. They
            then no longer sum to 1, and the position gets a gradient.
        values, lengths, mask and the others: as in `additive_attention`, and so are the results.
    """
    values = keys if values is None else values
    _check(query, keys, values, v)
    if position.shape != query.shape[:-1]:
        raise ValueError(f"position: expected {list(query.shape[:-1])} (from query), got {list(position.shape)}")
    if not position.is_floating_point():
        raise TypeError(f"position: expected a floating dtype, got {position.dtype}")
    if not window > 0:
        raise ValueError(f"window: expected a positive number of keys, got {window}")
    chosen = weighting_of(weighting)
    lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity)
    single, dtype, source = query.dim() == 2, query.dtype, keys.shape[1]
    if single:
        query, position = query.unsqueeze(1), position.unsqueeze(1)
    position = position if position.dtype == torch.float64 else position.float()
    near = alignment.window_mask(position.detach(), source, window)
    if mask is None:
        mask = near
    else:
        mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
        mask = mask & near if mask.dtype == torch.bool else torch.where(near, mask, -math.inf)
    context, weights = attend(
        score,
        query,
        keys,
        v,
        values[..., :0] if gaussian else values,
        lengths,
        mask,
        weighting=replace(chosen, dropout=0.0) if gaussian else chosen,
        need_weights=gaussian or need_weights,
        backend=backend,
    )
    if gaussian:
        assert weights is not None
        weights = weights * alignment.gaussian(position, source, window / 2)
        context = context_of(weights.to(values.dtype), values, lengths, mask, chosen)
    return finish(context, weights if need_weights else None, single, dtype)


def predict_position(query: Tensor, weight: Tensor, v: Tensor, source: int, lengths: Tensor | None = None) -> Tensor:
    """Where local-p looks: ``S * sigmoid(v . tanh(weight @ query))``, S the length of each source.

    query [B, Q] or [B, T, Q], weight [A, Q], v [A], lengths [B] absolute or relative -> [B] or [B, T].
    """
    expect_rank("query", query, "[B, Q] or [B, T, Q]", 2, 3)
    share = ((query @ weight.t()).tanh() @ v).sigmoid()
    if lengths is None:
        return share * source
    steps = query.shape[1] if query.dim() == 3 else None
    absolute, _ = resolve(query.shape[0], steps, source, query.device, lengths, None)
    assert absolute is not None
    longest = absolute.to(share.dtype)
    return share * (longest if share.dim() == 1 else longest.unsqueeze(1))


def monotonic_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    v: Tensor,
    values: Tensor | None = None,
    previous: Tensor | None = None,
    *,
    score_bias: Tensor | float = 0.0,
    mode: str = "expected",
    noise: float = 0.0,
    score: str = "additive",
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Monotonic attention (Raffel et al., 2017): attention moves forward only, and stops with probability sigmoid(e).

    Energies are ``e = v . tanh(query + keys) + score_bias``.

    Args:
        query: [B, A], one step, or [B, T, A], steps in order.
        keys: [B, S, A], or prepared.
        v: [A]; the paper's has a free length: ``g * v / |v|``.
        values: [B, S, D]; the keys by default.
        previous: [B, S], the weights of the step before; None: at the first key.
        score_bias: r, a number or a tensor without dimensions; below 0 at first (-4), so that attention moves on.
        mode: "expected" is where attention stands in expectation, for training, by a recurrence without quotients;
            "hard" stops at the first key with e > 0, for inference. Both return ``weights`` to pass on as `previous`.
        noise: deviation of the noise added to the energies of "expected", by torch's generator: it drives them away
            from 0, so that the hard form then does the same. For training.
        score, lengths, mask, need_weights, backend: as in `local_attention`; masks are boolean.

    Returns:
        context [B, D] or [B, T, D], weights [B, S] or [B, T, S]. Weights sum to less than 1 where attention passed the
        last key.
    """
    prepared = None
    if isinstance(keys, PreparedKeys):
        prepared = keys
        keys.check_unchanged()
        keys = keys.keys
    values = keys if values is None else values
    _check(query, keys, values, v)
    if mode not in ("expected", "hard"):
        raise ValueError(f"mode: expected 'expected' or 'hard', got {mode!r}")
    if isinstance(mask, Tensor) and mask.is_floating_point():
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    if isinstance(score_bias, Tensor) and score_bias.dim():
        raise ValueError(f"score_bias: expected a number or a tensor [], got {list(score_bias.shape)}")
    lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity)
    batch, source = keys.shape[:2]
    single, dtype = query.dim() == 2, query.dtype
    if previous is not None and previous.shape != (batch, source):
        raise ValueError(
            f"previous: expected [B, S] with B={batch}, S={source} (from keys), got {list(previous.shape)}"
        )
    if single:
        query = query.unsqueeze(1)
    if dtype not in (torch.float32, torch.float64):
        query, keys, v = query.float(), prepared.wide if prepared is not None else keys.float(), v.float()
    energies = scores_of(score, query, keys, v, lengths, mask, backend=backend) + score_bias
    attend_to = attended(keys, lengths, mask)
    if mode == "hard":
        choose = (energies > 0).to(energies.dtype)
    else:
        if noise:
            energies = energies + noise * torch.randn_like(energies)
        choose = energies.sigmoid()
    if attend_to is not None:
        choose = choose.masked_fill(~attend_to, 0)
    if previous is None:
        previous = choose.new_zeros(batch, source)
        previous[:, :1] = 1
    by_reference = choose_backend(choose, backend) == "reference"
    align = alignment.monotonic_alignment if by_reference else ops.alignment.monotonic
    weights = align(choose, previous.to(choose.dtype))
    if attend_to is not None:
        # A key that is NaN makes the probability of coming by all later ones NaN; hidden ones still have no weight.
        weights = weights.masked_fill(~attend_to, 0)
    context = context_of(weights.to(values.dtype), values, lengths, mask, weighting_of(None))
    return finish(context, weights if need_weights else None, single, dtype)


def _check(query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None) -> None:
    expect_rank("query", query, "[B, A] or [B, T, A]", 2, 3)
    expect_rank("keys", keys, "[B, S, A]", 3)
    expect_rank("values", values, "[B, S, D]", 3)
    batch, width = query.shape[0], query.shape[-1]
    if keys.shape[0] != batch or keys.shape[2] != width or values.shape[:2] != keys.shape[:2]:
        explain_shapes(query, keys, values)
    tensors = {"query": query, "keys": keys, "values": values}
    if v is not None:
        if v.shape != (width,):
            explain_shapes(query, keys, values, v)
        tensors["v"] = v
    expect_floats(**tensors)
    expect_devices(**tensors)
