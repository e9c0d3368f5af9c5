"""The parts of report.html: heat map, roofline, scaling, memory, every figure, and two runs side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import STOCK, Case, Mode, is_ours
from benchmarks.html.charts import Line, Series, bars, chart, number
from benchmarks.reasons import reason
from benchmarks.results import CaseResult, Contestant, Document
from benchmarks.tables import ceilings
from benchmarks.work import work

ASSETS = Path(__file__).parent
SCALING = "scaling"
# Of several of ours in a case, whose figure the heat map shows: the first that was timed.
OURS = ("ours", "ours_context", "ours_lengths", "ours_frozen", "ours_bf16", "ours_graph")
MOST_BARS = 30


def render(
    documents: Mapping[str, Document],
    earlier: Mapping[str, Document] | None = None,
    usage: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole page. ``documents`` by suite; ``earlier`` is the run they are compared with; ``usage`` as `memory`."""
    cases = [case for document in documents.values() for case in document.cases]
    first = next(iter(documents.values()))
    place = first.environment
    name = str(place.get("gpu") or place.get("cpu") or place.get("machine") or "results")
    sections = [
        _section("Losses and missed bars", losses(cases)),
        _section("Times faster than stock", "".join(heat_map(suite, d) for suite, d in documents.items())),
        _section("Share of the machine's limits", roofline(documents)),
        _section("Scaling", scaling(documents.get(SCALING))),
        _section("Memory", memory(cases, usage)),
        _section("Every figure", table(cases)),
        _section("Two runs", comparison(documents, earlier)),
    ]
    data = json.dumps({"cases": [_brief(case) for case in cases]}).replace("</", "<\\/")
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>seqattn_kernels on {escape(name)}</title>\n<style>{(ASSETS / 'style.css').read_text()}</style>\n"
        f"<h1>seqattn_kernels on {escape(name)}</h1>\n{header(documents)}\n{''.join(sections)}\n"
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>{(ASSETS / 'script.js').read_text()}</script>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    anchor = title.lower().replace(" ", "-")
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{content or "<p>Not measured.</p>"}</section>\n'


def header(documents: Mapping[str, Document]) -> str:
    first = next(iter(documents.values()))
    place = first.environment
    versions = ", ".join(f"{name} {version}" for name, version in place.get("versions", {}).items())
    commits = sorted({str(d.environment.get("commit") or "no commit")[:10] for d in documents.values()})
    dates = sorted({d.created[:10] for d in documents.values()})
    lines = [
        f"{versions}; commit {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
        f"Measured ceilings: {', '.join(ceilings(first)) or 'none'}.",
        "Medians of interleaved runs; the interval holds the ratio with 90 % confidence; nothing that failed its check "
        "against float64 is timed.",
    ]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def losses(cases: Sequence[CaseResult]) -> str:
    """What one would rather not show, first."""
    lost, missed, wrong = [], [], []
    missing: dict[tuple[str, str], int] = {}
    for case in cases:
        where = f"{case.name}, {case.threads} threads" if case.device == "cpu" else case.name
        for each in case.contestants:
            if is_ours(each.name) and each.ratio_high is not None and each.ratio_high < 1:
                why = reason(each.name, case.name)
                lost.append(f"{each.name} in {where}: {each.ratio:.2f} of stock's speed ({why})")
            if each.failure:
                wrong.append(f"{each.name} in {where}: {each.failure.splitlines()[0]}")
            if each.missing and each.missing != "not asked for":
                missing[each.name, each.missing] = missing.get((each.name, each.missing), 0) + 1
        for bar in case.bars:
            if not bar.met:
                reached = "not timed" if bar.reached is None else f"{bar.reached:.2f}"
                missed.append(f"{bar.contestant} in {where}: {reached} of {bar.at_least:g} ({bar.against})")
    absent = [f"{name} in {count} cases: {reason}" for (name, reason), count in missing.items()]
    noises = sorted(case.noise for case in cases if case.noise is not None)
    noise = f"<p>Noise (A/A pair): median {noises[len(noises) // 2]:.1%}, worst {noises[-1]:.1%}.</p>" if noises else ""
    titles = ("Slower than stock beyond noise", "Bars missed", "Failed or past its tolerance", "Absent")
    parts = [noise]
    for title, lines in zip(titles, (lost, missed, wrong, absent), strict=True):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<details{' open' if 0 < len(lines) <= 8 else ''}><summary>{title}: {len(lines)}</summary>")
        parts.append(f"<ul>{items}</ul></details>")
    return "".join(parts)


