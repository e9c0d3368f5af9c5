"""One case on a GPU: every contestant is checked against float64, and those that passed are timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Collection
from contextlib import ExitStack

import torch

from benchmarks.cases import STOCK, STOCK_AGAIN, Case
from benchmarks.gpu.ceilings import floors, tf32
from benchmarks.gpu.timing import Races, peak_mib, race
from benchmarks.measure import Ratio
from benchmarks.peers import Entry
from benchmarks.problems import Problem, build
from benchmarks.results import CaseResult, Contestant
from benchmarks.runner import Profile, judge, noise_of, qualify, version_of

FULL = Profile("full", 0.5, 7)
QUICK = Profile("quick", 0.25, 5)


def run_case(
    case: Case,
    ceilings: dict[str, float],
    profile: Profile = FULL,
    only: Collection[str] | None = None,
    nobody: bool = False,
) -> CaseResult:
    """Measure one case. ``only`` names the contestants to take besides stock; by default all that prepare quickly.

    ``nobody``: the case's record without figures.
    """
    least = floors(case, ceilings)
    with ExitStack() as stack, torch.set_grad_enabled(case.mode.has_gradients), tf32(case.tf32):
        problem = build(case)
        entries, absent, failed = ({}, {}, {}) if nobody else qualify(case, problem, only, stack)
        problem.__dict__.pop("oracle", None)  # it may be large
        _forget(problem, entries)
        memory = _peaks(problem, entries, failed)
        races = None
        if entries:
            calls = {name: entry.call for name, entry in entries.items()}
            if STOCK in calls:
                calls[STOCK_AGAIN] = calls[STOCK]
            races = race(calls, seconds=profile.seconds, least_rounds=profile.least_rounds)
        _forget(problem, entries)
        entries.clear()
    del problem
    gc.collect()
    torch.cuda.empty_cache()
    contestants = []
    for name in (STOCK, *case.contestants):
        if races is not None and name in races.called.timings:
            found = _figures(name, races, max(least.values(), default=None), memory.get(name), failed.get(name))
        else:
            found = Contestant(name, version_of(name), missing=absent.get(name), failure=failed.get(name))
        contestants.append(found)
    return CaseResult(
        name=case.name,
        suite=case.suite,
        label=case.label,
        operator=case.operator,
        mode=case.mode.value,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=dict(case.shape),
        threads=torch.get_num_threads(),
        contestants=contestants,
        bars=[judge(bar, contestants) for bar in case.bars],
        noise=noise_of(races.called) if races is not None and STOCK_AGAIN in races.called.timings else None,
        rounds=races.called.rounds if races else 0,
        device="cuda",
        precision=case.precision,
        floors=least,
    )


def _forget(problem: Problem, entries: dict[str, Entry]) -> None:
    """Drop the gradients that calls left behind."""
    for entry in entries.values():
        for tensor in problem.differentiated(entry.module) if entry.module is not None else ():
            tensor.grad = None


def _peaks(problem: Problem, entries: dict[str, Entry], failed: dict[str, str]) -> dict[str, float]:
    """The memory of each call; those that find too little leave ``entries`` for ``failed``.

    Graphs are left out: theirs was taken when they were recorded.
    """
    found = {}
    for name, entry in list(entries.items()):
        if entry.replays:
            continue
        torch.cuda.empty_cache()
        try:
            found[name] = peak_mib(entry.call, lambda: _forget(problem, entries))
        except torch.OutOfMemoryError as error:
            failed[name] = f"OutOfMemoryError: {error}"
            del entries[name]
    torch.cuda.empty_cache()
    return found


def _figures(name: str, races: Races, floor: float | None, memory: float | None, failure: str | None) -> Contestant:
    timing, alone = races.called.timings[name], races.device.timings.get(name)
    ratio = device_ratio = None
    if name == STOCK:
        ratio, device_ratio = Ratio(1.0, 1.0, 1.0), 1.0
    elif STOCK in races.called.timings:
        ratio = races.called.ratio(name, (STOCK, STOCK_AGAIN))
        if alone is not None and STOCK in races.device.timings:
            device_ratio = races.device.ratio(name, (STOCK, STOCK_AGAIN)).value
    return Contestant(
        name,
        version_of(name),
        failure=failure,
        milliseconds=timing.median * 1e3,
        quantile_20=timing.low * 1e3,
        quantile_80=timing.high * 1e3,
        ratio=ratio.value if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        device_milliseconds=alone.median * 1e3 if alone else None,
        device_ratio=device_ratio,
        floor_share=floor / ((alone or timing).median * 1e3) if floor else None,
        peak_mib=memory,
    )
