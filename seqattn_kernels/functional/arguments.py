"""What the attention functions check their arguments with: each error names argument, expected and got."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def expect_rank(name: str, t: Tensor, shape: str, *ranks: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(t).__name__}")
    if t.dim() not in ranks:
        raise ValueError(f"{name}: expected {shape}, got {list(t.shape)}")


def expect_shape(name: str, t: Tensor, shape: str, sizes: dict[str, int]) -> None:
    """``shape`` is as a reader writes it, "[B, S, D]"; `sizes` gives those of its letters that are known."""
    letters = shape.strip("[]").split(", ")
    expect_rank(name, t, shape, len(letters))
    if any(sizes.get(letter, size) != size for letter, size in zip(letters, t.shape, strict=True)):
        known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
        raise ValueError(f"{name}: expected {shape} with {known}, got {list(t.shape)}")


def expect_floats(**tensors: Tensor) -> None:
    """All floating and of one dtype; under autocast, where linear layers return another than they were given, any."""
    mixed = len({t.dtype for t in tensors.values()}) > 1
    first = next(iter(tensors))
    for name, t in tensors.items():
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
        if mixed and t.dtype != tensors[first].dtype and not torch.is_autocast_enabled(t.device.type):
            raise TypeError(f"{name}: expected {tensors[first].dtype} (from {first}), got {t.dtype}")


def expect_devices(query: Tensor, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.device != query.device:
            raise ValueError(f"{name}: expected device {query.device} (from query), got {t.device}")


def explain_shapes(query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None = None) -> NoReturn:
    """Says which shape is wrong."""
    expect_rank("query", query, "[B, A] or [B, T, A]", 2, 3)
    expect_rank("keys", keys, "[B, S, A]", 3)
    expect_rank("values", values, "[B, S, D]", 3)
    if v is not None:
        expect_rank("v", v, "[A]", 1)
        if v.shape[0] != query.shape[-1]:
            raise ValueError(f"v: expected [A] with A={query.shape[-1]} (from query), got {list(v.shape)}")
    batch, width = query.shape[0], query.shape[-1]
    if keys.shape[0] != batch or keys.shape[2] != width:
        raise ValueError(f"keys: expected [B, S, A] with B={batch}, A={width} (from query), got {list(keys.shape)}")
    raise ValueError(
        f"values: expected [B, S, D] with B={batch}, S={keys.shape[1]} (from keys), got {list(values.shape)}"
    )
