"""Measures where the CUDA kernels beat torch's own recurrent functions, and writes the rules that choose between them.

    python -m benchmarks.thresholds [--quick] [--seconds 300] [--points FILE] [--out FILE]

Times one layer at every point of a grid of hidden sizes, batch sizes and steps, forward and forward with backward. A
rule holds for a box of the grid where ours took less than `MARGIN` of torch's time at every corner measured; what lies
outside stays with torch. Two directions and packed sequences are measured at fewer points; a rule speaks of them where
ours won at each of those inside its box. Without --out this GPU's rules in seqattn_kernels/thresholds are replaced.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from seqattn_kernels import functional, native, thresholds

MARGIN = 0.95
HIDDEN = (32, 64, 128, 256, 384, 512, 768, 1024)
BATCH = (1, 4, 8, 16, 32, 64, 128, 256)
STEPS = (16, 128)
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = ("bfloat16", "float32", "float16")
VARIANTS = ("plain", "two directions", "packed")
Point = dict[str, Any]


def module_of(cell: str, hidden: int, bidirectional: bool) -> nn.RNNBase:
    if cell.startswith("rnn"):
        return nn.RNN(hidden, hidden, nonlinearity=cell[4:], bidirectional=bidirectional)
    return (nn.LSTM if cell == "lstm" else nn.GRU)(hidden, hidden, bidirectional=bidirectional)


def milliseconds(function: Any, repeats: int) -> float:
    """The median of single calls, by events on the stream."""
    function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(
    cell: str, dtype: str, training: bool, variant: str, hidden: int, batch: int, steps: int, repeats: int
) -> Point:
    """Milliseconds of torch and of ours, taken in turns."""
    kind, two = getattr(torch, dtype), variant == "two directions"
    module = module_of(cell, hidden, two).cuda().to(kind)
    weights: list[Any] = list(module._flat_weights)
    x = torch.randn(steps, batch, hidden, device="cuda", dtype=kind, requires_grad=training)
    options: dict[str, Any] = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    function = getattr(functional, cell.split("_")[0])
    given: Any = x
    if variant == "packed":
        lengths = torch.linspace(steps, max(steps // 4, 1), batch).long()
        given = pack_padded_sequence(x, lengths)
        given = given._replace(data=given.data.detach().requires_grad_(training))
    x = given.data if variant == "packed" else x
    gradient = torch.randn(*x.shape[:-1], (1 + two) * hidden, device="cuda", dtype=kind)

    def call(backend: str) -> None:
        with torch.set_grad_enabled(training):
            out, _ = function(given, None, weights, training=True, bidirectional=two, backend=backend, **options)
            if training:
                rows = out.data if variant == "packed" else out
                torch.autograd.grad(rows, [x, *weights], gradient)

    turns = [[milliseconds(lambda: call(name), repeats) for name in ("torch", "cuda")] for _ in range(2)]  # noqa: B023
    theirs, ours = min(t for t, _ in turns), max(o for _, o in turns)  # what speaks against ours
    return {
        "cell": cell, "dtype": dtype, "training": training, "variant": variant, "hidden": hidden, "batch": batch,
        "steps": steps, "torch_ms": round(theirs, 4), "ours_ms": round(ours, 4),
    }  # fmt: skip


def grid(quick: bool) -> Iterator[tuple[str, str, bool, str, int, int, int]]:
    """What is measured. Variants of a kind of layer stand together, so that running out of time costs few rules."""
    cells: tuple[str, ...] = CELLS[:2] if quick else CELLS
    for cell, dtype, training, variant in itertools.product(cells, DTYPES, (False, True), VARIANTS):
        coarse = quick or variant != "plain"
        for point in itertools.product(HIDDEN[2::2] if coarse else HIDDEN, BATCH[::3] if coarse else BATCH, STEPS):
            yield cell, dtype, training, variant, *point


def won(p: Point) -> bool:
    return bool(p["ours_ms"] < MARGIN * p["torch_ms"])


def wins(points: list[Point], steps: int) -> dict[tuple[int, int], bool]:
    """(hidden, batch) -> whether ours won at `steps` and at all longer ones."""
    found: dict[tuple[int, int], bool] = {}
    for p in points:
        if p["steps"] >= steps:
            key = p["hidden"], p["batch"]
            found[key] = found.get(key, True) and won(p)
    return found


def boxes(won: dict[tuple[int, int], bool]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Boxes ([least, most] hidden, [least, most] batch) of the grid with no corner or point lost, the widest first."""
    hidden, batch = sorted({h for h, _ in won}), sorted({b for _, b in won})
    left = {key for key, value in won.items() if value}
    covered: set[tuple[int, int]] = set()
    found = []
    pairs_h = list(itertools.combinations_with_replacement(range(len(hidden)), 2))
    pairs_b = list(itertools.combinations_with_replacement(range(len(batch)), 2))
    by_area = sorted(
        itertools.product(pairs_h, pairs_b), key=lambda p: -(p[0][1] - p[0][0] + 1) * (p[1][1] - p[1][0] + 1)
    )
    for (h0, h1), (b0, b1) in by_area:
        inside = set(itertools.product(hidden[h0 : h1 + 1], batch[b0 : b1 + 1]))
        if inside <= left and not inside <= covered:
            found.append(((hidden[h0], hidden[h1]), (batch[b0], batch[b1])))
            covered |= inside
    return found


