"""Check every contestant of a case against float64, then time those that passed, in turns."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.cases import FMA_LIMIT, STOCK, STOCK_AGAIN, Bar, Case
from benchmarks.ceilings import floors, fma_limit
from benchmarks.measure import Race, Ratio, race
from benchmarks.peers import Entry, Peer, Unsuitable, registry
from benchmarks.problems import Named, Problem, build
from benchmarks.results import BarResult, CaseResult, Contestant
from tests.compare import difference, error_ratio


@dataclass(frozen=True)
class Profile:
    """How long each case is measured."""

    name: str
    seconds: float
    least_rounds: int
    patience: float = 4.0  # up to how many times that time where other processes disturb


# All suites take under 20 minutes at one number of threads; the daily selection takes under one.
FULL = Profile("full", 3.0, 9)
QUICK = Profile("quick", 0.8, 7, 2.0)


def check(entry: Entry, problem: Problem, stock: Entry | None = None) -> str | None:
    """None where the contestant's results are those of float64 within its dtype's tolerance, else what differs.

    A result past it passes where its errors are within our bars on accuracy, at most 2 times stock's largest and 1.5
    times its mean: there the problem has fewer digits than the tolerance asks for.
    """
    found, dtype = entry.outcome(), entry.dtype or problem.case.tolerance
    failure = _compare(found, problem, dtype, entry.omits)
    if failure is None or stock is None:
        return failure
    return _compare(found, problem, dtype, entry.omits, dict(stock.outcome()))


def check_module(module: nn.Module, problem: Problem) -> str | None:
    """``check`` for a module that takes the problem's inputs."""
    return _compare(problem.outcome(module, problem.call(module)), problem, problem.case.tolerance)


def _compare(
    found: Named,
    problem: Problem,
    dtype: torch.dtype,
    omits: Collection[str] = (),
    by_stock: Mapping[str, torch.Tensor] | None = None,
) -> str | None:
    expected = [(name, oracle) for name, oracle in problem.oracle if name not in omits]
    if [name for name, _ in found] != [name for name, _ in expected]:
        return f"expected the results {[name for name, _ in expected]}, got {[name for name, _ in found]}"
    problems = [
        difference(actual, oracle, dtype, name)
        for (name, actual), (_, oracle) in zip(found, expected, strict=True)
        if by_stock is None or not _as_exact(actual, by_stock[name], oracle)
    ]
    return "\n".join(filter(None, problems)) or None


def _as_exact(actual: torch.Tensor, stock: torch.Tensor, oracle: torch.Tensor) -> bool:
    if actual.shape != oracle.shape or not oracle.isfinite().all():
        return False
    return error_ratio(actual.to(oracle.device), stock.to(oracle.device), oracle).within_bars


