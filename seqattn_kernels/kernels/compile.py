"""Compiles every kernel ahead of time for several GPUs, without having one.

    python -m seqattn_kernels.kernels.compile [--target sm_90] [--match scores_fwd]

Prints registers, spills, shared memory, and what the inner loop is made of. A spill in a loop fails; one outside costs
a program a few instructions, and is only printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.alignment import LARGEST_BLOCK, monotonic_bwd_kernel, monotonic_fwd_kernel
from seqattn_kernels.kernels.context import contain_kernel
from seqattn_kernels.kernels.disassembly import Listing, listing
from seqattn_kernels.kernels.exponentials import GROUP, UNROLL, exponentials_kernel, group_of
from seqattn_kernels.kernels.features import feature_bwd_kernel, feature_fwd_kernel
from seqattn_kernels.kernels.pooling import pool_bwd_kernel, pool_fwd_kernel
from seqattn_kernels.kernels.rows import normalize_bwd_kernel, normalize_fwd_kernel
from seqattn_kernels.kernels.score_backward import scores_bwd_kernel
from seqattn_kernels.kernels.score_forward import scores_fwd_kernel
from seqattn_kernels.kernels.scores import SCORES
from seqattn_kernels.kernels.step import step_bwd_kernel, step_fwd_kernel, step_join_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Pointers of a fixed type; the others are of the inputs' type.
TYPES = {"lengths": "*i64", "used": "*u8"} | dict.fromkeys(
    [
        "scores",
        "partial",
        "q_exp",
        "k_exp",
        "own_exp",
        "other_exp",
        "q_spans",
        "k_spans",
        "own_spans",
        "other_spans",
        "spans",
        "coefficients",
        "d_v",
        "d_scores",
        "d_own",
        "out",
    ],
    "*fp32",
)
INTEGERS = {"n_step", "m_step", "mask_b", "mask_t", "splits", "heads", "weights_b", "weights_t", "weights_s"}
INTEGERS |= {"values_b", "values_s", "values_d", "features_b", "features_t"}
NUMBERS = ("scale", "temperature", "fill", "factor")


# An H200: instructions its 528 schedulers issue and special functions its multiprocessors compute in a second, a lane
# each.
ISSUED = 528 * 32 * 1.98e9
SPECIAL = 132 * 16 * 1.98e9
BAR = 64 * 512 * 512 * 512  # terms of the forward pass whose time is predicted: B, T, S, A


@dataclass
class Configuration:
    """One kernel as the launcher would call it. terms: of [T, S, A] that an iteration of the inner loop serves."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    dtype: str = "fp32"
    terms: int = 0
    types: dict[str, str] = field(default_factory=dict)
    registers: int | None = None


def configurations(tuning: bool) -> Iterator[Configuration]:
    """What is compiled; with `tuning`, in every tile size of the table, not only the one that is taken."""
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        yield from _exponentials(dtype)
        for forward in tiles.FORWARD_TILES if tuning else [tiles.FORWARD]:
            yield _scores_fwd(forward, dtype)
        for backward in tiles.BACKWARD_TILES if tuning else [tiles.BACKWARD]:
            yield from _scores_bwd(backward, dtype)
        yield from _rows(dtype)
        for step in tiles.STEP_TILES if tuning else [tiles.STEP[size]]:
            yield from _step_fwd(step, dtype)
        for step in tiles.STEP_BACKWARD_TILES if tuning else [tiles.STEP_BACKWARD]:
            yield _step_bwd(step, dtype)
        yield Configuration("contain", contain_kernel, dict(values_d=1, T_BLOCK=16, D_BLOCK=64), 4, dtype)
        yield from _features(dtype)
        if dtype == "fp32":
            yield from _alignment()
        yield Configuration("step_join", step_join_kernel, dict(SPLITS=8, S_BLOCK=512, D_BLOCK=128), 4, dtype)
    yield from _any_score()