def variant_won(points: list[Point], variant: str, rule: dict[str, Any]) -> bool:
    """Whether a variant was measured inside a rule's box, and ours won wherever it was."""

    def inside(p: Point, name: str) -> bool:
        least, most = rule[name]
        return least <= p[name] and (most is None or p[name] <= most)

    found = [
        p for p in points if p["variant"] == variant and all(inside(p, name) for name in ("hidden", "batch", "steps"))
    ]
    return bool(found) and all(won(p) for p in found)


def rules_of(points: list[Point]) -> list[dict[str, Any]]:
    """The rules that the measurements allow, as `seqattn_kernels.thresholds` reads them."""
    rules: list[dict[str, Any]] = []
    for cell, dtype, training in itertools.product(CELLS, DTYPES, (False, True)):
        same = [p for p in points if (p["cell"], p["dtype"], p["training"]) == (cell, dtype, training)]
        own = [p for p in same if p["variant"] == "plain"]
        for steps in sorted({p["steps"] for p in own}):
            for hidden, batch in boxes(wins(own, steps)):
                rule = {
                    "cells": [cell], "dtypes": [dtype], "training": [training],
                    "hidden": list(hidden), "batch": list(batch), "steps": [steps, None],
                }  # fmt: skip
                if variant_won(same, "two directions", rule):
                    rule["directions"] = [1, 2]
                if variant_won(same, "packed", rule):
                    rule["packed"] = [False, True]
                shorter = [{**r, "steps": rule["steps"]} for r in rules]
                if rule not in shorter:
                    rules.append(rule)
    return rules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a coarse grid, LSTM and GRU alone")
    parser.add_argument("--seconds", type=float, default=600, help="stop then; what was not measured stays with torch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--points", type=Path, help="write what was measured there")
    parser.add_argument("--out", type=Path, help="write the rules there")
    arguments = parser.parse_args()
    if native.cuda_why_not() is not None or not torch.cuda.is_available():
        print(f"thresholds: nothing measured: {native.cuda_why_not() or 'no GPU that torch can use'}")
        return 1
    torch.backends.cudnn.allow_tf32 = True
    points: list[Point] = []
    end = time.monotonic() + arguments.seconds
    for place in grid(arguments.quick):
        if time.monotonic() > end:
            print(f"thresholds: out of time after {len(points)} points", file=sys.stderr)
            break
        points.append(measure(*place, arguments.repeats))
    gpu = torch.cuda.get_device_name()
    if arguments.points:
        arguments.points.write_text("[\n" + ",\n".join(json.dumps(p) for p in points) + "\n]\n")
    rules = rules_of(points)
    out = arguments.out or Path(thresholds.__file__).parent / thresholds.file_name(gpu)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    header = {"gpu": gpu, "measured": f"{len(points)} points by benchmarks/thresholds.py, {versions}"}
    body = ",\n    ".join(json.dumps(rule) for rule in rules)
    text = json.dumps(header, indent=2)[:-2] + ',\n  "rules": [\n    ' + body + "\n  ]\n}\n"
    out.write_text(text if rules else json.dumps({**header, "rules": []}, indent=2) + "\n")
    print(f"thresholds: {len(points)} points, {len(rules)} rules written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
