"""Interleaved timing on a machine that others may use at the same time."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import bind, binding_kept, bound_cores

# A round in which other processes took more than this many cores is not counted.
FOREIGN_CORES = 0.15
# Rounds are judged together until they have taken this long: the kernel counts time in hundredths of a second.
SHORTEST_JUDGED = 0.15
# Threads of the contestant before spin for a while after their last task.
SETTLE_SECONDS = 0.001


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the middle and the 20 % and 80 % quantiles over rounds, and each round's figure in order."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]
    calls: int

    @classmethod
    def of(cls, samples: Sequence[float], calls: int) -> Timing:
        return cls(statistics.median(samples), quantile(samples, 0.2), quantile(samples, 0.8), tuple(samples), calls)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contestant is than another: the median over rounds and the interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Race:
    """What one interleaved run found. Samples with the same index were taken in the same round."""

    timings: Mapping[str, Timing]
    rounds: int
    dropped: int
    disturbed: bool  # too few quiet rounds: the quietest third was taken instead

    def ratio(self, name: str, against: Sequence[str]) -> Ratio:
        """Times ``name`` is faster than the mean of ``against`` in the same round.

        The interval holds the median with 90 % confidence (by the order of the samples, whatever their distribution).
        """
        others = [self.timings[other].samples for other in against]
        ratios = sorted(
            statistics.fmean(other) / mine for mine, *other in zip(self.timings[name].samples, *others, strict=True)
        )
        low, high = _median_ranks(len(ratios))
        return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def quantile(samples: Sequence[float], q: float) -> float:
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _median_ranks(n: int, confidence: float = 0.9) -> tuple[int, int]:
    """Indices into n sorted samples between which the true median lies with the given confidence."""
    tail, low = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - confidence:
            break
        low = k + 1
    return max(low - 1, 0), n - 1 - max(low - 1, 0)


def _busy_seconds() -> float | None:
    """Processor time all processes have used, or None where the system does not say."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system


class ForeignLoad:
    """How many cores other processes used since this was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = _busy_seconds(), _own_seconds(), time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def cores(self) -> float:
        busy, elapsed = _busy_seconds(), self.seconds()
        if busy is None or self._busy is None:
            return 0.0
        return max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / elapsed


def race(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 3.0,
    least_rounds: int = 7,
    patience: float = 4.0,
    block_seconds: float | None = None,
    linger: Mapping[str, float] | None = None,
) -> Race:
    """Time the calls in turns, in a new order each round, for about ``seconds``.

    Each turn runs a call often enough to fill ``block_seconds``, with one untimed call before it where calls are short,
    so that every contestant finds its data and threads as its own last call left them. Rounds disturbed by other
    processes are dropped and made up for, up to ``patience`` times the time. ``linger`` says for how many seconds the
    threads of a contestant stay busy after its turn: the next one starts after that.
    """
    if not calls:
        raise ValueError("calls: expected at least one contestant, got none")
    if block_seconds is None:
        block_seconds = min(0.06, max(0.002, seconds / least_rounds / len(calls)))
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        with binding_kept():
            repeats[name] = _repeats(call, block_seconds)

    names, home = list(calls), bound_cores()
    order = random.Random(0)
    rounds: list[tuple[float, dict[str, float]]] = []
    window: list[dict[str, float]] = []
    quiet = 0
    begin = time.perf_counter()
    load = ForeignLoad()
    while True:
        order.shuffle(names)
        row = {}
        for name in names:
            row[name] = _turn(calls[name], repeats[name])
            bind(home)  # the call may have moved this thread
            time.sleep((linger or {}).get(name, 0.0))
        window.append(row)
        if load.seconds() < SHORTEST_JUDGED:
            continue
        foreign = load.cores()
        rounds += [(foreign, row) for row in window]
        quiet += len(window) if foreign <= FOREIGN_CORES else 0
        load, window = ForeignLoad(), []
        elapsed = time.perf_counter() - begin
        if (elapsed >= seconds and quiet >= least_rounds) or (elapsed >= seconds * patience and len(rounds) >= 3):
            break

    kept = [row for foreign, row in rounds if foreign <= FOREIGN_CORES]
    disturbed = len(kept) < min(3, least_rounds)
    if disturbed:
        rounds.sort(key=lambda entry: entry[0])
        kept = [row for _, row in rounds[: max(3, len(rounds) // 3)]]
    timings = {name: Timing.of([row[name] for row in kept], repeats[name]) for name in calls}
    return Race(timings, len(kept), len(rounds) - len(kept), disturbed)


def _repeats(call: Callable[[], Any], block_seconds: float) -> int:
    """How many calls fill the block, after warming up."""
    start = time.perf_counter()
    call()
    if time.perf_counter() - start > 4 * block_seconds:
        call()
        return 1
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    count = min(100, max(1, int(block_seconds / 4 / max(once, 1e-7))))
    start = time.perf_counter()
    for _ in range(count):
        call()
    once = min(once, (time.perf_counter() - start) / count)
    return max(1, round(block_seconds / max(once, 1e-7)))


def _turn(call: Callable[[], Any], repeats: int) -> float:
    time.sleep(SETTLE_SECONDS)
    if repeats > 1:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