def ours(case: CaseResult) -> Contestant | None:
    """Our contestant that the heat map shows."""
    found = [contestant for name in OURS if (contestant := case.contestant(name))]
    return next((each for each in found if each.ratio is not None), found[0] if found else None)


def shape(case: CaseResult) -> str:
    return ",".join(str(size) for size in case.shape.values())


def heat_map(suite: str, document: Document) -> str:
    """Rows are operators, modes and precisions, columns shapes; blue is faster than stock, red slower."""
    columns = list(dict.fromkeys(shape(case) for case in document.cases))
    rows: dict[str, dict[str, str]] = {}
    for case in document.cases:
        mine = ours(case)
        if mine is None:
            continue
        row = f"{case.operator} {case.mode} {case.precision}" + (f" {case.threads}T" if case.device == "cpu" else "")
        rows.setdefault(row, {})[shape(case)] = _heat_cell(case, mine)
    if not rows:
        return ""
    sizes = ",".join(document.cases[0].shape)
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escape(row)}</th>{''.join(cells.get(column, '<td></td>') for column in columns)}</tr>"
        for row, cells in rows.items()
    )
    found = f"<table class=heat><tr><th>{sizes} =</th>{head}</tr>{body}</table>"
    return f"<h3>{escape(suite)}</h3><div class=wide>{found}</div>"


def _heat_cell(case: CaseResult, mine: Contestant) -> str:
    if mine.ratio is None:
        return f'<td class=failed title="{escape(mine.failure or mine.missing or "not timed", quote=True)}">–</td>'
    # A factor of 8 is as deep as the colour gets.
    depth = max(-1.0, min(1.0, math.log(mine.ratio) / math.log(8)))
    hue, alpha = (210, depth) if depth >= 0 else (4, -depth)
    interval = f" [{mine.ratio_low:.2f}, {mine.ratio_high:.2f}]" if mine.ratio_low and mine.ratio_high else ""
    text = f"{mine.name}: {mine.milliseconds:.4g} ms, {mine.ratio:.2f}x{interval}"
    lost = " class=lost" if mine.ratio_high is not None and mine.ratio_high < 1 else ""
    figure = (
        f"{mine.ratio:.0f}" if mine.ratio >= 20 else f"{mine.ratio:.1f}" if mine.ratio >= 10 else f"{mine.ratio:.2f}"
    )
    style = f"background:hsla({hue},70%,50%,{0.75 * alpha:.2f})"
    return f'<td{lost} style="{style}" title="{escape(text, quote=True)}">{figure}</td>'


def _case(result: CaseResult) -> Case:
    """The case a result is of, as far as its work depends on it."""
    dtype = getattr(torch, result.dtype)
    return Case(result.suite, result.operator, result.shape, Mode(result.mode), (), dtype=dtype, device=result.device)


def roofline(documents: Mapping[str, Document]) -> str:
    """Operations a second over operations a byte, ours and stock, under the measured limits."""
    return f"<div class=charts>{''.join(f'<figure>{part}</figure>' for part in _rooflines(documents))}</div>"


def _rooflines(documents: Mapping[str, Document]) -> Iterator[str]:
    for suite, document in documents.items():
        points: dict[tuple[str, int], dict[str, list[tuple[float, float, str]]]] = {}
        for result in document.cases:
            amount = work(_case(result))
            if amount is None:
                continue
            threads = result.threads if result.device == "cpu" else 0
            for name, each in ((STOCK, result.contestant(STOCK)), ("ours", ours(result))):
                seconds = each and (each.device_milliseconds or each.milliseconds)
                if not each or not seconds:
                    continue
                speed = amount.operations / seconds * 1e3
                text = f"{each.name}, {result.name}: {number(speed)}FLOP/s"
                found = points.setdefault((result.precision, threads), {}).setdefault(name, [])
                found.append((amount.operations / amount.size, speed, text))
        for (precision, threads), series in points.items():
            where = f", {threads} threads" if threads else ""
            drawn = [
                Series(name, [(x, y) for x, y, _ in each], [text for *_, text in each], joined=False)
                for name, each in series.items()
            ]
            title = f"{suite}, {precision}{where}"
            yield chart(title, "operations a byte", "operations a second", drawn, _limits(document, precision, threads))


