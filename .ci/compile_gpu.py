"""Compiles every GPU kernel for every supported architecture, without a GPU, and prints what the kernels take.

CUDA sources where nvcc is: a line for each kernel and architecture with its template instances, registers of a thread,
bytes of static shared memory, bytes spilled. A spill fails, since a persistent kernel that spills reads memory at every
step. Compilations stay in build/compile-gpu, and those whose sources changed are done anew. Triton kernels, where
Triton is, by seqattn_kernels.kernels.compile. It says so where either is missing.

    python .ci/compile_gpu.py [--arch 90a] [--match lstm] [--each] [--only cuda]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from csrc.cuda.units import Unit, kernel_units  # noqa: E402

ARCHS = ("80", "90a", "100a")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-cubin")
WORK = ROOT / "build" / "compile-gpu"


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def template(self) -> str:
        """The name without arguments and template arguments."""
        plain = re.sub(r"\(anonymous namespace\)::", "", self.name)
        return plain.split("<")[0].split("(")[0].removeprefix("void ").removeprefix("seqattn::gpu::")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    answer = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def parse(text: str, arch: str) -> list[Kernel]:
    """What `ptxas -v` says of each entry function."""
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        numbers = {
            key: int(match.group(1)) if (match := re.search(pattern, part)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "spilled": r"(\d+) bytes spill stores",
            }.items()
        }
        found.append((name, numbers))
    names = demangle([name for name, _ in found])
    return [Kernel(name, arch, **numbers) for name, (_, numbers) in zip(names, found, strict=True)]


def write_ninja(nvcc: str, jobs: Sequence[tuple[Unit, str]]) -> None:
    from ninja import ninja_syntax

    with (WORK / "build.ninja").open("w") as file:
        n = ninja_syntax.Writer(file)
        # What ptxas says lies beside the code it belongs to, and comes to the screen where it is an error.
        command = f"{shlex.join([nvcc, *FLAGS])} $options -MMD -MF $out.d -o $out $in > $out.txt 2>&1"
        n.rule("compile", f"{command} || {{ cat $out.txt; false; }}", "compile $out", depfile="$out.d", deps="gcc")
        for unit, arch in jobs:
            options = shlex.join([*unit.definitions, f"-arch=sm_{arch}"])
            n.build(output(unit, arch), "compile", str(unit.source), variables={"options": options})


def output(unit: Unit, arch: str) -> str:
    return f"{unit.name}.sm_{arch}.cubin"


def compile_cuda(archs: Sequence[str], match: str, each: bool) -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile-gpu: no nvcc found (set CUDA_HOME, or install the CUDA toolkit); CUDA sources were NOT compiled")
        return 0
    jobs = [(unit, arch) for arch in archs for unit in kernel_units() if match in unit.name]
    if not jobs:
        print(f"compile-gpu: no source named *{match}*", file=sys.stderr)
        return 1
    WORK.mkdir(parents=True, exist_ok=True)
    # Its place names its version: another toolkit compiles anew.
    write_ninja(str(Path(nvcc).resolve()), jobs)
    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    # A thread for each processor: ninja would take two more, and each takes up to 1 GiB.
    command = [*ninja, "--quiet", "-C", str(WORK), "-j", str(os.cpu_count() or 1), "-k", "0"]
    if subprocess.run(command).returncode:
        return 1
    kernels = []
    for unit, arch in jobs:
        kernels += parse((WORK / (output(unit, arch) + ".txt")).read_text(), arch)
    if not kernels:
        print("compile-gpu: no kernels in these sources")
        return 0
    report(kernels, each)
    spilled = [k for k in kernels if k.spilled]
    for kernel in spilled:
        print(f"SPILL: {kernel.spilled} bytes in {kernel.name} for sm_{kernel.arch}", file=sys.stderr)
    return 1 if spilled else 0


def compile_triton() -> int:
    if importlib.util.find_spec("triton") is None:
        print("compile-gpu: no Triton found (pip install triton); Triton kernels were NOT compiled")
        return 0
    return subprocess.run([sys.executable, "-m", "seqattn_kernels.kernels.compile"], cwd=ROOT).returncode


def report(kernels: list[Kernel], each: bool) -> None:
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name if each else kernel.template, kernel.arch), []).append(kernel)
    width = max(len(name) for name, _ in groups)
    print(f"{'kernel':{width}}  arch  instances  registers  static shared  stack  spilled")
    for (name, arch), members in sorted(groups.items(), key=lambda item: (item[0][0], ARCHS.index(item[0][1]))):
        least, most = min(k.registers for k in members), max(k.registers for k in members)
        registers = str(most) if least == most else f"{least}-{most}"
        shared, stack, spilled = (max(getattr(k, field) for k in members) for field in ("shared", "stack", "spilled"))
        print(
            f"{name:{width}}  {arch:>4}  {len(members):9d}  {registers:>9}  {shared:13d}  {stack:5d}  {spilled:7d}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, action="append", help="all by default")
    parser.add_argument("--match", default="", help="only CUDA sources whose name holds this")
    parser.add_argument("--each", action="store_true", help="a line for each instance of a template")
    parser.add_argument("--only", choices=("cuda", "triton"), help="both by default")
    options = parser.parse_args()
    codes = []
    if options.only != "triton":
        codes.append(compile_cuda(options.arch or ARCHS, options.match, options.each))
    if options.only != "cuda":
        codes.append(compile_triton())
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
