"""Fake kernels: the shapes and dtypes of an operator's results, for tracing and for the device "meta"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.library.register_fake` for an operator whose tensors are all on one device.

    Where one tensor of a call is on "meta" and another is not, torch calls the fake kernel, whose results hold nothing
    that was computed. Such a call is refused.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def checked(*args: Any) -> Any:
            _expect_all_or_none_on_meta(name, args)
            return fake(*args)

        torch.library.register_fake(name)(checked)
        return fake

    return register


def _expect_all_or_none_on_meta(name: str, args: tuple[Any, ...]) -> None:
    given = [
        (i, t)
        for i, arg in enumerate(args)
        for t in (arg if isinstance(arg, (list, tuple)) else [arg])
        if isinstance(t, Tensor)
    ]
    if given and any(t.is_meta != given[0][1].is_meta for _, t in given):
        _, first = given[0]
        place, other = next((i, t) for i, t in given if t.is_meta != first.is_meta)
        operator = getattr(torch.ops.seqattn, name.removeprefix("seqattn::")).default
        names = [argument.name for argument in operator._schema.arguments]
        raise ValueError(
            f"{names[place]}: expected device {first.device} (from {names[given[0][0]]}), got {other.device}"
        )
