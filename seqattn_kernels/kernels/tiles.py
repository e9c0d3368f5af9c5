"""Tile sizes: one table, with a fixed choice, so that nothing is tuned unless somebody asks."""

from __future__ import annotations

from dataclasses import dataclass


def limits(registers: int | None, target: str) -> dict[str, int]:
    """Options that bound the registers of a kernel on NVIDIA, so that more of its blocks fit."""
    return {"maxnreg": registers} if registers and target == "cuda" else {}


@dataclass(frozen=True)
class ForwardTile:
    T: int
    S: int
    unroll: int
    warps: int
    stages: int = 1
    registers: int | None = None
    by_three: bool = True


@dataclass(frozen=True)
class BackwardTile:
    N: int
    A: int
    warps: int
    stages: int = 1
    rows: int = 4
    registers: int | None = None  # of the kernel for queries, which adds up the gradient of v too
    key_registers: int | None = None


@dataclass(frozen=True)
class StepTile:
    elements: int  # of a block of keys, so that there are about elements / A of them
    warps: int
    stages: int
    programs: int  # that fill the GPU


@dataclass(frozen=True)
class FeatureTile:
    S: int
    D: int
    warps: int
    stages: int
    programs: int  # that fill the GPU


@dataclass(frozen=True)
class PoolTile:
    R: int  # rows of v at a time, at most
    S: int
    A: int
    warps: int
    programs: int  # that fill the GPU


FORWARD = ForwardTile(T=16, S=128, unroll=16, warps=4)
BACKWARD = BackwardTile(N=16, A=128, warps=4, stages=3, rows=8, registers=168)
# By the bytes of an element of the inputs.
STEP = {
    4: StepTile(elements=4096, warps=4, stages=3, programs=256),
    2: StepTile(elements=8192, warps=4, stages=3, programs=256),
}
STEP_BACKWARD = StepTile(elements=4096, warps=4, stages=3, programs=1024)
POOL = PoolTile(R=32, S=32, A=32, warps=4, programs=512)
FEATURES = FeatureTile(S=16, D=64, warps=4, stages=3, programs=512)

# What a tuning run tries.
FORWARD_TILES = [
    FORWARD,
    ForwardTile(16, 128, 16, 4, 1, 96),
    ForwardTile(16, 128, 8, 4, 1),
    ForwardTile(16, 128, 16, 4, 2),
    ForwardTile(32, 128, 16, 4, 1, 168),
    ForwardTile(32, 128, 8, 4, 1, 168),
]
BACKWARD_TILES = [
    BACKWARD,
    BackwardTile(32, 128, 4, 3, 8, 168, 168),
    BackwardTile(16, 128, 4, 1, 4),
    BackwardTile(16, 128, 4, 2, 4),
]
STEP_TILES = [
    StepTile(8192, 4, 3, 256),
    StepTile(4096, 4, 3, 256),
    StepTile(4096, 2, 3, 512),
    StepTile(4096, 4, 4, 256),
    StepTile(8192, 4, 4, 256),
    StepTile(8192, 4, 2, 256),
]
STEP_BACKWARD_TILES = [
    StepTile(4096, 4, 1, 2048),
    StepTile(4096, 4, 3, 1024),
    StepTile(4096, 4, 2, 1024),
    StepTile(2048, 4, 1, 2048),
    StepTile(8192, 8, 1, 1024),
]
