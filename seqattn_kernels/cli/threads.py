"""Whether the threads of a parallel region run side by side, or wait for each other on one core."""

from __future__ import annotations

import os
import statistics
import threading
import time
from dataclasses import dataclass

import torch

# A region of this many elements takes some hundred microseconds on one thread. On two that share a core, whoever spins
# at the end of the region keeps the other from its work until the scheduler's next tick, milliseconds away.
ELEMENTS = 200_000
REGIONS = 40
TEAMS = 5
SLOWER = 2.0


@dataclass(frozen=True)
class Sharing:
    """What was measured: for each new team of threads, the time of a parallel region over that on one thread.

    bound: the threads' cores are fixed, to different ones, so that they can't share. busy: share of the cores that
    other processes used meanwhile; None where the system doesn't say.
    """

    threads: int
    ratios: tuple[float, ...]
    bound: bool
    busy: float | None

    @property
    def shared(self) -> int:
        """How many teams were slower than one thread by far."""
        return sum(ratio > SLOWER for ratio in self.ratios)


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_sharing() -> Sharing:
    """Each new Python thread gets an OpenMP team of its own, which the system places anew: several are tried."""
    threads = torch.get_num_threads()
    ratios: list[float] = []
    before = _processor_seconds()
    for _ in range(TEAMS):
        thread = threading.Thread(target=lambda: ratios.append(_ratio(threads)))
        thread.start()
        thread.join()
    after = _processor_seconds()
    busy = None
    if before is not None and after is not None and after[0] > before[0]:
        busy = max(0.0, (after[1] - before[1]) / (after[0] - before[0]))
    return Sharing(threads, tuple(ratios), _bound_apart(threads), busy)


def _ratio(threads: int) -> float:
    x = torch.linspace(-1, 1, ELEMENTS)
    y = torch.empty_like(x)
    times = {}
    for n in (threads, 1):
        torch.set_num_threads(n)
        samples = []
        for _ in range(REGIONS):
            begin = time.perf_counter()
            torch.exp(x, out=y)
            samples.append(time.perf_counter() - begin)
        times[n] = statistics.median(samples)
    torch.set_num_threads(threads)
    return times[threads] / times[1]


def _bound_apart(threads: int) -> bool:
    """Whether OpenMP keeps each thread to a core of its own (OMP_PROC_BIND, or GOMP_CPU_AFFINITY)."""
    bind = os.environ.get("OMP_PROC_BIND", "").lower()
    asked = bind.split(",")[0] in ("true", "close", "spread") or "GOMP_CPU_AFFINITY" in os.environ
    return asked and threads <= (os.cpu_count() or 1)


def _processor_seconds() -> tuple[float, float] | None:
    """Seconds all cores had so far, and those that processes other than this one used; None off Linux."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    total, idle = sum(fields) / tick, (fields[3] + fields[4]) / tick
    mine = os.times()
    return total, total - idle - mine.user - mine.system