def _exponentials(dtype: str) -> Iterator[Configuration]:
    for name, block in (("queries", tiles.FORWARD.T), ("keys", tiles.FORWARD.S), ("either side, backward", 1)):
        group = group_of(block)
        constants: dict[str, Any] = dict(BLOCK=block, GROUP=group, UNROLL=UNROLL, V_COLUMNS=512, COLUMNS=2048 // group)
        if name != "queries":
            constants |= dict(v=None, coefficients=None)
        yield Configuration(f"exponentials of {name}", exponentials_kernel, constants, 4, dtype)


def _scores_fwd(tile: tiles.ForwardTile, dtype: str) -> Configuration:
    constants = dict(
        FORWARD=SCORES["additive"].forward, MERGED=True, T_BLOCK=tile.T, S_BLOCK=tile.S, UNROLL=tile.unroll,
        COLUMNS=512, BY_THREE=tile.by_three, STAGES=tile.stages, Q_GROUP=group_of(tile.T), K_GROUP=group_of(tile.S),
    )  # fmt: skip
    name = f"scores_fwd {tile.T}x{tile.S}, {tile.stages} x {tile.unroll} columns, by {3 if tile.by_three else 4}"
    terms = tile.T * tile.S * tile.unroll
    return Configuration(name, scores_fwd_kernel, constants, tile.warps, dtype, terms, registers=tile.registers)


def _scores_bwd(tile: tiles.BackwardTile, dtype: str) -> Iterator[Configuration]:
    score = SCORES["additive"]
    for own_query in (True, False):
        constants = dict(
            FORWARD=score.forward, GRADIENT=score.gradient, MERGED=True, OWN_QUERY=own_query, WITH_V=own_query,
            N_BLOCK=tile.N, A_BLOCK=tile.A, STAGES=tile.stages, ROWS=tile.rows, PRECISE=dtype == "fp32",
            GROUP_ROWS=GROUP,
        )  # fmt: skip
        constants |= {"m_step": 1} if own_query else {"n_step": 1, "d_v": None}
        side = "query, v" if own_query else "keys"
        name = f"scores_bwd {side} {tile.N}x{tile.A}, {tile.stages} x {tile.rows} rows"
        terms = tile.N * tile.A * tile.rows
        registers = tile.registers if own_query else tile.key_registers
        yield Configuration(name, scores_bwd_kernel, constants, tile.warps, dtype, terms, registers=registers)


def _rows(dtype: str) -> Iterator[Configuration]:
    for kind in ("softmax", "sparsemax", "entmax15", "sigmoid"):
        for mask, type in (("no mask", None), ("added mask", "*" + dtype), ("boolean mask", "*u8")):
            constants = dict(KIND=kind, ADDED=mask == "added mask", BLOCK=1024) | ({} if type else {"mask": None})
            types = {"mask": type} if type else {}
            forward = constants | dict(SCALED=True, FILLED=True, ZERO_EMPTY=True)
            yield Configuration(
                f"normalize_fwd {kind}, {mask}", normalize_fwd_kernel, forward, 2, dtype, types=types
            )  # fmt: skip
            yield Configuration(f"normalize_bwd {kind}, {mask}", normalize_bwd_kernel, constants, 2, dtype, types=types)


def _step_fwd(tile: tiles.StepTile, dtype: str) -> Iterator[Configuration]:
    for whole in (True, False):
        constants = dict(
            FORWARD=SCORES["additive"].forward, QUICK=SCORES["additive"].quick, ADDED=False,
            S_BLOCK=tile.elements // 512, A_BLOCK=512, D_BLOCK=512, WHOLE=whole, STAGES=tile.stages, mask=None,
            features=None, feature_weight=None,
        )  # fmt: skip
        name = f"step_fwd {'whole' if whole else 'split'} {tile.elements}, {tile.stages} stages"
        yield Configuration(name, step_fwd_kernel, constants, tile.warps, dtype, tile.elements)
    scores = constants | dict(QUICK=None, values=None, features_t=0, WHOLE=False)
    del scores["features"], scores["feature_weight"]
    yield Configuration("step_fwd scores with features", step_fwd_kernel, scores, tile.warps, dtype)


def _step_bwd(tile: tiles.StepTile, dtype: str) -> Configuration:
    score = SCORES["additive"]
    constants = dict(
        FORWARD=score.forward, GRADIENT=score.gradient, QUICK=score.quick, S_BLOCK=tile.elements // 512, A_BLOCK=512,
        STAGES=tile.stages,
    )  # fmt: skip
    name = f"step_bwd {tile.elements}, {tile.stages} stages"
    return Configuration(name, step_bwd_kernel, constants, tile.warps, dtype, tile.elements)


def _features(dtype: str) -> Iterator[Configuration]:
    tile = tiles.FEATURES
    for reduce in (False, True):
        for name, add, write in (("whole", True, True), ("sums", True, False), ("weights", False, True)):
            constants = dict(
                ADD=add, WRITE=write, REDUCE=reduce, SPLITS=8, S_BLOCK=tile.S, D_BLOCK=tile.D, STAGES=tile.stages,
            )  # fmt: skip
            name += ", reduced" if reduce else ""
            types = {"mask": "*u8"}
            yield Configuration(f"feature_fwd {name}", feature_fwd_kernel, constants, tile.warps, dtype, types=types)
            yield Configuration(f"feature_bwd {name}", feature_bwd_kernel, constants, tile.warps, dtype, types=types)
    for rows in (16, tiles.POOL.R):
        constants = dict(R_BLOCK=rows, S_BLOCK=tiles.POOL.S, A_BLOCK=tiles.POOL.A)
        types = {"scores": "*" + dtype, "d_scores": "*" + dtype}
        yield Configuration(f"pool_fwd {rows} rows", pool_fwd_kernel, constants, tiles.POOL.warps, dtype, types=types)
        yield Configuration(f"pool_bwd {rows} rows", pool_bwd_kernel, constants, tiles.POOL.warps, dtype, types=types)


def _alignment() -> Iterator[Configuration]:
    for block in (64, LARGEST_BLOCK):
        warps = max(1, block // 256)
        yield Configuration(f"monotonic_fwd {block} keys", monotonic_fwd_kernel, dict(BLOCK=block), warps)
        yield Configuration(f"monotonic_bwd {block} keys", monotonic_bwd_kernel, dict(BLOCK=block), warps)


def _any_score() -> Iterator[Configuration]:
    """The form that knows nothing of the score but its two functions."""
    dot, forward, backward = SCORES["dot"], tiles.FORWARD, tiles.BACKWARD
    absent: dict[str, Any] = dict.fromkeys(["q_exp", "k_exp", "coefficients", "q_spans", "k_spans", "v"])
    constants = dict(
        FORWARD=dot.forward, MERGED=False, T_BLOCK=forward.T, S_BLOCK=forward.S, UNROLL=16, COLUMNS=16, STAGES=1,
        Q_GROUP=16, K_GROUP=32,
    )  # fmt: skip
    yield Configuration("scores_fwd of any score", scores_fwd_kernel, constants | absent, forward.warps)
    absent = dict.fromkeys(["own_exp", "other_exp", "own_spans", "other_spans", "v", "d_v"])
    constants = dict(
        FORWARD=dot.forward, GRADIENT=dot.gradient, MERGED=False, OWN_QUERY=True, WITH_V=False, N_BLOCK=backward.N,
        A_BLOCK=backward.A, STAGES=1, ROWS=backward.rows, PRECISE=True, GROUP_ROWS=GROUP,
    )  # fmt: skip
    yield Configuration("scores_bwd of any score", scores_bwd_kernel, constants | absent, backward.warps)


def compiled(configuration: Configuration, target: GPUTarget) -> Any:
    constants = {"TARGET": target.backend} | configuration.constants
    signature, attributes = {}, {}
    for i, parameter in enumerate(configuration.kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in constants:
            signature[name] = "constexpr"
            if parameter.has_default:
                constants.setdefault(name, getattr(parameter.default, "value", parameter.default))
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name.isupper() or name in INTEGERS:
            signature[name] = "i32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = configuration.types.get(name) or TYPES.get(name) or "*" + configuration.dtype
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    limits = tiles.limits(configuration.registers, target.backend)
    source = ASTSource(fn=configuration.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": configuration.warps, **limits})


def described(c: Configuration, found: Listing, target: GPUTarget) -> str:
    line = f"{c.name:46}{c.dtype:5}{found.registers:4} regs {found.spilled:4} spilled {found.shared:6} B"
    if not c.terms or not found.loop:
        return line
    line += " | "
    if target.backend == "cuda":
        issued = found.loop.total() * target.warp_size * c.warps / c.terms
        line += f"{issued:5.2f} a term"
        if c.name.startswith("scores") and target == TARGETS["sm_90"]:
            special = found.loop["MUFU"] * target.warp_size * c.warps / c.terms
            longest = max(issued / ISSUED, special / SPECIAL)
            line += f", {1e3 * BAR * longest:.2f} ms (a tanh each: {1e3 * BAR / SPECIAL:.2f})"
        line += ": "
    return line + ", ".join(f"{n} {op}" for op, n in found.loop.most_common(7))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every kernel ahead of time; print registers, spills, shared memory, the inner loop, the "
        "time that its instructions take at (B, T, S, A) = (64, 512, 512, 512) on an H200 when one issues every cycle, "
        "or its special functions where they take longer."
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="all by default")
    parser.add_argument("--match", default="", help="only configurations whose name holds this")
    parser.add_argument("--tuning", action="store_true", help="every tile size of the table, of which some may spill")
    options = parser.parse_args()
    failed = 0
    for name in options.target or TARGETS:
        target = TARGETS[name]
        for c in configurations(options.tuning):
            if options.match in c.name:
                found = listing(compiled(c, target), target)
                print(f"{name:7}" + described(c, found, target), flush=True)
                failed += found.again > 0
    if failed:
        print(f"{failed} kernels spill in a loop", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
