"""`python -m benchmarks.gpu.thresholds FOLDER`: where our recurrence beats cuDNN, from a GPU's results, as rules.

The rules go into seqattn_kernels/thresholds/<gpu>.json. One is written for each cell, dtype and mode: the largest
hidden size up to which ours won at every measured shape, as called and, against cuDNN's own time, as a graph.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.results import CaseResult, Document
from seqattn_kernels import thresholds

LEAST_GAIN = 1.0


def won(case: CaseResult) -> bool | None:
    """Whether ours, asked for by name, was as fast as cuDNN both ways; None where it was not measured."""
    mine, theirs, graphed = (case.contestant(name) for name in ("ours_cuda", "torch_graph", "ours_cuda_graph"))
    if mine is None or mine.ratio is None:
        return None
    if mine.ratio < LEAST_GAIN:
        return False
    if theirs is None or theirs.milliseconds is None or graphed is None or graphed.milliseconds is None:
        return True
    return graphed.milliseconds * LEAST_GAIN <= theirs.milliseconds


def rules(document: Document) -> Iterator[dict[str, Any]]:
    """One rule for each cell, dtype and mode in which ours won at the smallest hidden size measured."""
    groups: dict[tuple[str, str, str], list[CaseResult]] = {}
    for case in document.cases:
        if won(case) is not None:
            groups.setdefault((case.operator, case.dtype, case.mode), []).append(case)
    for (cell, dtype, mode), cases in groups.items():
        sizes = sorted({case.shape["H"] for case in cases})
        most = 0
        for size in sizes:
            if not all(won(case) for case in cases if case.shape["H"] == size):
                break
            most = size
        if most:
            yield {
                "cells": [cell],
                "dtypes": [dtype],
                "training": [mode == "forward+backward"],
                "hidden": [1, most],
                "batch": [1, max(case.shape["B"] for case in cases if case.shape["H"] <= most)],
                "steps": [2, None],
            }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.thresholds", description=__doc__)
    parser.add_argument("folder", type=Path, help="such as benchmarks/results/nvidia-h200")
    parser.add_argument("--out", type=Path, metavar="FILE", help="in place of the package's data file")
    options = parser.parse_args(arguments)
    document = Document.read(options.folder / "recurrent.json")
    gpu = document.environment["gpu"]
    found = list(rules(document))
    out = options.out or ROOT / "seqattn_kernels" / "thresholds" / thresholds.file_name(gpu)
    source = f"benchmarks/results of {document.created[:10]}, commit {str(document.environment.get('commit'))[:10]}"
    text = ",\n".join("    " + json.dumps(rule) for rule in found)
    head = f'  "gpu": {json.dumps(gpu)},\n  "measured": {json.dumps(source)},\n'
    out.write_text(f'{{\n{head}  "rules": [\n{text}\n  ]\n}}\n')
    print(f"{out}: {len(found)} rules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
