"""`python -m benchmarks.sweep`: is ours slower than stock torch at any size? Lists the sizes where it is.

Measured sizes are kept in build/ until the package changes, so that a sweep can be stopped and taken up again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.environment import RESULTS, ROOT, describe, machine_name, pin_threads

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.cases import Case

BATCHES = (1, 2, 3, 4, 7, 8, 16, 33, 64, 128)
HIDDEN = (1, 7, 16, 63, 128, 200, 257, 512, 1024)
STEPS = (1, 2, 33, 200)
THREADS = (1, 2)
KINDS = ("gru", "lstm", "rnn_tanh")
FIRST_CALLS = ((1, 1, 1), (1, 128, 33), (16, 256, 33))  # B, H, T
FIRST_CALL_RUNS = 5

# A ratio under this is measured again, for longer, before it is believed.
SUSPICIOUS = 1.03
# Results are checked against float64 up to this many operations; the tests hold the larger sizes.
CHECKED_FLOPS = 2e9


@dataclass(frozen=True)
class Point:
    """One size. ``steps`` is 0 for a cell called in a loop; ``mode`` is a value of cases.Mode or "first call"."""

    kind: str
    mode: str
    batch: int
    hidden: int
    steps: int
    threads: int

    @property
    def name(self) -> str:
        what = f"{self.kind} {self.mode}" if self.steps else f"{self.kind}_cell {self.mode}"
        size = f"B={self.batch} H={self.hidden}" + (f" T={self.steps}" if self.steps else "")
        return f"{what} {size} threads={self.threads}"

    @property
    def case(self) -> Case:
        from benchmarks.cases import Case, Mode

        shape = {"B": self.batch, "T": self.steps, "I": self.hidden, "H": self.hidden}
        operator = self.kind
        if not self.steps:
            del shape["T"]
            operator += "_cell"
        mode = Mode.FORWARD if self.mode == "first call" else Mode(self.mode)
        return Case("sweep", operator, shape, mode, ("ours",))


@dataclass(frozen=True)
class Measured:
    name: str
    ratio: float
    low: float
    high: float
    stock_ms: float
    ours_ms: float
    failure: str | None = None

    @property
    def slower(self) -> bool:
        """Slower than stock by more than the noise."""
        return self.failure is None and self.high < 1.0


def points() -> list[Point]:
    """Every size of the sweep."""
    modes = ("forward", "forward+backward")
    found = [
        Point(kind, mode, batch, hidden, steps, threads)
        for kind in KINDS
        for mode in modes
        for batch in BATCHES
        for hidden in HIDDEN
        for steps in STEPS
        for threads in THREADS
    ]
    found += [
        Point(kind, mode, batch, hidden, 0, threads)
        for kind in KINDS
        for mode in ("steps", "steps+backward")
        for batch in BATCHES
        for hidden in HIDDEN
        for threads in THREADS
    ]
    found += [
        Point(kind, "first call", *size, threads) for kind in KINDS for size in FIRST_CALLS for threads in THREADS
    ]
    return found


def measure(point: Point, seconds: float) -> Measured:
    """Time ours and stock in turns; for longer where the first answer is that ours is no faster."""
    if point.mode == "first call":
        return first_call(point)
    import torch

    from benchmarks.cases import STOCK
    from benchmarks.measure import race
    from benchmarks.problems import build
    from benchmarks.runner import check_module

    case = point.case
    torch.set_num_threads(point.threads)
    with torch.set_grad_enabled(case.mode.has_gradients):
        problem = build(case)
        stock, ours = problem.stock(), problem.ours()
        if (case.flops or 0) <= CHECKED_FLOPS:
            failure = check_module(ours, problem)
            if failure is not None:
                return Measured(point.name, 0.0, 0.0, 0.0, 0.0, 0.0, failure)
        calls = {STOCK: problem.call(stock), "ours": problem.call(ours)}
        found = race(calls, seconds=seconds, least_rounds=3, patience=3)
        ratio = found.ratio("ours", (STOCK,))
        if ratio.value < SUSPICIOUS:
            found = race(calls, seconds=6 * seconds, least_rounds=9, patience=4)
            ratio = found.ratio("ours", (STOCK,))
    stock_ms, ours_ms = (found.timings[name].median * 1e3 for name in (STOCK, "ours"))
    return Measured(point.name, ratio.value, ratio.low, ratio.high, stock_ms, ours_ms)


def first_call(point: Point) -> Measured:
    """The first call in a process of its own, imports not counted: medians of a few processes each, in turns."""
    spent: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(FIRST_CALL_RUNS):
        for which, times in spent.items():
            arguments = [which, point.kind, str(point.batch), str(point.hidden), str(point.steps), str(point.threads)]
            command = [sys.executable, "-m", "benchmarks.first_call", *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                return Measured(point.name, 0.0, 0.0, 0.0, 0.0, 0.0, done.stderr.strip().splitlines()[-1])
            times.append(float(done.stdout))
    stock, ours = (statistics.median(times) for times in spent.values())
    low, high = min(spent["stock"]) / max(spent["ours"]), max(spent["stock"]) / min(spent["ours"])
    return Measured(point.name, stock / ours, low, high, stock * 1e3, ours * 1e3)


def fingerprint() -> str:
    """Changes when what is measured changes: the package's code and its built library."""
    digest = hashlib.sha256(machine_name().encode())
    package = ROOT / "seqattn_kernels"
    rooms = [package / room for room in ("functional", "nn", "ops")]
    files = [*package.glob("*.so"), *package.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]
    for file in sorted(files):
        if file.name != "plotting.py":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def run(chosen: Sequence[Point], kept: Path, seconds: float, budget: float | None) -> Iterator[Measured]:
    """Measure the points that ``kept`` does not hold yet, adding each to it, until the budget is spent."""
    done = {entry.name: entry for entry in load(kept)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with kept.open("a") as file:
        for point in chosen:
            if point.name in done:
                yield done[point.name]
                continue
            if budget is not None and time.perf_counter() - begin > budget:
                return
            found = measure(point, seconds)
            file.write(json.dumps(asdict(found)) + "\n")
            file.flush()
            yield found


def load(kept: Path) -> list[Measured]:
    if not kept.exists():
        return []
    return [Measured(**json.loads(line)) for line in kept.read_text().splitlines() if line.endswith("}")]


def summary(found: Sequence[Measured], total: int) -> dict[str, object]:
    """How many sizes were measured, the spread of the ratios by operator and mode, and every size below 1.0."""
    groups: dict[str, list[float]] = {}
    for entry in found:
        if entry.failure is None:
            groups.setdefault(entry.name.split(" B=")[0], []).append(entry.ratio)
    spread = {
        name: {"sizes": len(ratios), "least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}
        for name, ratios in groups.items()
    }
    slower = sorted((entry for entry in found if entry.slower), key=lambda entry: entry.ratio)
    return {
        "measured": len(found),
        "of": total,
        "ratios": spread,
        "slower": [asdict(entry) for entry in slower],
        "failed": [asdict(entry) for entry in found if entry.failure],
    }


def show(found: Sequence[Measured], total: int, console: Console) -> None:
    from rich.table import Table

    facts = summary(found, total)
    table = Table(title="times faster than stock, by operator and mode", title_justify="left", pad_edge=False)
    for heading in ("operator and mode", "sizes", "least", "median", "most"):
        table.add_column(heading, justify="left" if heading.startswith("operator") else "right")
    spread = facts["ratios"]
    assert isinstance(spread, dict)
    for name, row in spread.items():
        table.add_row(name, str(row["sizes"]), *(f"{row[key]:.2f}" for key in ("least", "median", "most")))
    console.print(table)
    for entry in sorted((entry for entry in found if entry.slower), key=lambda entry: entry.ratio):
        times = f"{entry.stock_ms:.4g} ms stock, {entry.ours_ms:.4g} ours"
        console.print(f"{entry.ratio:.3f} ({entry.low:.3f}-{entry.high:.3f})  {entry.name}  {times}", highlight=False)
    for entry in found:
        if entry.failure:
            console.print(f"[red]failed[/]: {entry.name}: {entry.failure}", highlight=False)
    slower = sum(entry.slower for entry in found)
    console.print(f"{len(found)} of {total} sizes measured, {slower} slower than stock beyond noise", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="N sizes drawn at random, the same for each --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop taking new sizes after this time")
    parser.add_argument("--seconds", type=float, default=0.15, help="for each size, more where ours looks no faster")
    parser.add_argument("--only", default="", metavar="TEXT", help="sizes whose name contains TEXT")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--json", type=Path, default=RESULTS / machine_name() / "sweep.json", metavar="FILE")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.progress import track

    chosen = [point for point in points() if options.only in point.name]
    # In random order, so that a sweep cut short has seen something of everything.
    random.Random(options.seed).shuffle(chosen)
    if options.sample is not None:
        chosen = chosen[: options.sample]
    kept = ROOT / "build" / f"sweep-{fingerprint()}.jsonl"
    if options.fresh:
        kept.unlink(missing_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    found = list(
        track(run(chosen, kept, options.seconds, options.budget), total=len(chosen), console=console, transient=True)
    )
    show(found, len(chosen), console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"schema": 1, "environment": describe(), **summary(found, len(points()))}, indent=1) + "\n"
    )
    return 1 if any(entry.failure or entry.slower for entry in found) else 0


if __name__ == "__main__":
    pin_threads()
    sys.exit(main())
