"""How the CUDA sources are compiled: each file once, but persistent_kernels.cu once for each cell and element type.

setup.py, .ci/compile_gpu.py and the emulator of the tests ask here, so that a cell of the registry needs no other line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Element types of the persistent kernels, as persistent.cu chooses among them.
TYPES = ("float", "bfloat16", "half")
FOR_EACH_CELL_AND_TYPE = HERE / "persistent_kernels.cu"


@dataclass(frozen=True)
class Unit:
    source: Path
    name: str  # of its object file, without an ending
    definitions: tuple[str, ...] = ()  # as compilers take them


def cells() -> list[str]:
    """Names of the C++ types in csrc/cells/registry.h, in its order."""
    return re.findall(r"\bDO\((\w+)\)", (HERE.parent / "cells" / "registry.h").read_text())


def kernel_units() -> list[Unit]:
    """What nvcc compiles, or the emulator's compiler in its place."""
    found = [Unit(s, s.stem) for s in sorted(HERE.glob("*.cu")) if s != FOR_EACH_CELL_AND_TYPE]
    for cell in cells():
        for element in TYPES:
            definitions = (f"-DSEQATTN_UNIT_CELL={cell}", f"-DSEQATTN_UNIT_TYPE={element}")
            found.append(Unit(FOR_EACH_CELL_AND_TYPE, f"persistent_{cell.lower()}_{element}", definitions))
    return found