def run_case(case: Case, threads: int, profile: Profile = FULL, only: Collection[str] | None = None) -> CaseResult:
    """Measure one case. ``only`` names the contestants to take besides stock; by default all that prepare quickly."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ExitStack() as stack, torch.set_grad_enabled(case.mode.has_gradients):
            problem = build(case)
            entries, absent, failed = qualify(case, problem, only, stack)
            calls = {name: entry.call for name, entry in entries.items()}
            linger = {name: entry.linger for name, entry in entries.items()}
            problem.__dict__.pop("oracle", None)  # it may be large
            gc.collect()
            if STOCK in calls:
                calls[STOCK_AGAIN] = _again(calls[STOCK])
            outcome = None
            if calls:
                outcome = race(
                    calls,
                    seconds=profile.seconds,
                    least_rounds=profile.least_rounds,
                    patience=profile.patience,
                    linger=linger,
                )
    finally:
        torch.set_num_threads(before)
    least = floors(case, threads)
    contestants = [
        dataclasses.replace(_figures(name, case, outcome, threads, least), failure=failed.get(name))
        if outcome is not None and name in outcome.timings
        else Contestant(name, version_of(name), missing=absent.get(name), failure=failed.get(name))
        for name in (STOCK, *case.contestants)
    ]
    return CaseResult(
        name=case.name,
        suite=case.suite,
        label=case.label,
        operator=case.operator,
        mode=case.mode.value,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=dict(case.shape),
        threads=threads,
        contestants=contestants,
        bars=[judge(bar, contestants) for bar in case.bars if bar.threads == threads],
        noise=noise_of(outcome) if outcome is not None and STOCK_AGAIN in outcome.timings else None,
        rounds=outcome.rounds if outcome else 0,
        dropped=outcome.dropped if outcome else 0,
        disturbed=outcome.disturbed if outcome else False,
        floors=least,
    )


def run(
    cases: Iterable[Case], threads: Iterable[int], profile: Profile = FULL, only: Collection[str] | None = None
) -> Iterator[CaseResult]:
    """Measure the cases one after the other at each number of threads; those over threads from one thread up."""
    counts = list(threads)
    every = sorted({*counts, *(2**n for n in range(max(counts).bit_length()))})
    for case in cases:
        for count in every if case.label == "threads" else counts:
            yield run_case(case, count, profile, only)


def _again(call: Callable[[], object]) -> Callable[[], object]:
    return lambda: call()


def qualify(
    case: Case, problem: Problem, only: Collection[str] | None, stack: ExitStack
) -> tuple[dict[str, Entry], dict[str, str], dict[str, str]]:
    """The contestants that may be timed, why others are absent, and what others got wrong."""
    entries: dict[str, Entry] = {}
    absent: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in (STOCK, *case.contestants):
        peer = registry()[name]
        reason = _why_not(peer, problem, only)
        if reason is not None:
            absent[name] = reason
            continue
        try:
            entry = peer.prepare(problem, stack)
            failure = check(entry, problem, entries.get(STOCK))
        except Unsuitable as reason:
            absent[name] = str(reason)
            continue
        except Exception as error:  # one that breaks is reported by name; the others are still measured
            failed[name] = f"{type(error).__name__}: {error}".removesuffix(": ")
            continue
        if failure is not None:
            failed[name] = failure
        # Stock is what the others are compared with: where it is past the tolerance itself, that is noted only.
        if failure is None or name == STOCK:
            entries[name] = entry
    return entries, absent, failed


def _why_not(peer: Peer, problem: Problem, only: Collection[str] | None) -> str | None:
    if only is not None and peer.name != STOCK and peer.name not in only:
        return "not asked for"
    reason = peer.installed() or peer.why_not(problem)
    if reason is None and peer.takes_minutes(problem) and (only is None or peer.name not in only):
        return "takes minutes to prepare: name it in --peers"
    return reason


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(registry()[name].package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _figures(name: str, case: Case, outcome: Race, threads: int, least: Mapping[str, float]) -> Contestant:
    timing = outcome.timings[name]
    ratio = Ratio(math.nan, math.nan, math.nan)
    if STOCK in outcome.timings:
        ratio = Ratio(1.0, 1.0, 1.0) if name == STOCK else outcome.ratio(name, (STOCK, STOCK_AGAIN))
    limit = _limit(threads)
    return Contestant(
        name,
        version_of(name),
        milliseconds=timing.median * 1e3,
        quantile_20=timing.low * 1e3,
        quantile_80=timing.high * 1e3,
        ratio=known(ratio.value),
        ratio_low=known(ratio.low),
        ratio_high=known(ratio.high),
        fma_share=case.flops / timing.median / limit if case.flops and limit else None,
        floor_share=max(least.values()) / (timing.median * 1e3) if least else None,
    )


def known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _limit(threads: int) -> float | None:
    try:
        return fma_limit(threads)
    except RuntimeError:
        return None


def noise_of(outcome: Race) -> float:
    """How far the halves of the A/A pair lie from each other: the larger of their medians and the interval's half."""
    pair = outcome.ratio(STOCK, (STOCK_AGAIN,))
    return max(abs(pair.value - 1), (pair.high - pair.low) / 2)


def judge(bar: Bar, contestants: list[Contestant]) -> BarResult:
    found = {contestant.name: contestant for contestant in contestants}
    mine = found.get(bar.contestant)
    reached: float | None = None
    if mine is not None and mine.milliseconds is not None:
        if bar.against == FMA_LIMIT:
            reached = mine.fma_share
        elif bar.against == STOCK:
            reached = mine.ratio
        elif (other := found.get(bar.against)) is not None and other.milliseconds is not None:
            reached = other.milliseconds / mine.milliseconds
    met = reached is not None and reached >= bar.at_least
    return BarResult(bar.contestant, bar.against, bar.at_least, reached, met)


def median_noise(results: Collection[CaseResult]) -> float | None:
    found = [result.noise for result in results if result.noise is not None]
    return statistics.median(found) if found else None
