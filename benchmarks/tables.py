"""Markdown of results: a table for each suite, and what a table of successes would hide."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.cases import STOCK, is_ours
from benchmarks.reasons import reason
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
    "recurrent": "Recurrent layers",
    "lengths": "Sequences of different lengths, packed for stock",
    "cell_states": "LSTM with all cell states against a loop over LSTMCell",
    "cells": "Cells in a Python loop",
    "bf16": "Weights rounded to bfloat16 against stock in float32",
    "attention": "Attention",
    "additive": "Additive attention",
    "dot": "Dot attention",
    "attention_kinds": "Further kinds of attention, and weights from scores",
    "peers": "Other engines",
    "decoder": "Attentional decoders against a loop of torch's cells",
    "models": "Whole models, accelerated",
    "scaling": "One size after the other",
}
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# What stands above the tables.
EXPLANATION = """\
The times faster than stock stand with the interval that holds them at 90 %; losses are bold. The floor is the largest
of the times that the case's bytes, products and scores take at the measured ceilings; a recurrence is bound by the
latency of its steps besides. Microseconds a step and MiB: ours, then stock's."""
GPU_EXPLANATION = """\
Milliseconds as called, L2 flushed and the device idle before each call; in brackets on the device alone, where the host
can run ahead. """


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
    threads = len({case.threads for case in cases}) > 1
    memory = any(c.peak_mib is not None for case in cases for c in case.contestants)
    header = [f"operator, mode, {letters(cases[0])}", "stock ms", *(f"{name} ms" for name in names)]
    header += ["us a step"] if steps else []
    header += ["floor ms", "of floor"]
    header += ["MiB, stock"] if memory else []
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for case in cases:
        stock, mine = case.contestant(STOCK), ours(case)
        sizes = shape(case) if letters(case) == letters(cases[0]) else f"{letters(case)} = {shape(case)}"
        sizes += f", {case.threads} threads" if threads and case.device == "cpu" else ""
        cells = [f"{OPERATORS.get(case.operator, case.operator)} {case.mode} {precision(case)} {sizes}"]
        cells.append(digits(stock.milliseconds if stock else None))
        cells += [_cell(case.contestant(name)) for name in names]
        if steps:
            cells.append(" / ".join(digits(step_us(case, c)) for c in (mine, stock) if c is not None))
        cells.append(digits(max(case.floors.values(), default=None)))
        cells.append(f"{mine.floor_share:.0%}" if mine and mine.floor_share else "")
        if memory:
            peaks = (c.peak_mib for c in (mine, stock) if c is not None)
            cells.append(" , ".join(digits(peak) for peak in peaks if peak is not None))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ours(case: CaseResult) -> Contestant | None:
    """Our contestant that the case's bars are about."""
    names = [bar.contestant for bar in case.bars] or ["ours"]
    return case.contestant(names[0])


def remarks(documents: Mapping[str, Document]) -> list[str]:
    """Losses, missed bars, failures, absences and noise: what a table of successes would hide."""
    cases = [case for document in documents.values() for case in document.cases]
    lines = []
    for case in cases:
        for each in case.contestants:
            if is_ours(each.name) and each.ratio_high is not None and each.ratio_high < 1:
                figure = f"{each.ratio:.2f} ({reason(each.name, case.name)})"
                lines.append(f"- slower than stock beyond noise: {each.name} in {case.name}: {figure}")
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


def page(documents: Mapping[str, Document]) -> str:
    """Every suite of one machine."""
    first = next(iter(documents.values()))
    commits = sorted({str(d.environment.get("commit") or "none")[:10] for d in documents.values()})
    dates = sorted({d.created[:10] for d in documents.values()})
    lines = [f"# {first.environment.get('gpu') or first.environment.get('cpu') or first.environment['machine']}", ""]
    lines += [
        f"{machine(first)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}, "
        f"profile {', '.join(dict.fromkeys(d.profile for d in documents.values()))}.",
        "",
        f"Measured ceilings: {', '.join(ceilings(first)) or 'none'}.",
        "",
        (GPU_EXPLANATION if "gpu" in first.environment else "") + EXPLANATION,
        "",
    ]
    for suite, document in documents.items():
        lines += [f"## {TITLES[suite]}", "", markdown(document), ""]
    return "\n".join([*lines, "## Remarks", "", *remarks(documents), ""])


def machine(document: Document) -> str:
    """What a run was on, in a line."""
    place, versions = document.environment, document.environment.get("versions", {})
    if "gpu" in place:
        return (
            f"{place.get('multiprocessors')} multiprocessors, {place.get('memory_gib')} GiB, driver "
            f"{place.get('driver')}, CUDA {place.get('cuda')}, cuDNN {place.get('cudnn')}, torch "
            f"{versions.get('torch')}, triton {versions.get('triton')}"
        )
    engines = ", ".join(f"{name} {version}" for name, version in versions.items())
    features = ", ".join(place.get("features", []))
    return f"Family {place.get('cpu_family')}, {place.get('cores')} cores, {features}; {engines}"


def ceilings(document: Document) -> list[str]:
    found = [f"FMA, {n} threads {limit:.0f} GF/s" for n, limit in document.fma_gflops.items()]
    return found + [f"{name} {value:.4g}" for name, value in document.ceilings.items()]


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
