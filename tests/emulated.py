"""Emulated global memory for tests: tensors go into guarded buffers and come back."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
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


@functools.cache
def kernels(library: Path | None = None) -> dict[int, str]:
    """Every instance of every CUDA kernel in a library, by default the module: where it stands, its plain name."""
    declared = "".join(p.read_text() for p in (emulator_build.CSRC / "cuda").glob("*.cuh"))
    names = set(re.findall(r"\bSEQATTN_KERNEL\([^;{]*?\)\n(\w+)\(", declared))
    command = ["nm", "-C", str(library or emulator().__file__)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for place, name in re.findall(r"^(\w+) [a-zA-Z] (?:void )?seqattn::gpu::(\w+(?:<.*>)?)\([^{\n]*\)$", listing, re.M):
        if name.split("<")[0] in names:
            found[int(place, 16)] = re.sub(r"\bseqattn::(gpu::|emulator::)?", "", name).replace("> >", ">>")
    assert names == {name.split("<")[0] for name in found.values()}, "kernels that are never started, or names unread"
    return found


_ever_launched: set[str] = set()


def take_launched(library: Path | None = None) -> set[str]:
    """Names of the kernels that a library started since the last call, but for the emulator's own samples."""
    places = (ctypes.c_uint64 * 4096)()
    count = ctypes.CDLL(str(library or emulator().__file__)).seqattn_take_launched(places, ctypes.c_int64(len(places)))
    assert count <= len(places)
    names = {name for place in places[:count] if (name := kernels(library).get(place))}
    note_launched(names)
    return names


def note_launched(names: set[str]) -> None:
    """Those that another process started for a test of this one."""
    _ever_launched.update(names)


def ever_launched() -> set[str]:
    """Those of all tests so far."""
    take_launched()
    return set(_ever_launched)


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
