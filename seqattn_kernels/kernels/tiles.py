"""Tile sizes: one table, with a fixed choice, so that nothing is tuned unless somebody asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardTile:
    T: int
    S: int
    unroll: int
    warps: int


@dataclass(frozen=True)
class BackwardTile:
    N: int
    A: int
    warps: int


FORWARD = ForwardTile(T=32, S=128, unroll=16, warps=4)
BACKWARD = BackwardTile(N=16, A=128, warps=4)

# What `compile.py` compiles and a tuning run may try.
FORWARD_TILES = [FORWARD, ForwardTile(32, 128, 8, 4), ForwardTile(32, 256, 16, 8), ForwardTile(64, 128, 16, 8)]
BACKWARD_TILES = [BACKWARD, BackwardTile(32, 128, 4), BackwardTile(8, 128, 4), BackwardTile(16, 256, 8)]
