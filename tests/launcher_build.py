"""Builds the launcher of the CUDA operators over the emulator, as operators `seqattn_emulated::*` of CPU tensors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests import emulator_build
from tests.emulator_build import CSRC, ROOT


def _kernel_objects(folder: Path) -> list[str]:
    """What emulator_build compiled, but for its Python module."""
    parts = [unit for unit in emulator_build.units() if '"bindings.h"' not in unit.source.read_text()]
    return [str(folder / f"{unit.name}.o") for unit in parts]


def build() -> Path:
    """Path of the library, built with ninja where a source is newer. Raises RuntimeError with what g++ said."""
    from ninja import ninja_syntax

    emulator = emulator_build.build()
    work = ROOT / "build" / "launcher"
    work.mkdir(parents=True, exist_ok=True)
    target = work / "libseqattn_emulated.so"
    torch_root = Path(torch.__file__).parent
    sources = [
        CSRC / "cuda" / "decoder.cpp",
        CSRC / "cuda" / "problem.cpp",
        CSRC / "cuda" / "recurrence.cpp",
        CSRC / "emulator" / "launcher" / "device.cpp",
        CSRC / "ops.cpp",
    ]
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DSEQATTN_EMULATED"]
    flags += ["-DSEQATTN_LIBRARY=seqattn_emulated", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{torch_root / 'include'}"]
    with (work / "build.ninja").open("w") as file:
        n = ninja_syntax.Writer(file)
        command = f"{emulator_build.compiler()} {' '.join(flags)} -MMD -MF $out.d -c $in -o $out"
        n.rule("compile", command, depfile="$out.d", deps="gcc")
        libraries = f"-L{torch_root / 'lib'} -ltorch_cpu -lc10 -ldl"
        n.rule("link", f"{emulator_build.compiler()} -shared -o $out $in {libraries}")
        objects = [n.build(f"{s.stem}.o", "compile", str(s))[0] for s in sources]
        n.build(str(target), "link", objects + _kernel_objects(emulator.parent))
    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    done = subprocess.run([*ninja, "-C", str(work)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"building the launcher failed:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return target
