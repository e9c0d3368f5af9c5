"""`python -m benchmarks.gpu.report FOLDER`: table.md, report.html and pictures (*.png) of a GPU's results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import STOCK, is_ours
from benchmarks.gpu.bench import SUITES
from benchmarks.html.page import render
from benchmarks.results import CaseResult, Contestant, Document

OPERATORS = {
    "lstm": "LSTM",
    "gru": "GRU",
    "lstm_cell": "LSTMCell",
    "gru_cell": "GRUCell",
    "additive_attention": "additive attention",
    "dot_attention": "dot attention",
    "gru_decoder": "GRU decoder",
    "lstm_decoder": "LSTM decoder",
}
TITLES = {
    "recurrent": "Recurrent layers against cuDNN",
    "lengths": "Sequences of different lengths against packed cuDNN",
    "cell_states": "LSTM with all cell states against a loop over LSTMCell",
    "additive": "Additive attention against eager torch",
    "dot": "Dot attention against eager torch",
    "cells": "Cells in a Python loop against torch's",
    "decoder": "Attentional decoders against a loop of torch's cells",
    "models": "Whole models, accelerated",
    "scaling": "One size after the other",
}
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
COLOURS = {
    "ours": "#1b6ca8",
    "ours_graph": "#7fb7de",
    "ours_cuda": "#2a6f4f",
    "ours_lengths": "#1b6ca8",
    "ours_context": "#1b6ca8",
    "torch_eager": "#888888",
    "torch_graph": "#bbbbbb",
    "torch_compile": "#e08a3c",
    "torch_compile_graph": "#f0c090",
    "torch_sdpa": "#b05050",
    "torch_pack": "#dddddd",
}
# What stands above the tables.
EXPLANATION = """\
Milliseconds as called, L2 flushed and the device idle before each call; in brackets on the device alone, where the host
can run ahead. Then the times faster than stock, with the interval that holds it at 90 %; losses are bold. The floor is
the largest of the times that the case's bytes, products and scores take at the measured ceilings; a recurrence is bound
by the latency of its steps besides. Microseconds a step and MiB: ours, then stock's."""


def load(folder: Path) -> dict[str, Document]:
    """The results of every suite in a folder, in the order of ``SUITES``."""
    return {suite: Document.read(folder / f"{suite}.json") for suite in SUITES if (folder / f"{suite}.json").exists()}


def precision(case: CaseResult) -> str:
    return PRECISIONS.get(case.precision, case.precision)


def shape(case: CaseResult) -> str:
    sizes = {key: size for key, size in case.shape.items() if key != "I" or size != case.shape.get("H")}
    return ",".join(str(size) for size in sizes.values())


def letters(case: CaseResult) -> str:
    return ",".join(key for key, size in case.shape.items() if key != "I" or size != case.shape.get("H"))


def best(contestant: Contestant) -> float | None:
    """Milliseconds on the device where known, else as called."""
    return contestant.device_milliseconds or contestant.milliseconds


def step_us(case: CaseResult, contestant: Contestant) -> float | None:
    """Microseconds a time step of a recurrence takes, input products and gradients included."""
    milliseconds = best(contestant)
    if milliseconds is None or case.suite not in ("recurrent", "lengths", "cell_states", "decoder"):
        return None
    return milliseconds * 1e3 / case.shape["T"]


def markdown(document: Document) -> str:
    """One suite: a row for each case, a column for each contestant."""
    cases = document.cases
    names = list(dict.fromkeys(c.name for case in cases for c in case.contestants if c.name != STOCK))
    names = [n for n in names if any((found := case.contestant(n)) and found.milliseconds for case in cases)]
    steps = any(step_us(case, c) for case in cases for c in case.contestants)
    header = [f"operator, mode, {letters(cases[0])}", "stock ms"]
    header += (
        [f"{name} ms" for name in names] + (["us a step"] if steps else []) + ["floor ms", "of floor", "MiB, stock"]
    )
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for case in cases:
        stock, mine = case.contestant(STOCK), ours(case)
        sizes = shape(case) if letters(case) == letters(cases[0]) else f"{letters(case)} = {shape(case)}"
        cells = [f"{OPERATORS.get(case.operator, case.operator)} {case.mode} {precision(case)} {sizes}"]
        cells.append(digits(stock.milliseconds if stock else None))
        cells += [_cell(case.contestant(name)) for name in names]
        if steps:
            cells.append(" / ".join(digits(step_us(case, c)) for c in (mine, stock) if c is not None))
        floor = max(case.floors.values(), default=None)
        cells.append(digits(floor))
        cells.append(f"{mine.floor_share:.0%}" if mine and mine.floor_share else "")
        cells.append(" , ".join(digits(c.peak_mib) for c in (mine, stock) if c is not None and c.peak_mib is not None))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(document: Document) -> str:
    """One suite in short, for README: times faster than stock; a row for each operator, a column for each shape."""
    columns = list(dict.fromkeys(shape(case) for case in document.cases))
    rows: dict[str, dict[str, str]] = {}
    for case in document.cases:
        mine = ours(case)
        row = f"{OPERATORS.get(case.operator, case.operator)} {case.mode}, {precision(case)}"
        figure = "" if mine is None else "failed" if mine.ratio is None else times(mine.ratio)
        rows.setdefault(row, {})[shape(case)] = figure
    lines = [f"| times stock torch; {letters(document.cases[0])} = | " + " | ".join(columns) + " |"]
    lines.append("|---" + "|---:" * len(columns) + "|")
    lines += [f"| {row} | " + " | ".join(cells.get(c, "") for c in columns) + " |" for row, cells in rows.items()]
    return "\n".join(lines)


