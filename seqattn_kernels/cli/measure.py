"""Time and memory of two calls, taken in turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]

# A turn lasts at least this long, so that what a timer or a switch of caches costs doesn't count.
TURN_SECONDS = 0.01
FEWEST_ROUNDS = 9
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median and the 20 % and 80 % quantiles over rounds."""

    median: float
    low: float
    high: float


def _timing(samples: Sequence[float]) -> Timing:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[-1])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(call: Call, repeats: int) -> float:
    _synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - begin) / repeats


def time_in_turns(first: Call, second: Call, seconds: float) -> tuple[Timing, Timing, Timing]:
    """Times of both calls, and of their ratio first / second within each round, for about `seconds`."""
    calls = (first, second)
    for call in calls:
        call()
    repeats = [max(1, round(TURN_SECONDS / max(min(_seconds(call, 1), _seconds(call, 1)), 1e-7))) for call in calls]
    samples: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(samples[0]) < FEWEST_ROUNDS or (time.perf_counter() < end and len(samples[0]) < MOST_ROUNDS):
        for i in (0, 1) if len(samples[0]) % 2 == 0 else (1, 0):
            calls[i]()  # Not timed: the other one has just had the caches.
            samples[i].append(_seconds(calls[i], repeats[i]))
    ratios = [a / b for a, b in zip(*samples, strict=True)]
    return _timing(samples[0]), _timing(samples[1]), _timing(ratios)


def peak_memory(call: Call, device: torch.device) -> int:
    """The most bytes of tensors that `call` holds at once beyond those there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler announces itself on stderr.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted(results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
