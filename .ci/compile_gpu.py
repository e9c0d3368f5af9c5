"""Compiles every CUDA source for every supported architecture, without a GPU, and prints what the kernels take.

A table has one line for each kernel and architecture: its template instances, registers of a thread, bytes of static
shared memory, bytes spilled. A spill fails, since a persistent kernel that spills reads memory at every step.
Without nvcc it says so and does nothing.

    python .ci/compile_gpu.py [--each] [SOURCE...]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90a", "100a")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-cubin")


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


def compile_one(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", str(source), "-o", str(Path(folder) / "out.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.relative_to(ROOT)} for sm_{arch}:\n{done.stderr}{done.stdout}")
    return parse(done.stderr + done.stdout, arch)


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
    parser.add_argument("--each", action="store_true", help="a line for each instance of a template")
    parser.add_argument("sources", nargs="*", type=Path, help="instead of all of csrc/cuda/*.cu")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile-gpu: no nvcc found (set CUDA_HOME, or install the CUDA toolkit); CUDA sources were NOT compiled")
        return 0
    sources = [s.resolve() for s in arguments.sources] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in ARCHS]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: compile_one(nvcc, *job), jobs))
    kernels = [kernel for found in done for kernel in found]
    if not kernels:
        print("compile-gpu: no kernels")
        return 0
    report(kernels, arguments.each)
    spilled = [k for k in kernels if k.spilled]
    for kernel in spilled:
        print(f"SPILL: {kernel.spilled} bytes in {kernel.name} for sm_{kernel.arch}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
