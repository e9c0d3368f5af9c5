"""Charts as inline SVG, drawn without a library so that the report needs nothing but a browser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 26, 44
PALETTE = {
    "ours": "#1b6ca8",
    "ours_frozen": "#5aa0d0",
    "ours_graph": "#5aa0d0",
    "ours_cuda": "#2a6f4f",
    "ours_lengths": "#3b8fb0",
    "ours_context": "#3b8fb0",
    "ours_bf16": "#7a5fb0",
    "torch_eager": "#777777",
    "torch_graph": "#a8a8a8",
    "torch_compile": "#d9822b",
    "torch_compile_graph": "#e6b27a",
    "torch_sdpa": "#b05050",
    "torch_pack": "#8a6d3b",
    "onnxruntime": "#2f8f5b",
    "openvino": "#9c3f8f",
}


@dataclass(frozen=True)
class Series:
    """Points of one contestant, in order; ``texts`` are shown when the pointer rests on a point."""

    name: str
    points: Sequence[tuple[float, float]]
    texts: Sequence[str] = ()
    joined: bool = True


@dataclass(frozen=True)
class Line:
    """A limit: y as a function of x."""

    name: str
    value: Callable[[float], float]


@dataclass
class Axis:
    """A logarithmic axis over what it has to show."""

    values: list[float] = field(default_factory=list)
    low: float = 0.0
    high: float = 1.0

    def fit(self) -> None:
        positive = [value for value in self.values if value > 0 and math.isfinite(value)]
        if not positive:
            raise ValueError("values: expected some above zero to draw, got none")
        self.low, self.high = math.log10(min(positive)), math.log10(max(positive))
        margin = max(0.08 * (self.high - self.low), 0.15)
        self.low, self.high = self.low - margin, self.high + margin

    def place(self, value: float, begin: float, end: float) -> float:
        return begin + (math.log10(value) - self.low) / (self.high - self.low) * (end - begin)

    def ticks(self) -> list[float]:
        """Powers of ten; where those are few, their doubles and fives as well."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        found = [step * 10.0**decade for decade in decades for step in steps]
        return [tick for tick in found if self.low <= math.log10(tick) <= self.high]


def colour(name: str) -> str:
    known = PALETTE.get(name.split(",")[0])
    return known or f"hsl({sum(map(ord, name)) * 47 % 360} 45% 45%)"


def chart(title: str, x_label: str, y_label: str, series: Sequence[Series], lines: Sequence[Line] = ()) -> str:
    """Both axes logarithmic. Raises ValueError where no point has both coordinates above zero."""
    x, y = Axis(), Axis()
    for each in series:
        x.values += [point[0] for point in each.points]
        y.values += [point[1] for point in each.points]
    x.fit()
    for line in lines:
        y.values += [line.value(10**x.low), line.value(10**x.high)]
    y.fit()
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return x.place(point[0], LEFT, right), y.place(point[1], bottom, TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">']
    parts.append(f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>')
    for tick in x.ticks():
        place = x.place(tick, LEFT, right)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place:.1f}" y="{bottom + 14}" text-anchor="middle">{number(tick)}</text>')
    for tick in y.ticks():
        place = y.place(tick, bottom, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{place + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>'
    )
    named: list[tuple[str, float]] = []
    for line in lines:
        steps = [x.low + (x.high - x.low) * i / 60 for i in range(61)]
        path = " ".join("{:.1f},{:.1f}".format(*at((10**s, line.value(10**s)))) for s in steps)
        parts.append(f'<polyline class="limit" points="{path}"><title>{escape(line.name)}</title></polyline>')
        # At the right or the left, where no other name stands: limits meet where they are highest.
        for anchor, end in (("end", x.high), ("start", x.low)):
            spot = at((10**end, line.value(10**end)))
            if all(anchor != other or abs(spot[1] - height) >= 12 for other, height in named):
                named.append((anchor, spot[1]))
                parts.append(
                    f'<text class="limit" x="{spot[0]:.1f}" y="{spot[1] - 4:.1f}" text-anchor="{anchor}">'
                    f"{escape(line.name)}</text>"
                )
                break
    for each in series:
        shown = [point for point in each.points if min(point) > 0]
        if each.joined and len(shown) > 1:
            path = " ".join("{:.1f},{:.1f}".format(*at(point)) for point in shown)
            parts.append(f'<polyline class="curve" stroke="{colour(each.name)}" points="{path}"/>')
        for index, point in enumerate(each.points):
            if min(point) <= 0:
                continue
            text = each.texts[index] if each.texts else f"{each.name}: {number(point[0])}, {number(point[1])}"
            cx, cy = at(point)
            parts.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3.2" fill="{colour(each.name)}">'
                f"<title>{escape(text)}</title></circle>"
            )
    return "".join([*parts, "</svg>", legend([each.name for each in series])])


def bars(title: str, rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Horizontal bars on a logarithmic scale: for each row one bar for each of its names."""
    axis = Axis([value for row in rows.values() for value in row.values()])
    axis.fit()
    axis.low -= 0.15  # the least of them is a bar too
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    thick, gap, left, width = 9, 8, 330, 680
    height = 26 + sum(len(row) * thick + gap for row in rows.values())
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">']
    parts.append(f'<text class="title" x="4" y="15">{escape(title)}, {escape(unit)}</text>')
    top = 24.0
    for label, row in rows.items():
        middle = top + len(row) * thick / 2 + 3
        parts.append(f'<text x="{left - 6}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for name, value in row.items():
            length = max(1.0, axis.place(value, 0, width - left - 60)) if value > 0 else 1.0
            parts.append(
                f'<rect x="{left}" y="{top:.1f}" width="{length:.1f}" height="{thick - 1}" fill="{colour(name)}">'
                f"<title>{escape(name)}: {number(value)} {escape(unit)}</title></rect>"
            )
            parts.append(f'<text x="{left + length + 4:.1f}" y="{top + 7:.1f}">{number(value)}</text>')
            top += thick
        top += gap
    return "".join([*parts, "</svg>", legend(names)])


def legend(names: Sequence[str]) -> str:
    keys = "".join(
        f'<span><i style="background:{colour(name)}"></i>{escape(name)}</span>' for name in dict.fromkeys(names)
    )
    return f'<p class="legend">{keys}</p>'


def number(value: float) -> str:
    """Three digits, thousands and millions in short."""
    for size, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"