def _limits(document: Document, precision: str, threads: int) -> list[Line]:
    found = []
    if str(threads) in document.fma_gflops:
        peak = document.fma_gflops[str(threads)] * 1e9
        found.append(Line("FMA", lambda _: peak))
    rates = {"bfloat16": "bf16_tflops", "float16": "bf16_tflops", "tf32": "tf32_tflops", "float32": "fp32_tflops"}
    limit = document.ceilings.get(rates.get(precision, ""))
    if limit and not threads:
        found.append(Line(f"{precision} products", _constant(limit * 1e12)))
    if "copy_tbs" in document.ceilings and not threads:
        found.append(Line("memory", _sloped(document.ceilings["copy_tbs"] * 1e12, (limit or math.inf) * 1e12)))
    for level in ("memory", "l3", "l2"):
        rate = document.ceilings.get(f"{level}_gbs_{threads}t")
        if rate:
            found.append(Line(level, _sloped(rate * 1e9, document.fma_gflops.get(str(threads), math.inf) * 1e9)))
    return found


def _sloped(rate: float, most: float) -> Callable[[float], float]:
    return lambda x: min(rate * x, most)


def _constant(value: float) -> Callable[[float], float]:
    return lambda _: value


def scaling(document: Document | None) -> str:
    """Milliseconds over one size, all others held; the label of a case names the size."""
    if document is None:
        return ""
    curves: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for case in document.cases:
        size = float(case.threads) if case.label == "threads" else float(case.shape[case.label])
        found = curves.setdefault((case.operator, case.mode, case.label), {})
        for each in case.contestants:
            milliseconds = each.device_milliseconds or each.milliseconds
            if milliseconds:
                threads = f", {case.threads}T" if case.device == "cpu" and case.label != "threads" else ""
                found.setdefault(each.name + threads, []).append((size, milliseconds))
    parts = []
    for (operator, mode, label), series in curves.items():
        drawn = [Series(name, sorted(points)) for name, points in series.items()]
        if drawn:
            parts.append(chart(f"{operator} {mode} over {label}", label, "milliseconds", drawn) + _growth(label, drawn))
    return f"<div class=charts>{''.join(f'<figure>{part}</figure>' for part in parts)}</div>"


def _growth(label: str, series: Sequence[Series]) -> str:
    """How the time, or the memory, of a step grows from the least size to the largest: 1 is flat."""
    if label not in ("T", "S", "B"):
        return ""
    notes = []
    for each in series:
        (first, begin), (last, end) = each.points[0], each.points[-1]
        if last > first and begin > 0:
            notes.append(f"{each.name} {end / last / (begin / first):.2f}")
    return (
        f"<p class=note>For each unit of {label}, at the largest over the least: {escape(', '.join(notes))}</p>"
        if notes
        else ""
    )


def memory(cases: Sequence[CaseResult], usage: Sequence[Mapping[str, Any]] = ()) -> str:
    """Stock and ours: what the cases of a GPU took, and what `benchmarks.memory` found on a CPU (``usage``)."""
    # Without the suite: names are long.
    rows = {each["case"].split("/", 1)[-1]: {STOCK: each["stock_mb"], "ours": each["ours_mb"]} for each in usage}
    for case in cases:
        found = {c.name: c.peak_mib for c in case.contestants if c.peak_mib}
        if len(found) > 1 and STOCK in found:
            rows[f"{case.operator} {case.mode} {case.precision} {shape(case)}"] = found
    # Where stock takes most there is most to see.
    largest = sorted(rows, key=lambda row: -rows[row][STOCK])[:MOST_BARS]
    title = "Most memory at a time beyond inputs and weights"
    return bars(title, {row: rows[row] for row in largest}, "MiB") + _memory_over_steps(usage) if rows else ""


