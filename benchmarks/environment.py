"""Where a measurement ran: threads pinned to cores, versions, commit, and what the machine can do at most.

torch is imported inside functions only: the OpenMP runtime it loads reads its variables once, at that moment.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "numpy", "onnxruntime", "openvino", "onnx")


def pin_threads() -> None:
    """Restart this process with OMP_PROC_BIND=true unless the variable is set.

    Without it both OpenMP threads can land on one core, and each parallel region then waits for the scheduler's tick.
    """
    if "OMP_PROC_BIND" in os.environ:
        return
    if "torch" in sys.modules:
        raise RuntimeError("OMP_PROC_BIND: expected to be set before torch is imported, got a process that has torch")
    os.environ["OMP_PROC_BIND"] = "true"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


def in_pinned_process(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` with OMP_PROC_BIND=true, for callers that have torch already; its exit code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "OMP_PROC_BIND": "true", "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=variables, check=False).returncode


def bound_cores() -> set[int]:
    """The cores this thread may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(cores()))


def bind(allowed: set[int]) -> None:
    """Let this thread run on the ``allowed`` cores, where the system has a say in that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def binding_kept() -> Iterator[None]:
    """Put this thread back on its cores afterwards: some engines move the thread that calls them."""
    before = bound_cores()
    try:
        yield
    finally:
        bind(before)


@contextlib.contextmanager
def unpinned() -> Iterator[None]:
    """Let the threads that another engine starts in here use every core.

    The OpenMP runtime has bound this thread to the first core, and new threads inherit that.
    """
    with binding_kept():
        bind(set(range(cores())))
        yield


@lru_cache
def cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cores() -> int:
    return os.cpu_count() or 1


def machine_name() -> str:
    """A folder name for results: processor, family and number of cores."""
    info = cpu_info()
    model = info.get("model name") or platform.processor() or platform.machine()
    family = f"-family{info['cpu family']}" if "cpu family" in info else ""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*|\bcpu\b|processor", "", model.lower())).strip("-")
    return f"{slug}{family}-{cores()}cores"


def gpu_name() -> str | None:
    """A folder name for results of the first GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def describe_gpu() -> dict[str, Any]:
    """What ``describe`` says, and the GPU with what drives it. Raises RuntimeError without a GPU."""
    import torch

    name = gpu_name()
    if name is None:
        raise RuntimeError("a GPU: expected one that torch can use, got none")
    properties = torch.cuda.get_device_properties(0)
    found = {
        "machine": name,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "nvcc": _first_line(["nvcc", "--version"], "release"),
    }
    return {**describe(), **found}


def _driver() -> str | None:
    return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _first_line(command: Sequence[str], containing: str = "") -> str | None:
    """The first line a command prints that contains the text; None where there is no such command."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in text.splitlines() if containing in line and line.strip()), None)


def commit() -> str | None:
    """The commit measured, with "+" when the tree differs from it; None outside a checkout."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "csrc", "seqattn_kernels", "setup.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha.stdout.strip() + ("+" if status.stdout.strip() else "")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("seqattn_kernels", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Everything a reader needs to know about the process and machine behind a result."""
    import torch

    info = cpu_info()
    wide = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    return {
        "machine": machine_name(),
        "cpu": info.get("model name", platform.machine()),
        "cpu_family": info.get("cpu family"),
        "cores": cores(),
        "features": [flag for flag in wide if flag in (info.get("flags") or info.get("Features") or "").split()],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
        "versions": versions(),
        "commit": commit(),
    }
