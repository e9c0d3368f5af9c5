"""Registers, spills and the inner loop of a compiled kernel, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


@dataclass
class Listing:
    registers: int
    spilled: int  # bytes a thread, or registers on AMD
    shared: int
    loop: Counter[str]  # what the inner loop is made of
    again: int  # instructions in loops that store or load what was spilled


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def listing(kernel: Any, target: GPUTarget) -> Listing:
    shared = kernel.metadata.shared
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        spilled = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        instructions = amd_instructions(text)
        return Listing(registers, spilled, shared, loop_of(instructions, ("v_rcp", "v_exp")), in_loops(instructions))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run([tool("cuobjdump"), "-res-usage", file.name])
        sass = run([tool("cuobjdump"), "-sass", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {usage!r}")
    instructions = nvidia_instructions(sass)
    loop = loop_of(instructions, ("MUFU",))
    return Listing(int(found[1]), int(found[2]), shared, loop, in_loops(instructions))


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


def in_loops(instructions: list[Instruction]) -> int:
    """Accesses to a thread's own memory, where spilled registers are, inside loops."""
    loops = [(goal, address) for address, _, goal in instructions if goal is not None and goal < address]
    spills = [address for address, name, _ in instructions if name.startswith(("LDL", "STL", "scratch_"))]
    return sum(any(first <= address <= last for first, last in loops) for address in spills)


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
