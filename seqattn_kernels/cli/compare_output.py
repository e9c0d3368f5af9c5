"""What `seqattn compare` prints and writes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from seqattn_kernels.cli.compare import ERROR_RATIO, Comparison, Difference
from seqattn_kernels.cli.measure import Timing

# Counts up when a field changes its meaning or goes away.
SCHEMA = 1


def show(comparison: Comparison, console: Console) -> None:
    console.print(_difference_table(comparison))
    for difference in comparison.differences:
        if difference.problem is not None:
            console.print(f"[bold red]{difference.what}:[/] {escape(difference.problem)}")
    if comparison.modes:
        console.print(_mode_table(comparison))
    for note in comparison.notes:
        console.print(f"[dim]Note: {escape(note)}[/]")
    if comparison.agrees:
        console.print("[green]The results agree.[/]")
    else:
        console.print("[bold red]The results differ beyond tolerance.[/]")


def _difference_table(comparison: Comparison) -> Table:
    table = Table(title="Largest differences, and both models' errors against float64", title_justify="left")
    for heading in ("", "absolute", "relative", "allowed", "stock", "accelerated", "in"):
        number = heading not in ("", "in")
        table.add_column(heading, justify="right" if number else "left", no_wrap=number)
    for d in comparison.differences:
        style = None if d.agrees else "bold red"
        numbers = [d.absolute, d.relative, d.tolerance, d.stock_error, d.our_error]
        table.add_row(d.what, *("" if n is None else f"{n:.1e}" for n in numbers), escape(d.name), style=style)
    table.caption = (
        "Relative, as the errors: to the largest value of the tensor. A difference past what is allowed passes where "
        f"the error is at most {ERROR_RATIO:g} times stock's."
    )
    return table


def _mode_table(comparison: Comparison) -> Table:
    table = Table(title=f"Time and memory, threads: {comparison.threads}", title_justify="left")
    for heading in ("", "stock", "accelerated", "times faster", "memory", "accelerated", "times less"):
        table.add_column(heading, justify="right" if heading else "left")
    for mode in comparison.modes:
        less = mode.memory_ratio
        table.add_row(
            mode.name,
            _time(mode.stock),
            _time(mode.accelerated),
            f"[bold]{mode.ratio.median:.2f}[/] ({mode.ratio.low:.2f} to {mode.ratio.high:.2f})",
            _bytes(mode.stock_memory),
            _bytes(mode.accelerated_memory),
            "" if less is None else f"{less:.2f}",
        )
    table.caption = (
        "Medians, with the 20 % and 80 % quantiles of the ratio. Memory: the most bytes of tensors held at once beyond "
        "those there before."
    )
    return table


def _time(t: Timing) -> str:
    return f"{t.median * 1e3:.3g} ms" if t.median >= 1e-3 else f"{t.median * 1e6:.3g} us"


def _bytes(n: int) -> str:
    return f"{n / 2**20:.1f} MB" if n >= 2**20 else f"{n / 2**10:.1f} kB"


def write_json(comparison: Comparison, path: Path) -> None:
    """The figures, with what they depend on. Times in seconds, memory in bytes, ratios stock over accelerated."""
    import seqattn_kernels as sk

    def difference(d: Difference) -> dict[str, object]:
        return asdict(d) | {"agrees": d.agrees}

    content = {
        "schema": SCHEMA,
        "factory": comparison.factory,
        "agrees": comparison.agrees,
        "environment": {
            "seqattn_kernels": sk.__version__,
            "torch": torch.__version__,
            "threads": comparison.threads,
            "OMP_PROC_BIND": os.environ.get("OMP_PROC_BIND"),
        },
        "modules": [asdict(row) for row in comparison.replaced.rows],
        "differences": [difference(d) for d in comparison.differences],
        "modes": [asdict(mode) | {"memory_ratio": mode.memory_ratio} for mode in comparison.modes],
        "notes": comparison.notes,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
