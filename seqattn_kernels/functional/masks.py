"""Which keys a query may attend to, brought from the forms libraries give it in to one."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels.functional.arguments import FLOATS, INTEGERS
from seqattn_kernels.reference.attention import attended, without_unattended

Masks = tuple[Tensor | None, Tensor | None]  # lengths, int64 [B], and a mask


def resolve_masks(
    query: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    mask_polarity: str = "attend",
    causal: bool = False,
) -> Masks:
    """Lengths [B] (int64) and a mask of a shape the operators take, on the query's device; None where all attend.

    Only the shapes of query [B, ..] or [B, T, ..] and keys [B, S, ..] are looked at.
    """
    steps = query.shape[1] if query.dim() == 3 else None
    return resolve(keys.shape[0], steps, keys.shape[1], query.device, lengths, mask, mask_polarity, causal)


def resolve(
    batch: int,
    steps: int | None,
    source: int,
    device: torch.device,
    lengths: Tensor | None,
    mask: Tensor | None,
    mask_polarity: str = "attend",
    causal: bool = False,
) -> Masks:
    """`resolve_masks` by sizes; steps is None for one query without a dimension of time."""
    if mask_polarity not in ("attend", "ignore"):
        raise ValueError(f"mask_polarity: expected 'attend' or 'ignore' (what True means), got {mask_polarity!r}")
    if lengths is not None:
        lengths = _absolute(lengths, batch, source, device)
    if mask is not None:
        _check_mask(mask, batch, 1 if steps is None else steps, source, device)
        if mask.dtype == torch.bool and mask_polarity == "ignore":
            mask = ~mask
    if causal:
        if steps is None:
            raise ValueError("causal: expected a query [B, T, A], got one without a dimension of time")
        earlier = torch.ones(steps, source, dtype=torch.bool, device=device).tril().expand(batch, steps, source)
        if mask is None:
            mask = earlier
        else:
            mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
            mask = mask & earlier if mask.dtype == torch.bool else torch.where(earlier, mask, -torch.inf)
    return lengths, mask


def _absolute(lengths: Tensor, batch: int, source: int, device: torch.device) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a tensor, got {type(lengths).__name__}")
    relative = lengths.dtype in FLOATS
    if not relative and lengths.dtype not in INTEGERS:
        raise TypeError(f"lengths: expected an integer dtype, or fractions of S, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected [B] with B={batch} (from keys), got {list(lengths.shape)}")
    if lengths.is_meta and device.type != "meta":
        raise ValueError(f"lengths: expected values, as on {device}, got the device meta, which has none")
    # Values are looked at where that needs no wait for a device.
    visible = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if relative:
        if visible:
            _check_values(lengths, 1, "fractions in [0, 1], lengths over S of keys")
        wide = lengths if lengths.dtype in (torch.float32, torch.float64) else lengths.float()
        lengths = (wide * source).round().nan_to_num().clamp(0, source)
    elif visible:
        _check_values(lengths, source, f"values in [0, {source}] (S of keys)")
    if lengths.dtype != torch.int64 or lengths.device != device:
        lengths = lengths.to(device, torch.int64)
    return lengths


def _check_values(lengths: Tensor, most: int, expected: str) -> None:
    if not lengths.numel():
        return
    smallest, largest = lengths.aminmax()
    if not (smallest.item() >= 0 and largest.item() <= most):  # NaN is neither
        place = int((~((lengths >= 0) & (lengths <= most))).int().argmax())
        raise ValueError(f"lengths: expected {expected}, got {lengths[place].item():g} at [{place}]")


def _check_mask(mask: Tensor, batch: int, steps: int, source: int, device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise TypeError(f"mask: expected torch.bool or a floating dtype, got {mask.dtype}")
    shapes = [(batch, source), (batch, 1, source), (batch, steps, source)]
    if mask.shape not in shapes:
        raise ValueError(
            f"mask: expected [B, S], [B, 1, S] or [B, T, S] with B={batch}, T={steps}, S={source}, "
            f"got {list(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"mask: expected device {device} (from query), got {mask.device}")


def attended_keys(keys: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """keys with zeros where no query attends, before a projection: its gradient multiplies them by zero, and 0 * NaN
    is NaN. The masks are resolved ones."""
    if lengths is None and mask is None:
        return keys
    return without_unattended(keys, attended(keys, lengths, mask))
