"""`python -m benchmarks.run SUITE...`: measure, print, and keep the results.

Restarts itself with OMP_PROC_BIND=true where that is not set, so torch is imported inside functions only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.environment import cores, in_pinned_process, pin_threads

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from benchmarks.results import CaseResult, Document

SUITES = (
    "recurrent",
    "lengths",
    "cells",
    "bf16",
    "attention",
    "attention_kinds",
    "peers",
    "decoder",
    "models",
    "scaling",
)
DAILY_SUITES = ("recurrent", "lengths", "cells", "attention")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    made.add_argument("suite", nargs="*", metavar="SUITE", help=f"what to measure: {', '.join(SUITES)} or all")
    made.add_argument("--threads", type=_counts, help="numbers of threads, such as 1,2; one for each core without it")
    made.add_argument("--quick", action="store_true", help="a fifth of the time; without a suite, the daily selection")
    made.add_argument(
        "--against", metavar="REF", help="fail where a folder, file or commit REF was faster beyond noise"
    )
    made.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT, such as gru/forward")
    made.add_argument("--peers", type=_names, metavar="A,B", help="these contestants beside stock torch, no others")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all results there instead of benchmarks/results")
    made.add_argument("--no-save", action="store_true", help="write no results")
    made.add_argument("--fail", action="store_true", help="exit with 1 where a bar is missed or a check fails")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    if "OMP_PROC_BIND" not in os.environ:
        return in_pinned_process("benchmarks.run", sys.argv[1:] if arguments is None else arguments)
    options = _options(arguments)
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.against import earlier_results
    from benchmarks.cases import DAILY
    from benchmarks.cases import SUITES as CASES
    from benchmarks.environment import describe
    from benchmarks.results import Document, path_of
    from benchmarks.runner import FULL, QUICK, run

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    profile = QUICK if options.quick else FULL
    daily = not options.suite
    suites = SUITES if daily or "all" in options.suite else tuple(dict.fromkeys(options.suite))
    earlier = None
    if options.against:
        try:
            earlier = earlier_results(options.against, suites, _again(options))
        except ValueError as error:
            console.print(f"[bold red]seqattn bench:[/] {error}", highlight=False)
            return 2
    environment = describe()
    limits, ceilings = _limits(options.threads)
    everything: list[CaseResult] = []
    for suite in suites:
        cases = [case for case in CASES[suite] if options.only in case.name and not (daily and case.name not in DAILY)]
        found: list[CaseResult] = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(suite, total=len(cases) * len(options.threads))
            for result in run(cases, options.threads, profile, options.peers):
                found.append(result)
                progress.update(task, advance=1, description=result.name)
        if not found and daily:
            continue
        if not found:
            console.print(f"{suite}: no case's name contains {options.only!r}")
            continue
        console.print(table(suite, found))
        everything += found
        if not (options.json or options.no_save or options.only or daily or options.against) and options.peers is None:
            Document(environment, found, profile.name, limits, ceilings).write(path_of(suite))
    if options.json:
        Document(environment, everything, profile.name, limits, ceilings).write(options.json)
    for line in remarks(everything):
        console.print(line, highlight=False)
    for count, limit in limits.items():
        reads = ", ".join(
            f"{name.split('_')[0]} {rate:.0f}" for name, rate in ceilings.items() if name.endswith(f"_{count}t")
        )
        console.print(f"limits, {count} threads: FMA {limit:.0f} GF/s; reads, GB/s: {reads}", highlight=False)
    missed = any(not bar.met for result in everything for bar in result.bars)
    failed = any(c.failure and c.milliseconds is None for result in everything for c in result.contestants)
    worse = earlier is not None and _regressed(console, Document(environment, everything, profile.name), earlier)
    return 1 if worse or (options.fail and (missed or failed)) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser()
    options = made.parse_args(arguments)
    unknown = [suite for suite in options.suite if suite not in (*SUITES, "all")]
    if unknown:
        made.error(f"SUITE: expected some of {', '.join((*SUITES, 'all'))}, got {', '.join(unknown)}")
    if not options.suite and not options.quick:
        made.error(f"expected a suite ({', '.join((*SUITES, 'all'))}), or --quick for the daily selection")
    if options.threads is None:
        options.threads = [cores()]
    if not options.suite:
        options.threads = [max(options.threads)]
    return options


def _again(options: argparse.Namespace) -> list[str]:
    """The arguments for the other run: what it measures is what this one does."""
    # An earlier commit may know no daily selection: it measures the suites that hold it.
    found = [*(options.suite or DAILY_SUITES), "--threads", ",".join(map(str, options.threads))]
    found += ["--quick"] if options.quick else []
    found += ["--only", options.only] if options.only else []
    return [*found, *(["--peers", ",".join(options.peers)] if options.peers is not None else [])]


def _regressed(console: Console, now: Document, earlier: Mapping[str, Document]) -> bool:
    """Print what changed beyond noise; whether anything of ours became slower or wrong."""
    from benchmarks.against import compare, lost

    changes = [change for change in compare({"now": now}, earlier) if change.contestant.startswith("ours")]
    for change in changes:
        if change.worse or change.better:
            word = "[red]slower[/]" if change.worse else "[green]faster[/]"
            where = f"{change.contestant} in {change.name} at {change.threads} threads"
            console.print(f"{word}: {where}: {change.before:.2f} to {change.now:.2f} times stock", highlight=False)
    wrong = lost({"now": now}, earlier)
    for line in wrong:
        console.print(f"[red]wrong now[/]: {line}", highlight=False)
    worse = sum(change.worse for change in changes)
    console.print(f"against: {len(changes)} compared, {worse} slower, {sum(c.better for c in changes)} faster")
    if not changes:
        console.print("[red]against: no case was measured undisturbed in both runs[/]")
    return bool(worse or wrong or not changes)


def table(title: str, results: Sequence[CaseResult]) -> Table:
    """One row for each contestant of each case."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", pad_edge=False)
    for heading in ("operator", "mode", "shape", "threads"):
        made.add_column(heading, no_wrap=True)
    made.add_column("contestant", no_wrap=True)
    for heading in ("ms", "20-80 %", "x stock", "interval", "bar", "of FMA"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        sizes = ",".join(str(size) for size in result.shape.values())
        shape = f"{result.label} {sizes}".strip()
        first = (result.operator, result.mode, shape, str(result.threads))
        for contestant in result.contestants:
            if contestant.missing == "not asked for":
                continue
            made.add_row(*first, contestant.name, *_cells(result, contestant.name))
            first = ("", "", "", "")
        made.add_section()
    return made


def _cells(result: CaseResult, name: str) -> list[str]:
    contestant = result.contestant(name)
    assert contestant is not None
    if contestant.milliseconds is None:
        return ["[red]failed[/]" if contestant.failure else "[dim]absent[/]"]
    interval = "" if contestant.ratio_low is None else f"{contestant.ratio_low:.2f}-{contestant.ratio_high:.2f}"
    bars, share = [], "" if contestant.fma_share is None else f"{contestant.fma_share:.0%}"
    for bar in result.bars:
        if bar.contestant != name:
            continue
        colour = "green" if bar.met else "red"
        if bar.against == "fma limit":
            share = f"[{colour}]{share} of {bar.at_least:.0%}[/]"
        elif bar.against == "torch_eager":
            bars.append(f"[{colour}]{bar.at_least:g}[/]")
        else:
            reached = "" if bar.reached is None else f" {bar.reached:.2f}x"
            bars.append(f"[{colour}]{bar.against}{reached}[/]")
    return [
        _digits(contestant.milliseconds),
        f"{_digits(contestant.quantile_20)}-{_digits(contestant.quantile_80)}",
        "" if contestant.ratio is None or name == "torch_eager" else f"[bold]{contestant.ratio:.2f}[/]",
        "" if name == "torch_eager" else interval,
        "\n".join(bars),
        share,
    ]


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def remarks(results: Sequence[CaseResult]) -> list[str]:
    """What the tables do not show: failures, absences, disturbance, noise."""
    from benchmarks.runner import median_noise

    failures: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for contestant in result.contestants:
            if contestant.failure:
                timed = "" if contestant.milliseconds is None else ", timed all the same"
                failures.setdefault((contestant.name, contestant.failure + timed), []).append(result.name)
    lines = [
        f"failed its check: {name} in {', '.join(dict.fromkeys(where))}: {failure}"
        for (name, failure), where in failures.items()
    ]
    absent = {(c.name, c.missing) for r in results for c in r.contestants if c.missing and c.missing != "not asked for"}
    lines += [f"absent: {name}: {reason}" for name, reason in sorted(absent)]
    lines += [f"disturbed by other processes: {r.name} at {r.threads} threads" for r in results if r.disturbed]
    noise = median_noise(results)
    if noise is not None:
        worst = max(results, key=lambda result: result.noise or 0.0)
        lines.append(f"noise (A/A pair): median {noise:.1%}, worst {worst.noise:.1%} in {worst.name}")
    bars = [(result, bar) for result in results for bar in result.bars]
    for result, bar in bars:
        if not bar.met:
            reached = "not timed" if bar.reached is None else f"{bar.reached:.2f}"
            what = f"{bar.contestant} in {result.name} at {result.threads} threads"
            lines.append(f"bar missed: {what}: {reached} of {bar.at_least:g} ({bar.against})")
    lines.append(f"bars met: {sum(bar.met for _, bar in bars)} of {len(bars)}")
    return lines


def _limits(threads: Sequence[int]) -> tuple[dict[str, float], dict[str, float]]:
    """GF/s of FMAs by number of threads, and the ceilings of reading; nothing where they can't be measured."""
    from benchmarks.ceilings import fma_limit, measured

    try:
        found = {str(count): fma_limit(count) / 1e9 for count in threads}
        return found, {name: rate for count in threads for name, rate in measured(count).items()}
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return {}, {}


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2, got {text!r}") from None
    if any(count < 1 for count in counts):
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text!r}")
    return counts


def _names(text: str) -> list[str]:
    from benchmarks.peers import registry

    names = text.split(",")
    unknown = sorted(set(names) - set(registry()))
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(registry())}, got {', '.join(unknown)}")
    return names


if __name__ == "__main__":
    pin_threads()
    sys.exit(main())