def ours(case: CaseResult) -> Contestant | None:
    """Our contestant that the case's bars are about."""
    names = [bar.contestant for bar in case.bars] or ["ours"]
    return case.contestant(names[0])


def remarks(documents: dict[str, Document]) -> list[str]:
    """Losses, missed bars, failures, absences and noise: what a table of successes would hide."""
    cases = [case for document in documents.values() for case in document.cases]
    lines = []
    for case in cases:
        for each in case.contestants:
            if is_ours(each.name) and each.ratio_high is not None and each.ratio_high < 1:
                lines.append(f"- slower than stock beyond noise: {each.name} in {case.name}: {each.ratio:.2f}")
    for case in cases:
        for bar in case.bars:
            if not bar.met:
                reached = "not timed" if bar.reached is None else f"{bar.reached:.2f}"
                lines.append(
                    f"- bar missed: {bar.contestant} in {case.name}: {reached} of {bar.at_least:g} ({bar.against})"
                )
    failures: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for each in case.contestants:
            if each.failure:
                failures.setdefault((each.name, each.failure.splitlines()[0][:200]), []).append(case.name)
    for (name, failure), where in failures.items():
        lines.append(f"- past its tolerance or failed: {name} in {', '.join(where)}: {failure}")
    missing: dict[tuple[str, str], int] = {}
    for case in cases:
        for each in case.contestants:
            if each.missing:
                missing[each.name, each.missing] = missing.get((each.name, each.missing), 0) + 1
    lines += [f"- absent: {name} in {count} cases: {reason}" for (name, reason), count in missing.items()]
    noisy = [case for case in cases if case.noise is not None]
    if noisy:
        noises = sorted(case.noise or 0.0 for case in noisy)
        worst = max(noisy, key=lambda case: case.noise or 0.0)
        lines.append(
            f"- noise (A/A pair): median {noises[len(noises) // 2]:.1%}, worst {noises[-1]:.1%} in {worst.name}"
        )
    met = [bar.met for case in cases for bar in case.bars]
    lines.append(f"- bars met: {sum(met)} of {len(met)}")
    return lines


def page(documents: dict[str, Document]) -> str:
    first = next(iter(documents.values()))
    place, versions = first.environment, first.environment.get("versions", {})
    lines = [f"# {place.get('gpu', place.get('machine'))}", ""]
    lines += [
        f"{place.get('multiprocessors')} multiprocessors, {place.get('memory_gib')} GiB, driver {place.get('driver')}, "
        f"CUDA {place.get('cuda')}, cuDNN {place.get('cudnn')}, torch {versions.get('torch')}, "
        f"triton {versions.get('triton')}; {first.created[:10]}, commit {(place.get('commit') or 'none')[:10]}, "
        f"profile {first.profile}.",
        "",
        "Measured ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in first.ceilings.items()) + ".",
        "",
        EXPLANATION,
        "",
    ]
    for suite, document in documents.items():
        lines += [f"## {TITLES[suite]}", "", markdown(document), ""]
    return "\n".join([*lines, "## Remarks", "", *remarks(documents), ""])


def draw(documents: dict[str, Document], folder: Path) -> list[Path]:
    """For each suite, bars of the times faster than stock on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for suite, document in documents.items():
        cases = document.cases
        names = [n for n in COLOURS if any((c := case.contestant(n)) and c.ratio for case in cases) and n != STOCK]
        if not names:
            continue
        figure, axis = pyplot.subplots(figsize=(max(6.0, 0.5 * len(cases) + 2), 4.5), layout="constrained")
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            found = [(i, c.ratio) for i, case in enumerate(cases) if (c := case.contestant(name)) and c.ratio]
            places = [i + (index - (len(names) - 1) / 2) * width for i, _ in found]
            # From 1 up or down: the length of a bar is the gain or the loss.
            heights = [ratio - 1 for _, ratio in found]
            axis.bar(places, heights, width, bottom=1, color=COLOURS[name], label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
        axis.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_yticks([], minor=True)
        shown = [c.ratio for case in cases for c in case.contestants if c.ratio]
        axis.set_ylim(0.8 * min(1.0, *shown), 1.3 * max(1.2, *shown))
        labels = [f"{OPERATORS.get(c.operator, c.operator)} {precision(c)}\n{c.mode}\n{shape(c)}" for c in cases]
        axis.set_xticks(range(len(cases)), labels=labels, fontsize=6, rotation=90)
        axis.set_ylabel("times faster than stock torch")
        axis.set_title(f"{TITLES[suite]}, {document.environment.get('gpu', '')}")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        path = folder / f"{suite}.png"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        made.append(path)
    return made


def _cell(contestant: Contestant | None) -> str:
    if contestant is None or contestant.milliseconds is None:
        return "failed" if contestant is not None and contestant.failure else ""
    text = digits(contestant.milliseconds)
    if contestant.device_milliseconds is not None:
        text += f" ({digits(contestant.device_milliseconds)})"
    if contestant.ratio is not None and contestant.ratio_low is not None and contestant.ratio_high is not None:
        figure = times(contestant.ratio)
        text += f" {figure if contestant.ratio_high >= 1 else f'**{figure}**'}"
        text += f" [{contestant.ratio_low:.2f}, {contestant.ratio_high:.2f}]"
    return text


def digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="such as benchmarks/results/nvidia-h200")
    options = parser.parse_args(arguments)
    documents = load(options.folder)
    if not documents:
        parser.error(f"{options.folder}: expected results of some of {', '.join(SUITES)}, got none")
    (options.folder / "table.md").write_text(page(documents))
    (options.folder / "report.html").write_text(render(documents))
    pictures = draw(documents, options.folder)
    print(f"{options.folder}: table.md, report.html, {', '.join(path.name for path in pictures)}")
    for line in remarks(documents):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
