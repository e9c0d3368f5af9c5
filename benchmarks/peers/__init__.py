"""The contestants, one file each. One that is not installed, or can't take a case, says why and is left out by name."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from benchmarks.problems import Named, Problem


@dataclass(frozen=True)
class Entry:
    """A contestant ready to run: the call that is timed, and one run's results in the form they are checked in."""

    call: Callable[[], Any]
    outcome: Callable[[], Named]
    linger: float = 0.0  # seconds its threads stay busy after the last call
    dtype: torch.dtype | None = None  # one coarser than the case's that it computes in, which sets its tolerance
    omits: tuple[str, ...] = ()  # results of the case it does not return
    module: nn.Module | None = None  # whose parameters get gradients, where it is a torch module
    replays: bool = False  # the call replays a recorded graph


class Unsuitable(Exception):
    """A contestant found only while it got ready that it can't take the case; the message says why."""


class Peer(ABC):
    """Something that can compute a case."""

    name: str
    package: str

    def why_not(self, problem: Problem) -> str | None:
        """None where it can take the case, else the reason it can't."""
        return None

    def takes_minutes(self, problem: Problem) -> bool:
        """Whether getting ready takes so long that it joins only when asked for by name."""
        return False

    @abstractmethod
    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        """Get ready with torch's present number of threads. What must be undone afterwards goes on the stack."""

    def installed(self) -> str | None:
        """None where the package is there, else what is missing."""
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        return None


@lru_cache
def registry() -> dict[str, Peer]:
    """Every contestant by name."""
    from benchmarks.peers import cuda, flashrnn, haste, onnxruntime, openvino, ours, torch_compile, torch_eager

    peers = [torch_eager.TorchEager(), *ours.VARIANTS, torch_compile.TorchCompile()]
    peers += [onnxruntime.OnnxRuntime(), openvino.OpenVino(), *cuda.PEERS, haste.Haste(), flashrnn.FlashRnn()]
    return {peer.name: peer for peer in peers}
