"""Checks of what operators are given, which name argument, expected, got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqattn_kernels.kernels.launch import Masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect_shape(name: str, t: Tensor, text: str, *shapes: Sequence[int]) -> None:
    if tuple(t.shape) not in [tuple(shape) for shape in shapes]:
        raise ValueError(f"{name}: expected {text}, got {list(t.shape)}")


def expect_rank(name: str, t: Tensor, text: str) -> None:
    """text: the dimensions, as in "[B, S, D]"."""
    if t.dim() != text.count(",") + 1:
        raise ValueError(f"{name}: expected {text}, got {list(t.shape)}")


def expect_served(name: str, t: Tensor) -> None:
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {[str(d) for d in DTYPES]}, got {t.dtype}")


def expect_dtype(name: str, t: Tensor, like: Tensor, *others: torch.dtype, source: str = "query") -> None:
    if t.dtype != like.dtype and t.dtype not in others:
        raise TypeError(f"{name}: expected {like.dtype} (from {source}), got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (from {source}), got {t.device}")


def masks_of(batch: int, steps: int, source: int, like: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Masks:
    """Lengths below 0 or above S, which can't be looked at without a wait for the device, count as 0 and S."""
    if lengths is not None:
        expect_shape("lengths", lengths, f"[B] with B={batch}", (batch,))
        expect_dtype("lengths", lengths, like, torch.int64)
        if lengths.dtype != torch.int64:
            raise TypeError(f"lengths: expected torch.int64, got {lengths.dtype}")
    if mask is not None:
        text = f"[B, S], [B, 1, S] or [B, T, S] with B={batch}, T={steps}, S={source}"
        expect_shape("mask", mask, text, (batch, source), (batch, 1, source), (batch, steps, source))
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask: expected torch.bool or a floating dtype, got {mask.dtype}")
        expect_dtype("mask", mask, like, mask.dtype)
    return Masks.of(lengths, mask)
