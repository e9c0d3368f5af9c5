"""Interleaved timing on a GPU: events, a cold L2, and two ways to look at a call.

As called: the device is idle when the call begins, so the host's work before and between kernels is part of the time.
On the device: the call is queued behind other work, so what is left is the device's time, as long as the host can run
ahead of it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Race, Timing

WARM_UP_SECONDS = 0.03
# A call whose host part takes longer than this is timed as called only: the queue of launches has an end.
LONGEST_HEAD_START = 5e-3
# One turn takes several samples of a short call.
TURN_SECONDS = 5e-4


@dataclass(frozen=True)
class Races:
    called: Race
    device: Race  # those contestants alone whose host can run ahead


class Flush:
    """Writes more memory than the L2 holds, so that a call finds none of its data there."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer: Tensor = torch.empty(4 * max(size, 1 << 25), dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self.buffer.zero_()


@lru_cache
def cycles_per_second() -> float:
    """Of the counter that torch.cuda._sleep waits for, at the clock of a busy device."""
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    return cycles / seconds_of(lambda: torch.cuda._sleep(cycles))


def seconds_of(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def as_called(call: Callable[[], Any], flush: Callable[[], None]) -> float:
    """Seconds from an idle device to the end of the call's last kernel."""
    flush()
    torch.cuda.synchronize()
    return seconds_of(call)


def on_device(call: Callable[[], Any], flush: Callable[[], None], head_start: float) -> float:
    """Seconds between the neighbours of the call on the device, which begins ``head_start`` seconds after the host."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(head_start * cycles_per_second()))
    flush()
    return seconds_of(call)


def warm_up(call: Callable[[], Any], seconds: float = WARM_UP_SECONDS) -> tuple[float, float]:
    """Run the call for a while; seconds of its host part, and of all of it."""
    call()
    torch.cuda.synchronize()
    hosts: list[float] = []
    wholes: list[float] = []
    begin = time.perf_counter()
    while len(wholes) < 2 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        wholes.append(time.perf_counter() - start)
    return statistics.median(hosts), statistics.median(wholes)


def race(calls: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, least_rounds: int = 7) -> Races:
    """Time the calls in turns, in a new order each round, both ways, for about ``seconds``."""
    if not calls:
        raise ValueError("calls: expected at least one contestant, got none")
    flush = Flush()
    hosts, repeats = {}, {}
    for name, call in calls.items():
        host, whole = warm_up(call)
        hosts[name], repeats[name] = host, max(1, min(8, int(TURN_SECONDS / whole)))
    # Halves of an A/A pair are one call: they are looked at alike.
    slowest = {call: max(hosts[name] for name in calls if calls[name] is call) for call in calls.values()}
    ahead = [name for name in calls if slowest[calls[name]] <= LONGEST_HEAD_START]
    called: dict[str, list[float]] = {name: [] for name in calls}
    device: dict[str, list[float]] = {name: [] for name in ahead}
    order, names = random.Random(0), list(calls)
    begin = time.perf_counter()
    rounds = 0
    while rounds < least_rounds or time.perf_counter() - begin < seconds:
        order.shuffle(names)
        for name in names:
            turn = [as_called(calls[name], flush) for _ in range(repeats[name])]
            called[name].append(statistics.median(turn))
            if name in device:
                # Twice the host's usual time: one turn of a busy host must not let the device run dry.
                head_start = 2 * hosts[name] + 1e-4
                turn = [on_device(calls[name], flush, head_start) for _ in range(repeats[name])]
                device[name].append(statistics.median(turn))
        rounds += 1
    return Races(_race(called, repeats, rounds), _race(device, repeats, rounds))


def _race(samples: Mapping[str, list[float]], repeats: Mapping[str, int], rounds: int) -> Race:
    return Race({name: Timing.of(found, repeats[name]) for name, found in samples.items()}, rounds, 0, False)


def peak_mib(call: Callable[[], Any], clear: Callable[[], None] = lambda: None) -> float:
    """The most memory torch held at a time during the call, beyond what it held before, in MiB."""
    clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    del result
    return found / 2**20