def _memory_over_steps(usage: Sequence[Mapping[str, Any]]) -> str:
    """A curve over T wherever some usages differ in nothing else; a memory linear in T grows by no more than T does."""
    curves: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for each in usage:
        sizes = each.get("shape", {})
        if "T" in sizes:
            rest = tuple((key, size) for key, size in sizes.items() if key != "T")
            curves.setdefault((each["operator"], each["mode"], rest), []).append(each)
    parts = []
    for (operator, mode, rest), found in curves.items():
        if len(found) < 3:
            continue
        drawn = [
            Series(name, sorted((float(each["shape"]["T"]), float(each[field])) for each in found))
            for name, field in ((STOCK, "stock_mb"), ("ours", "ours_mb"))
        ]
        title = f"{operator} {mode}, {','.join(f'{key}={size}' for key, size in rest)}"
        parts.append(f"<figure>{chart(title, 'T', 'MiB', drawn)}{_growth('T', drawn)}</figure>")
    return f"<div class=charts>{''.join(parts)}</div>" if parts else ""


COLUMNS = ("case", "threads", "contestant", "ms", "device ms", "x stock", "interval", "of limit", "MiB", "noise")


def table(cases: Sequence[CaseResult]) -> str:
    rows = []
    for case in cases:
        for each in case.contestants:
            if each.missing:
                continue
            lost = each.ratio_high is not None and each.ratio_high < 1 and is_ours(each.name)
            state = "failed" if each.failure else "lost" if lost else ""
            share = each.floor_share if each.floor_share is not None else each.fma_share
            interval = "" if each.ratio_low is None else f"{each.ratio_low:.2f}–{each.ratio_high:.2f}"
            cells: list[Any] = [case.name, case.threads, each.name]
            cells += [
                each.milliseconds,
                each.device_milliseconds,
                each.ratio,
                interval,
                share,
                each.peak_mib,
                case.noise,
            ]
            rows.append(f"<tr class='{state}'>{''.join(_table_cell(cell) for cell in cells)}</tr>")
    head = "".join(f"<th><button>{name}</button></th>" for name in COLUMNS)
    return (
        '<p><input id=filter type=search placeholder="filter: lstm forward ours" aria-label="filter rows"> '
        "<label><input id=losses type=checkbox> losses and failures only</label> <span id=count></span></p>"
        f"<div class=wide><table id=figures><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table_cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class=number data-value="{value!r}">{number(value)}</td>'
    if isinstance(value, int):
        return f'<td class=number data-value="{value}">{value}</td>'
    return f"<td>{escape(str(value)) if value is not None else ''}</td>"


def _brief(case: CaseResult) -> dict[str, Any]:
    """What the page's script compares with another run."""
    timed = [c for c in case.contestants if c.milliseconds]
    return {
        "name": case.name,
        "threads": case.threads,
        "contestants": [
            {"name": c.name, "milliseconds": c.milliseconds, "ratio": c.ratio, "low": c.ratio_low, "high": c.ratio_high}
            for c in timed
        ],
    }


def comparison(documents: Mapping[str, Document], earlier: Mapping[str, Document] | None) -> str:
    """Ours now and then: the ratio to stock of the same run, since machines differ from day to day."""
    choose = (
        "<p>Compare with another run: <input type=file id=other accept=application/json multiple> "
        "(JSON files of benchmarks/results, read here and sent nowhere)</p><div class=wide id=chosen></div>"
    )
    if earlier is None:
        return choose
    from benchmarks.against import compare

    rows = []
    for found in compare(documents, earlier):
        state = "lost" if found.worse else "won" if found.better else ""
        cells = (found.name, found.threads, found.contestant, found.before, found.now, found.now / found.before)
        rows.append(f"<tr class='{state}'>{''.join(_table_cell(cell) for cell in cells)}</tr>")
    head = "".join(
        f"<th><button>{name}</button></th>"
        for name in ("case", "threads", "contestant", "x stock then", "now", "change")
    )
    return (
        f"<div class=wide><table id=compared><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + choose
    )
