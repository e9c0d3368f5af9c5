"""`python -m benchmarks.gpu.report FOLDER`: table.md, report.html and pictures (*.png) of a GPU's results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import STOCK
from benchmarks.gpu.bench import SUITES
from benchmarks.html.page import render
from benchmarks.results import Document
from benchmarks.tables import OPERATORS, TITLES, letters, ours, page, precision, remarks, shape, times

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


def load(folder: Path) -> dict[str, Document]:
    """The results of every suite in a folder, in the order of ``SUITES``."""
    return {suite: Document.read(folder / f"{suite}.json") for suite in SUITES if (folder / f"{suite}.json").exists()}


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
