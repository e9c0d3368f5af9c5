"""Builds the extension `seqattn_kernels._C` with ninja.

SEQATTN_BUILD says what to build:
  auto  the CPU kernels when there is a C++ compiler, else none, with a note (default)
  cpu   the CPU kernels; fails without a compiler
  cuda  the CPU and CUDA kernels; fails until the CUDA sources exist and nvcc is found
  none  nothing: the package works on its reference implementations

The extension uses libtorch's stable ABI alone, so one build serves every torch from 2.10 on.
CXX and CXXFLAGS are honoured; set CXX="ccache g++" for a compiler cache.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Sources compiled once, and kernel sources compiled once for each instruction set.
COMMON_SOURCES = sorted(p for p in CSRC.glob("*.cpp")) + sorted(
    p for p in (CSRC / "cpu").glob("*.cpp") if not p.stem.endswith("_kernels")
)
KERNEL_SOURCES = sorted((CSRC / "cpu").glob("*_kernels.cpp"))
X86_INSTRUCTION_SETS = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "baseline": [],
}
# Sources of bfloat16 products are compiled for the processor's own instructions besides.
X86_BFLOAT16 = {"avx512_bf16": [*X86_INSTRUCTION_SETS["avx512"], "-mavx512bf16"]}


def build_mode() -> str:
    mode = os.environ.get("SEQATTN_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"SEQATTN_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
    return mode


def compiler() -> list[str] | None:
    words = shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]
    return words if shutil.which(words[-1] if words[0] == "ccache" else words[0]) else None


class NinjaBuild(build_ext):
    """Compiles all sources in parallel with one ninja file; a rebuild compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        if mode == "cuda":
            raise SystemExit("SEQATTN_BUILD=cuda: this version has no CUDA sources yet; use cpu or auto")
        cxx = compiler()
        if cxx is None:
            message = "no C++ compiler found (set CXX, or install g++)"
            if mode == "cpu":
                raise SystemExit(f"SEQATTN_BUILD=cpu: {message}")
            print(f"seqattn_kernels: {message}; building without native kernels", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self.write_ninja(work / "build.ninja", cxx, target)
        try:
            subprocess.run([*self.ninja(), "-C", str(work)], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            if mode == "cpu":
                raise
            print(f"seqattn_kernels: building the native kernels failed ({error}); going on without", file=sys.stderr)

    @staticmethod
    def ninja() -> list[str]:
        return ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]

    @staticmethod
    def write_ninja(path: Path, cxx: list[str], target: Path) -> None:
        import pybind11
        import torch
        from ninja import ninja_syntax

        torch_root = Path(torch.__file__).parent
        # pybind11 first: torch carries its own, which some versions refuse to compile beside the stable ABI.
        includes = [CSRC, pybind11.get_include(), torch_root / "include", sysconfig.get_paths()["include"]]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        flags = [
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-Wno-ignored-attributes",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *(["-DSEQATTN_HAVE_X86"] if x86 else []),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        # torch's headers as system headers: their warnings are not ours.
        flags += [f"-I{includes[0]}"] + [f"-isystem{i}" for i in includes[1:]]
        link = ["-shared", f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-rpath,$$ORIGIN/../torch/lib"]
        if sys.platform == "darwin":
            link = ["-shared", "-undefined", "dynamic_lookup", f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]

        with path.open("w") as file:
            n = ninja_syntax.Writer(file)
            n.variable("cxx", shlex.join(cxx))
            n.variable("cxxflags", " ".join(flags))
            n.rule(
                "compile",
                "$cxx $cxxflags $isa -MMD -MF $out.d -c $in -o $out",
                description="compile $out",
                depfile="$out.d",
                deps="gcc",
            )
            n.rule("link", f"$cxx -o $out $in {' '.join(link)}", description="link $out")
            objects = []
            for source in COMMON_SOURCES:
                objects += n.build(f"{source.stem}.o", "compile", str(source))
            for source in KERNEL_SOURCES:
                sets = X86_INSTRUCTION_SETS if x86 else {"baseline": []}
                if x86 and source.stem.endswith("_bfloat16_kernels"):
                    sets = sets | X86_BFLOAT16
                for isa, isa_flags in sets.items():
                    options = " ".join([f"-DSEQATTN_ISA={isa}", *isa_flags])
                    objects += n.build(f"{source.stem}.{isa}.o", "compile", str(source), variables={"isa": options})
            n.build(str(target), "link", objects)


if build_mode() == "none":
    setup()
else:
    setup(ext_modules=[Extension("seqattn_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
