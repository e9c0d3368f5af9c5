"""Compiles every kernel ahead of time for several GPUs, without having one.

    python -m seqattn_kernels.kernels.compile [--target sm_90] [--match scores_fwd]

Prints registers, spills, shared memory, and what the inner loop is made of. Exit status 1 if a kernel spills.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqattn_kernels.kernels import tiles
from seqattn_kernels.kernels.exponentials import exponentials_kernel
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
INTEGERS = ("n_step", "m_step", "mask_b", "mask_t", "splits", "heads")
NUMBERS = ("scale", "temperature", "fill", "factor")


@dataclass
class Configuration:
    """One kernel as the launcher would call it. elements: of [T, S] or [N, A] that an inner iteration serves."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    dtype: str = "fp32"

    elements: int = 0
    types: dict[str, str] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)


def configurations() -> Iterator[Configuration]:
    additive, dot = SCORES["additive"], SCORES["dot"]
    plain = {"lengths": None, "used": None, "mask": None}
    for dtype in ("fp32", "bf16"):
        yield Configuration(
            "exponentials of queries",
            exponentials_kernel,
            dict(BLOCK=16, GROUP=16, UNROLL=16, V_COLUMNS=512, COLUMNS=64, **plain),
            4,
            dtype,
        )
        for block in (1, 128):
            yield Configuration(
                f"exponentials of keys, block {block}",
                exponentials_kernel,
                dict(v=None, coefficients=None, GROUP=32, BLOCK=block, UNROLL=16, V_COLUMNS=512, COLUMNS=64, mask=None),
                4,
                dtype,
            )
        for f in tiles.FORWARD_TILES:
            yield Configuration(
                f"scores_fwd {f.T}x{f.S}, {f.stages} stages of {f.unroll}, at most {f.registers or 255}",
                scores_fwd_kernel,
                dict(
                    FORWARD=additive.forward,
                    MERGED=True,
                    T_BLOCK=f.T,
                    S_BLOCK=f.S,
                    UNROLL=f.unroll,
                    COLUMNS=512,
                    STAGES=f.stages,
                    Q_GROUP=min(f.T, 32),
                    K_GROUP=32,
                    lengths=None,
                ),
                f.warps,
                dtype,
                f.T * f.S * f.unroll,
                options=f.limits(),
            )
        for g in tiles.BACKWARD_TILES:
            for own_query in (True, False):
                constants = dict(
                    FORWARD=additive.forward,
                    GRADIENT=additive.gradient,
                    MERGED=True,
                    OWN_QUERY=own_query,
                    WITH_V=own_query,
                    N_BLOCK=g.N,
                    A_BLOCK=g.A,
                    STAGES=g.stages,
                    ROWS=g.rows,
                    GROUP_ROWS=32,
                    used=None,
                )
                constants |= {"m_step": 1} if own_query else {"n_step": 1, "d_v": None}
                side = "query and v" if own_query else "keys"
                yield Configuration(
                    f"scores_bwd of {side}, {g.N}x{g.A}, {g.stages} stages of {g.rows}",
                    scores_bwd_kernel,
                    constants,
                    g.warps,
                    dtype,
                    g.N * g.A * g.rows,
                    options=g.limits(),
                )
        for kind in ("softmax", "sparsemax", "entmax15", "sigmoid"):
            for added in (None, True, False):
                mask = {"mask": None} if added is None else {}
                yield Configuration(
                    f"normalize_fwd {kind}, " + {None: "no mask", True: "added", False: "boolean"}[added],
                    normalize_fwd_kernel,
                    dict(KIND=kind, ADDED=bool(added), SCALED=True, FILLED=False, ZERO_EMPTY=True, BLOCK=1024, **mask),
                    2,
                    dtype,
                    types={} if added is None else {"mask": "*fp32" if added else "*u8"},
                )
            yield Configuration(
                f"normalize_bwd {kind}",
                normalize_bwd_kernel,
                dict(KIND=kind, ADDED=False, BLOCK=1024, mask=None),
                2,
                dtype,
            )
        for step in tiles.STEP_TILES:
            block = step.elements // 512
            constants = dict(
                FORWARD=additive.forward,
                QUICK=additive.quick,
                ADDED=False,
                S_BLOCK=block,
                A_BLOCK=512,
                D_BLOCK=512,
                WHOLE=step.programs == 256,
                STAGES=step.stages,
                mask=None,
            )
            name = f"step_fwd {step.elements}, {step.stages} stages, {step.warps} warps"
            yield Configuration(name, step_fwd_kernel, constants, step.warps, dtype, step.elements)
        for step in tiles.STEP_BACKWARD_TILES:
            constants = dict(
                FORWARD=additive.forward,
                GRADIENT=additive.gradient,
                QUICK=additive.quick,
                S_BLOCK=step.elements // 512,
                A_BLOCK=512,
                STAGES=step.stages,
                used=None,
            )
            name = f"step_bwd {step.elements}, {step.stages} stages, {step.warps} warps"
            yield Configuration(name, step_bwd_kernel, constants, step.warps, dtype, step.elements)
        yield Configuration("step_join", step_join_kernel, dict(SPLITS=8, S_BLOCK=512, D_BLOCK=128), 4, dtype)
    constants = dict(
        FORWARD=dot.forward,
        MERGED=False,
        T_BLOCK=32,
        S_BLOCK=128,
        UNROLL=16,
        COLUMNS=16,
        Q_GROUP=32,
        K_GROUP=32,
        STAGES=1,
        lengths=None,
    )
    constants |= dict.fromkeys(["q_exp", "k_exp", "coefficients", "q_spans", "k_spans", "v"])
    yield Configuration("scores_fwd of any score", scores_fwd_kernel, constants, 4)


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
    source = ASTSource(fn=configuration.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": configuration.warps, **configuration.options})


@dataclass
class Listing:
    registers: int
    spilled: int  # bytes a thread, or registers on AMD
    shared: int
    loop: Counter[str]  # of the loop with most special functions


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def listing(kernel: Any, target: GPUTarget) -> Listing:
    shared = kernel.metadata.shared
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        return Listing(registers, spilled, shared, loop_of(amd_instructions(text), ("v_rcp", "v_exp")))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run([tool("cuobjdump"), "-res-usage", file.name])
        sass = run([tool("cuobjdump"), "-sass", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {usage!r}")
    return Listing(int(found[1]), int(found[2]), shared, loop_of(nvidia_instructions(sass), ("MUFU",)))


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


Instruction = tuple[int, str, int | None]  # address, name, where it jumps back to


def nvidia_instructions(sass: str) -> list[Instruction]:
    found = []
    for address, name, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", sass):
        goal = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        found.append((int(address, 16), name.split(".")[0], int(goal[1], 16) if goal else None))
    return found


def amd_instructions(text: str) -> list[Instruction]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(found)
        elif name := re.match(r"\s+([a-z]\w+)(?:\s+(\S+))?", line):
            goal = labels.get(name[2]) if name[1].startswith(("s_cbranch", "s_branch")) and name[2] else None
            found.append((len(found), name[1], goal))
    return found


def loop_of(instructions: list[Instruction], special: tuple[str, ...]) -> Counter[str]:
    """What the fast path's innermost loop is made of: most special functions, hardly a comparison."""
    loops = []
    for address, _, goal in instructions:
        if goal is not None and goal < address:
            body = Counter(name for at, name, _ in instructions if goal <= at <= address)
            count = sum(n for name, n in body.items() if name.startswith(special))
            compares = sum(n for name, n in body.items() if name.startswith(("FMNMX", "FSETP", "v_min", "v_cmp")))
            if count:
                loops.append((compares > count / 4, -count, body))
    return min(loops, key=lambda x: x[:2])[2] if loops else Counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--match", default="", help="only configurations whose name holds this")
    options = parser.parse_args()
    failed = 0
    for name in options.target or TARGETS:
        target = TARGETS[name]
        for c in configurations():
            if options.match not in c.name:
                continue
            found = listing(compiled(c, target), target)
            line = (
                f"{name:7}{c.name:50}{c.dtype:5}{found.registers:4} regs {found.spilled:4} spilled {found.shared:6} B"
            )
            if c.elements and found.loop:
                lanes = target.warp_size * c.warps
                line += f" | {found.loop.total() * lanes / c.elements:.2f} a term: "
                line += ", ".join(f"{n} {op}" for op, n in found.loop.most_common(7))
            print(line, flush=True)
            failed += found.spilled > 0
    if failed:
        print(f"{failed} kernels spill", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
