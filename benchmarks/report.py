"""`python -m benchmarks.report`: put the measured tables into README.md and draw docs/benchmarks.png.

README holds places such as `<!-- table:recurrent -->` ... `<!-- /table -->`; what stands between is replaced. The
figures there come from benchmarks/results/<machine>/ by this script and from nowhere else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import demo
from benchmarks.cases import SUITES, is_ours
from benchmarks.environment import RESULTS, ROOT, machine_name
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.bench import SUITES as GPU_SUITES
from benchmarks.results import CaseResult, Document
from benchmarks.tables import TITLES

PLACE = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
THREADS = 2
OPERATORS = {
    "gru": "GRU",
    "lstm": "LSTM",
    "rnn_tanh": "RNN",
    "gru_cell": "GRUCell",
    "lstm_cell": "LSTMCell",
    "rnn_tanh_cell": "RNNCell",
    "additive_attention": "additive attention",
    "dot_attention": "dot attention",
    "general_attention": "general attention",
    "concat_attention": "concat attention",
    "feature_attention": "feature attention",
    "gru_decoder": "GRU decoder with additive attention",
    "lstm_decoder": "LSTM decoder with additive attention",
}
MODES = {
    "forward": "inference",
    "forward+backward": "training",
    "steps": "inference",
    "steps+backward": "training",
}
VARIANTS = {
    "ours": "",
    "ours_frozen": ", frozen weights",
    "ours_lengths": ", frozen weights, `lengths=`",
    "ours_bf16": ", bf16 weights",
}
ENGINES = {
    "torch_eager": "torch",
    "torch_compile": "torch.compile",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "ours_frozen": "ours",
}


def ratio_table(document: Document) -> str:
    """Markdown: one row for each operator, mode and variant; one column for each shape; times faster than stock."""
    cases = [case for case in document.cases if case.threads == THREADS and case.operator in OPERATORS]
    columns = list(dict.fromkeys(_shape(case) for case in cases))
    rows: dict[str, dict[str, str]] = {}
    for case in cases:
        for contestant in case.contestants:
            if contestant.name not in VARIANTS or contestant.missing:
                continue
            row = f"{OPERATORS[case.operator]} {MODES[case.mode]}{VARIANTS[contestant.name]}"
            figure = "failed" if contestant.ratio is None else _times(contestant.ratio)
            rows.setdefault(row, {})[_shape(case)] = figure
    names = next((tuple(case.shape) for case in cases), ())
    return _markdown([f"times stock torch; {','.join(names)} =", *columns], rows)


def engine_table(document: Document) -> str:
    """Markdown: milliseconds of each engine, inference, one column for each shape."""
    cases = [case for case in document.cases if case.threads == THREADS and case.operator in OPERATORS]
    columns = list(dict.fromkeys(_shape(case) for case in cases))
    rows: dict[str, dict[str, str]] = {}
    for case in cases:
        times = {c.name: c.milliseconds for c in case.contestants if c.milliseconds is not None}
        for name, milliseconds in times.items():
            figure = f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"
            if milliseconds == min(times.values()):
                figure = f"**{figure}**"
            row = f"{OPERATORS[case.operator]}, {ENGINES.get(name, name)}"
            rows.setdefault(row, {})[_shape(case)] = figure
    names = next((tuple(case.shape) for case in cases), ())
    return _markdown([f"milliseconds; {','.join(names)} =", *columns], rows)


GPU = "gpu_"  # what places for results of a GPU begin with
DEMO = "demo"  # the place of the demo's figures, which are no suite's
LEAST = "least"  # the place of the least gain of each suite


def model_table(document: Document) -> str:
    """Markdown: one row for each whole model; times faster than stock for inference and training."""
    columns = ["inference", "inference, frozen weights", "training"]
    rows: dict[str, dict[str, str]] = {}
    for case in document.cases:
        if case.threads != THREADS:
            continue
        for contestant in case.contestants:
            column = f"{MODES[case.mode]}{VARIANTS.get(contestant.name, '')}"
            if contestant.name in VARIANTS and column in columns:
                figure = "failed" if contestant.ratio is None else _times(contestant.ratio)
                rows.setdefault(f"{case.operator} {_shape(case)}", {})[column] = figure
    names = next((tuple(case.shape) for case in document.cases), ())
    return _markdown([f"times stock torch; {','.join(names)}", *columns], rows)


def least_table(documents: Mapping[str, Document]) -> str:
    """Markdown: a row for each suite of a CPU, the least that we gain in it, where, and the median."""
    rows: dict[str, dict[str, str]] = {}
    for suite, document in documents.items():
        found = [
            (each.ratio, f"{each.name}, {case.operator} {case.mode} {_shape(case)}, {case.threads} threads")
            for case in document.cases
            for each in case.contestants
            if is_ours(each.name) and each.ratio is not None
        ]
        if suite.startswith(GPU) or not found:
            continue
        ratio, where = min(found)
        middle = statistics.median(ratio for ratio, _ in found)
        rows[TITLES[suite]] = {"least": f"{ratio:.2f}x", "where": where, "median": _times(middle)}
    return _markdown(["times stock torch", "least", "where", "median"], rows)


TABLES: Mapping[str, Callable[[Document], str]] = {
    "recurrent": ratio_table,
    "lengths": ratio_table,
    "cells": ratio_table,
    "bf16": ratio_table,
    "attention": ratio_table,
    "peers": engine_table,
    "decoder": ratio_table,
    "models": model_table,
    **{f"{GPU}{suite}": gpu_report.ratios for suite in GPU_SUITES},
}


def _shape(case: CaseResult) -> str:
    return ",".join(str(size) for size in case.shape.values())


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def _markdown(header: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(cells.get(column, "") for column in header[1:]) + " |" for row, cells in rows.items()
    ]
    return "\n".join(lines)


def provenance(document: Document) -> str:
    """One line that says where and when the figures were measured."""
    place = document.environment
    versions: dict[str, Any] = place.get("versions", {})
    commit = (place.get("commit") or "no commit")[:10]
    if "gpu" in place:
        return (
            f"{place['gpu']}, torch {versions.get('torch')}, cuDNN {place.get('cudnn')}; medians of interleaved runs, "
            f"L2 flushed, {document.created[:10]}, commit {commit}, `make gpu`."
        )
    engines = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino") if name in versions)
    return (
        f"{place['cpu']} (family {place.get('cpu_family')}), {THREADS} threads, float32, {engines}; medians of "
        f"interleaved runs, {document.created[:10]}, commit {commit}, "
        f"`python -m benchmarks.run {document.cases[0].suite}`."
    )


def filled(text: str, documents: Mapping[str, Document], summary: Mapping[str, Any] | None = None) -> str:
    """``text`` with every place whose suite was measured filled in; ``summary`` is that of a demo.

    Raises ValueError for a place that names no suite.
    """

    def fill(match: re.Match[str]) -> str:
        opening, suite, closing = match.groups()
        if suite == DEMO:
            return f"{opening}\n{demo.markdown(summary)}\n\n{closing}" if summary else match.group(0)
        if suite == LEAST:
            return f"{opening}\n{least_table(documents)}\n\n{closing}" if documents else match.group(0)
        if suite not in TABLES:
            raise ValueError(f"table:{suite}: expected one of {', '.join((*TABLES, DEMO, LEAST))}")
        if suite not in documents:
            return match.group(0)
        return f"{opening}\n{TABLES[suite](documents[suite])}\n\n{provenance(documents[suite])}\n\n{closing}"

    return PLACE.sub(fill, text)


def draw(documents: Mapping[str, Document], path: Path) -> None:
    """Bars of the times faster than stock: a panel for each recurrent operator, one for attention where measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    recurrent = [case for case in documents["recurrent"].cases if case.threads == THREADS]
    panels = [(name, [case for case in recurrent if case.operator == name]) for name in ("gru", "lstm", "rnn_tanh")]
    if "attention" in documents:
        attention = [case for case in documents["attention"].cases if case.threads == THREADS]
        panels.append(("additive_attention", [case for case in attention if case.operator == "additive_attention"]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 4), layout="constrained", squeeze=False)
    series = (
        ("forward", "ours_frozen", "inference, frozen weights", "#1b6ca8"),
        ("forward", "ours", "inference", "#7fb7de"),
        ("forward+backward", "ours", "training", "#e08a3c"),
    )
    for axis, (operator, cases) in zip(axes[0], panels, strict=True):
        shapes = list(dict.fromkeys(_shape(case) for case in cases))
        present = [entry for entry in series if _ratios(cases, shapes, entry[0], entry[1])]
        width = 0.8 / max(1, len(present))
        for index, (mode, name, label, colour) in enumerate(present):
            ratios = _ratios(cases, shapes, mode, name)
            places = [shapes.index(shape) + (index - (len(present) - 1) / 2) * width for shape in ratios]
            # From 1 up or down: the length of a bar is the gain or the loss.
            heights = [ratio - 1 for ratio in ratios.values()]
            axis.bar(places, heights, width, bottom=1, color=colour, label=label)
            for place, ratio in zip(places, ratios.values(), strict=True):
                above = ratio >= 1
                text = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
                align = "bottom" if above else "top"
                axis.text(place, ratio, text, ha="center", va=align, fontsize=6)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_yticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
        axis.set_yticks([], minor=True)
        # The recurrent panels share their scale; attention's gains are of another size.
        shown = recurrent if cases and cases[0].suite == "recurrent" else cases
        ratios_shown = [c.ratio for case in shown for c in case.contestants if c.ratio is not None]
        axis.set_ylim(min([0.8, *(0.8 * ratio for ratio in ratios_shown)]), 1.4 * max([2, *ratios_shown]))
        axis.set_xticks(range(len(shapes)), labels=[shape.replace(",", "\n") for shape in shapes], fontsize=7)
        axis.set_title(OPERATORS[operator])
        axis.set_xlabel(",".join(cases[0].shape) if cases else "", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("times faster than stock torch")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _ratios(cases: Sequence[CaseResult], shapes: Sequence[str], mode: str, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for case in cases:
        contestant = case.contestant(name)
        if case.mode == mode and contestant is not None and contestant.ratio is not None and _shape(case) in shapes:
            found[_shape(case)] = contestant.ratio
    return found


def load(machine: str) -> dict[str, Document]:
    """The results of every suite measured on a machine."""
    found = {suite: RESULTS / machine / f"{suite}.json" for suite in SUITES}
    return {suite: Document.read(path) for suite, path in found.items() if path.exists()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--machine", default=machine_name(), help="a folder of benchmarks/results")
    parser.add_argument("--gpu", metavar="NAME", help="a folder of benchmarks/results measured on a GPU")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="keep the figures and pictures of the demo there")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "benchmarks.png")
    options = parser.parse_args(arguments)
    documents = load(options.machine)
    if "recurrent" not in documents:
        parser.error(f"no results of {options.machine} yet: run `python -m benchmarks.run recurrent` first")
    if options.gpu:
        documents |= {f"{GPU}{suite}": found for suite, found in gpu_report.load(RESULTS / options.gpu).items()}
    if options.demo:
        try:
            demo.keep(options.demo)
        except ValueError as error:
            parser.error(str(error))
    kept = RESULTS / options.machine / f"{DEMO}.json"
    after = filled(options.readme.read_text(), documents, json.loads(kept.read_text()) if kept.exists() else None)
    options.readme.write_text(after)
    draw(documents, options.picture)
    places = [match.group(2) for match in PLACE.finditer(after)]
    print(f"{options.readme.name}: {', '.join(places) or 'no places'}; {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
