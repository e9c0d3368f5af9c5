"""From scores to weights in plain torch: masks, then softmax, sparsemax, entmax-1.5 or sigmoid over the keys.

Scores and weights are [B, T, S]. Masks are as in `seqattn_kernels.reference.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


def sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex nearest to z (Martins and Astudillo, 2016): max(z - tau, 0)."""
    z = z - _largest(z)
    if not z.shape[-1]:
        return z
    with torch.no_grad():
        ordered = z.sort(-1, descending=True).values
        rank = _ranks(z)
        size = (1 + rank * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
        support = z >= ordered.gather(-1, (size - 1).clamp(min=0))
    tau = (torch.where(support, z, 0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return torch.where(support, z - tau, 0).clamp(min=0) + _nan_rows(z)


def entmax15(z: Tensor) -> Tensor:
    """1.5-entmax by sorting (Peters, Niculae, Martins, 2019): max(z / 2 - tau, 0) ** 2."""
    # What lies more than 2 below the largest has no weight, and its square must not overflow.
    z = ((z - _largest(z)) / 2).clamp(min=-2)
    if not z.shape[-1]:
        return z
    with torch.no_grad():
        ordered = z.sort(-1, descending=True).values
        size = (_threshold(ordered, _ranks(z)) <= ordered).sum(-1, keepdim=True)
        support = z >= ordered.gather(-1, (size - 1).clamp(min=0))
    count = support.sum(-1, keepdim=True)
    mean = torch.where(support, z, 0).sum(-1, keepdim=True) / count
    spread = torch.where(support, z - mean, 0).square().sum(-1, keepdim=True)
    tau = mean - ((1 - spread) / count).sqrt()
    return torch.where(support, z - tau, 0).clamp(min=0).square() + _nan_rows(z)


def _threshold(ordered: Tensor, rank: Tensor) -> Tensor:
    """tau for each size of the support."""
    mean = ordered.cumsum(-1) / rank
    spread = rank * (ordered.square().cumsum(-1) / rank - mean.square())
    return mean - ((1 - spread) / rank).clamp(min=0).sqrt()


def _ranks(z: Tensor) -> Tensor:
    return torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)


def _largest(z: Tensor) -> Tensor:
    """The largest of each row, not differentiated: the result doesn't depend on it."""
    return z.detach().amax(-1, keepdim=True) if z.shape[-1] else z.detach()


def _nan_rows(z: Tensor) -> Tensor:
    """0, or NaN in rows with a NaN, which comparisons would lose."""
    return z.new_zeros(()).masked_fill(z.isnan().any(-1, keepdim=True), math.nan)


NORMALIZERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "sigmoid": torch.sigmoid,
}


def hidden_by(
    source: int, lengths: Tensor | None, mask: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Where lengths or a boolean mask hide a key, and where an added -inf does: each [B, 1 or T, S] or None."""
    hidden = barred = None
    if lengths is not None:
        hidden = (torch.arange(source, device=device) >= lengths.to(device).unsqueeze(1)).unsqueeze(1)
    if mask is not None:
        wide = mask.unsqueeze(1) if mask.dim() == 2 else mask
        if mask.dtype == torch.bool:
            hidden = ~wide if hidden is None else hidden | ~wide
        else:
            barred = wide == -math.inf
    return hidden, barred


def normalize(
    kind: str,
    scores: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    fill: float = -math.inf,
    zero_empty: bool = True,
) -> Tensor:
    """Weights [B, T, S]: ``kind`` of ``(scale * scores + mask) / temperature``, with `fill` where a key is hidden.

    Keys that a floating mask bars by -inf stay at -inf. With ``zero_empty`` a query without keys has zero weights and,
    where the fill is -inf, hidden keys have none even if a score is NaN; without, all is as softmax makes it.
    """
    z = scores if scale == 1.0 else scores * scale
    if mask is not None and mask.dtype != torch.bool:
        z = z + (mask.unsqueeze(1) if mask.dim() == 2 else mask)
    hidden, barred = hidden_by(scores.shape[-1], lengths, mask, scores.device)
    if barred is not None:
        z = z.masked_fill(barred, -math.inf)
    if hidden is not None:
        z = z.masked_fill(hidden, fill)
    if temperature != 1.0:
        z = z / temperature
    weights = NORMALIZERS[kind](z)
    if hidden is None and barred is None:
        return weights
    unattended = barred if hidden is None else hidden if barred is None else hidden | barred
    assert unattended is not None
    if not zero_empty:
        return weights
    return weights.masked_fill(unattended if fill == -math.inf else unattended.all(-1, keepdim=True), 0)
