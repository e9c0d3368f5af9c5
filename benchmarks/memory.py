"""`python -m benchmarks.memory`: the most memory one call takes beyond its inputs and weights, ours against stock.

Each contestant runs in a process of its own, warmed up on a small case first, so that nothing is counted that other
calls left behind. Linux only: the kernel's own high-water mark of the process is read.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.environment import RESULTS, ROOT, describe, machine_name, pin_threads

if TYPE_CHECKING:
    from benchmarks.cases import Case

# How many times less than stock ours may take at least, by operator and shape.
BARS: tuple[tuple[str, dict[str, int], float], ...] = (
    ("additive_attention", {"B": 8, "T": 128, "S": 512, "A": 256}, 50.0),
    ("gru_decoder", {"B": 32, "T": 50, "S": 50, "H": 256}, 4.0),
)
CONTESTANTS = ("torch_eager", "ours")


@dataclass(frozen=True)
class Usage:
    case: str
    stock_mb: float
    ours_mb: float
    ratio: float
    bar: float | None
    met: bool | None
    operator: str = ""
    mode: str = ""
    shape: dict[str, int] = field(default_factory=dict)


def cases() -> list[Case]:
    """Attention in both modes, training of recurrent layers and of a decoder, and some training over T."""
    from benchmarks.cases import SUITES, Case, Mode

    found = [case for case in SUITES["attention"] if case.operator == "additive_attention"]
    found += [case for case in SUITES["recurrent"] if case.mode is Mode.TRAINING and case.label in ("S2", "S4", "S5")]
    curves: tuple[tuple[str, str, dict[str, int]], ...] = (
        ("recurrent", "gru", {"B": 16, "T": 0, "I": 256, "H": 256}),
        ("attention", "additive_attention", {"B": 8, "T": 0, "S": 256, "A": 256}),
        ("decoder", "gru_decoder", {"B": 32, "T": 0, "S": 50, "H": 256}),
    )
    for suite, operator, shape in curves:
        for steps in (50, 100, 200, 400):
            found.append(Case(suite, operator, {**shape, "T": steps}, Mode.TRAINING, ("ours",)))
    return list({case.name: case for case in found}.values())


def status(field: str) -> float:
    """Megabytes of a memory field of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected a field {field}, got none")
    return int(found.group(1)) / 1024


def measure_here(case: Case, contestant: str) -> float:
    """Megabytes one call takes at most, in this process, above what is there before it."""
    from contextlib import ExitStack

    import torch

    from benchmarks.peers import registry
    from benchmarks.problems import build

    torch.set_num_threads(2)
    peer = registry()[contestant]
    small = replace(case, shape={key: min(size, 16) for key, size in case.shape.items()})
    with ExitStack() as stack, torch.set_grad_enabled(case.mode.has_gradients):
        warm = peer.prepare(build(small), stack)
        warm.call()
        warm.call()
        entry = peer.prepare(build(case), stack)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is used now
        before = status("VmRSS")
        entry.call()
        return max(0.0, status("VmHWM") - before)


def measure(case: Case, contestant: str) -> float:
    """``measure_here`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", case.name, contestant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {contestant} failed: {done.stderr.strip()[-500:]}")
    return float(done.stdout)


def compare(case: Case) -> Usage:
    stock, ours = (measure(case, contestant) for contestant in CONTESTANTS)
    # A page is the least that can be seen.
    ratio = stock / max(ours, 4 / 1024)
    bar = next((least for name, shape, least in BARS if (name, shape) == (case.operator, dict(case.shape))), None)
    met = None if bar is None else ratio >= bar
    return Usage(case.name, stock, ours, ratio, bar, met, case.operator, case.mode.value, dict(case.shape))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "CONTESTANT"), help="print one figure, in this process")
    parser.add_argument("--json", type=Path, default=RESULTS / machine_name() / "memory.json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.measure:
        name, contestant = options.measure
        print(measure_here(next(case for case in cases() if case.name == name), contestant))
        return 0
    from rich.console import Console
    from rich.table import Table

    found = [compare(case) for case in cases() if options.only in case.name]
    table = Table(title="peak extra memory of one call, MB", title_justify="left", pad_edge=False)
    for heading in ("case", "stock", "ours", "stock / ours", "bar"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for usage in found:
        colour = "green" if usage.met else "red"
        bar = "" if usage.bar is None else f"[{colour}]{usage.bar:g}[/]"
        table.add_row(usage.case, f"{usage.stock_mb:.1f}", f"{usage.ours_mb:.1f}", f"{usage.ratio:.1f}", bar)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": 1, "environment": describe(), "usage": [asdict(usage) for usage in found]}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(usage.met is False for usage in found) else 0


if __name__ == "__main__":
    pin_threads()
    sys.exit(main())
