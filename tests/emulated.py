"""Emulated global memory for tests: tensors go into guarded buffers and come back."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import emulator_build


@functools.cache
def emulator() -> Any:
    """The module, built where it is not up to date. SEQATTN_EMULATOR names one that is built already."""
    given = os.environ.get("SEQATTN_EMULATOR")
    return emulator_build.load(Path(given) if given else emulator_build.build())


class Memory:
    """Buffers by name, each at the end (or the start) of its own pages, full of NaN before anything is written."""

    def __init__(self, at_end: bool = True) -> None:
        self.at_end = at_end
        self.buffers: dict[str, tuple[Any, torch.dtype, tuple[int, ...]]] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        size = torch.Size(shape).numel() * dtype.itemsize
        self.buffers[name] = (emulator().Buffer(name, size, self.at_end), dtype, shape)
        return name

    def put(self, name: str, value: Tensor | None) -> int:
        """The address of a copy; 0 for None."""
        if value is None:
            return 0
        self.empty(name, *value.shape, dtype=value.dtype)
        if value.numel():
            self._bytes(name).copy_(value.detach().contiguous().reshape(-1).view(torch.uint8))
        return self.address(name)

    def set(self, name: str, value: Tensor) -> None:
        """Writes over a buffer, in its dtype."""
        _, dtype, shape = self.buffers[name]
        if value.numel():
            self._bytes(name).copy_(value.expand(shape).to(dtype).contiguous().reshape(-1).view(torch.uint8))

    def address(self, name: str) -> int:
        return self.buffers[name][0].address

    def get(self, name: str) -> Tensor:
        _, dtype, shape = self.buffers[name]
        if torch.Size(shape).numel() == 0:
            return torch.empty(shape, dtype=dtype)
        return self._bytes(name).clone().view(dtype).reshape(shape)

    def _bytes(self, name: str) -> Tensor:
        return torch.frombuffer(self.buffers[name][0], dtype=torch.uint8)
