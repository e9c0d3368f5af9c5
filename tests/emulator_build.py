"""Builds the emulator of CUDA kernels, a module for tests alone, into build/emulator, when its sources changed."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from csrc.cuda.units import Unit, kernel_units

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def units() -> list[Unit]:
    """The emulator, and the kernels and plans as nvcc gets them; device.cu alone speaks to CUDA itself."""
    plain = [*sorted((CSRC / "emulator").glob("*.cpp")), *sorted((CSRC / "cuda").glob("plan*.cpp"))]
    kernels = [unit for unit in kernel_units() if unit.name != "device"]
    return [*(Unit(s, f"{s.parent.name}_{s.stem}") for s in plain), *kernels]


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(sanitize: bool = False) -> Path:
    """Path of the module, built with ninja where a source is newer than it. Raises RuntimeError with what g++ said."""
    import pybind11
    from ninja import ninja_syntax

    work = ROOT / "build" / ("emulator-sanitized" if sanitize else "emulator")
    work.mkdir(parents=True, exist_ok=True)
    target = work / f"_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += [f"-isystem{i}" for i in includes] + (SANITIZERS if sanitize else [])
    with (work / "build.ninja").open("w") as file:
        n = ninja_syntax.Writer(file)
        n.rule(
            "compile",
            f"{compiler()} {' '.join(flags)} $options -MMD -MF $out.d -x c++ -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        n.rule("link", f"{compiler()} {' '.join(SANITIZERS if sanitize else [])} -shared -o $out $in -ldl")
        objects = []
        for unit in units():
            # Kernels are large and run for a moment; the emulator under them is small and runs for long.
            optimize = "-O2" if unit.source.suffix == ".cpp" else "-Og -Wno-maybe-uninitialized"
            options = ["-O0" if sanitize else optimize, *unit.definitions]
            objects += n.build(f"{unit.name}.o", "compile", str(unit.source), variables={"options": " ".join(options)})
        n.build(str(target), "link", objects)
    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    with (work / "lock").open("w") as lock:  # two runs of the tests at once would write the same files
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([*ninja, "-C", str(work)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"building the emulator failed:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return target


def load(path: Path) -> ModuleType:
    if "_emulator" in sys.modules:  # its types can be registered once only
        return sys.modules["_emulator"]
    spec = importlib.util.spec_from_file_location("_emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["_emulator"] = module
    return module
