"""Builds the extension `seqattn_kernels._C`, and `seqattn_kernels/libseqattn_cuda.so` beside it, with ninja.

SEQATTN_BUILD says what to build:
  auto  the CPU kernels when there is a C++ compiler, else none, with a note; the CUDA kernels besides when torch was
        built with CUDA and nvcc is found (default)
  cpu   the CPU kernels; fails without a compiler
  cuda  the CPU and CUDA kernels; fails without nvcc. A torch without CUDA suffices to build, not to run
  none  nothing: the package works on its reference implementations

Both use libtorch's stable ABI alone, so one build serves every torch from 2.10 on.
CXX and CXXFLAGS are honoured; set CXX="ccache g++" for a compiler cache. nvcc is taken from CUDA_HOME, else from PATH.
SEQATTN_CUDA_ARCHS, as in "90a" or "80;90a", builds for fewer GPUs than all that are supported.
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
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build front end leaves it out

from csrc.cuda.units import kernel_units  # noqa: E402

CSRC = ROOT / "csrc"
CUDA_LIBRARY = "libseqattn_cuda.so"

# Sources compiled once, and kernel sources compiled once for each instruction set.
COMMON_SOURCES = (
    sorted(p for p in CSRC.glob("*.cpp"))
    + sorted(p for p in (CSRC / "cpu").glob("*.cpp") if not p.stem.endswith("_kernels"))
    + sorted((CSRC / "cuda").glob("plan*.cpp"))  # without a GPU, too: plans are tested everywhere
)
KERNEL_SOURCES = sorted((CSRC / "cpu").glob("*_kernels.cpp"))
X86_INSTRUCTION_SETS = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "baseline": [],
}
CUDA_HOST_SOURCES = sorted((CSRC / "cuda").glob("*.cpp"))
# Clusters need the code of their own architecture; every other GPU runs that of sm_80, or is compiled for from its PTX.
CUDA_ARCHS = ("80", "90a", "100a")
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


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def cuda_compiler(mode: str) -> str | None:
    """nvcc where the CUDA library is to be built."""
    import torch

    if mode == "cpu" or (mode == "auto" and not torch.backends.cuda.is_built()):
        return None
    found = find_nvcc()
    if found is None and mode == "cuda":
        raise SystemExit("SEQATTN_BUILD=cuda: no nvcc found (set CUDA_HOME, or install the CUDA toolkit)")
    if found is None:
        print("seqattn_kernels: no nvcc found (set CUDA_HOME); building without CUDA kernels", file=sys.stderr)
    return found


def cuda_arch_flags() -> list[str]:
    archs = os.environ.get("SEQATTN_CUDA_ARCHS", "").replace(";", " ").split() or CUDA_ARCHS
    flags = []
    for arch in archs:
        if arch not in CUDA_ARCHS:
            raise SystemExit(f"SEQATTN_CUDA_ARCHS: expected some of {', '.join(CUDA_ARCHS)}, got {arch!r}")
        code = f"[sm_{arch},compute_{arch}]" if arch == "80" else f"sm_{arch}"
        flags.append(f"-gencode=arch=compute_{arch},code={code}")
    return flags


class NinjaBuild(build_ext):
    """Compiles all sources in parallel with one ninja file; a rebuild compiles only what changed."""

    cuda_built = False

    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        cxx = compiler()
        if cxx is None:
            message = "no C++ compiler found (set CXX, or install g++)"
            if mode != "auto":
                raise SystemExit(f"SEQATTN_BUILD={mode}: {message}")
            print(f"seqattn_kernels: {message}; building without native kernels", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        nvcc = cuda_compiler(mode)
        self.write_ninja(work / "build.ninja", cxx, nvcc, target)
        try:
            subprocess.run([*self.ninja(), "-C", str(work)], check=True)
            self.cuda_built = nvcc is not None
        except (subprocess.CalledProcessError, OSError) as error:
            if mode != "auto":
                raise
            print(f"seqattn_kernels: building the native kernels failed ({error}); going on without", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        if self.cuda_built:
            package = self.get_finalized_command("build_py").get_package_dir("seqattn_kernels")
            self.copy_file(str(Path(self.build_lib) / "seqattn_kernels" / CUDA_LIBRARY), package)

    @staticmethod
    def ninja() -> list[str]:
        return ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]

    @staticmethod
    def write_ninja(path: Path, cxx: list[str], nvcc: str | None, target: Path) -> None:
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
            if nvcc is not None:
                write_cuda(n, nvcc, torch_root, target.parent / CUDA_LIBRARY)


def write_cuda(n: Any, nvcc: str, torch_root: Path, target: Path) -> None:
    """The CUDA library: kernels by nvcc, what calls torch by the C++ compiler."""
    flags = [
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "--threads=3",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
        f"-I{CSRC}",
        *cuda_arch_flags(),
    ]
    n.variable("nvcc", nvcc)
    n.variable("nvccflags", " ".join(flags))
    command = "$nvcc $nvccflags $definitions -MMD -MF $out.d -c $in -o $out"
    n.rule("cuda", command, "compile $out", depfile="$out.d", deps="gcc")
    lib = torch_root / "lib"
    # A torch without CUDA has no libtorch_cuda; the library must ask for it nevertheless.
    n.rule("stub", "$cxx -shared -x c++ /dev/null -Wl,-soname,$$(basename $out) -o $out", "stub $out")
    has_cuda = (lib / "libtorch_cuda.so").is_file()
    stubs = [] if has_cuda else n.build("stubs/libtorch_cuda.so", "stub", [])
    search = [f"-L{lib}"] if has_cuda else ["-Lstubs", f"-L{lib}"]
    link = f"-shared -cudart=static {' '.join(search)} -Xlinker=--no-as-needed -ltorch_cpu -ltorch_cuda -lc10"
    n.rule("link_cuda", f"$nvcc -o $out $in {link}", "link $out")
    objects = []
    for unit in kernel_units():
        variables = {"definitions": " ".join(unit.definitions)}
        objects += n.build(f"cuda_{unit.name}.cu.o", "cuda", str(unit.source), variables=variables)
    for source in CUDA_HOST_SOURCES:
        objects += n.build(f"cuda_{source.stem}.o", "compile", str(source))
    n.build(str(target), "link_cuda", objects, implicit=stubs)


if build_mode() == "none":
    setup()
else:
    setup(ext_modules=[Extension("seqattn_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
