"""Alignment heat maps: which source token each target token looked at. Needs matplotlib, imported on first use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of a cell's side and of a heat map's labels, in inches.
CELL = 0.32
MARGIN = 1.0


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot: nothing global is touched, and no display is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _checked(weights: Any, source: Sequence[str], target: Sequence[str]) -> Tensor:
    """weights as [T, S] on the CPU, cut to the tokens given (the rest is padding)."""
    weights = torch.as_tensor(weights).detach().float().cpu()
    if weights.dim() != 2:
        raise ValueError(f"weights: expected [T, S], got {list(weights.shape)}")
    if weights.size(0) < len(target) or weights.size(1) < len(source):
        expected = f"T of at least {len(target)} (from target), S of at least {len(source)} (from source)"
        raise ValueError(f"weights: expected [T, S] with {expected}, got {list(weights.shape)}")
    return weights[: len(target), : len(source)]


def _draw(axes: Axes, weights: Tensor, source: Sequence[str], target: Sequence[str], title: str | None) -> Any:
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    axes.set_xticks(range(len(source)), source)
    axes.set_yticks(range(len(target)), target)
    axes.xaxis.tick_top()
    axes.set_anchor("N")
    axes.tick_params(length=0, labelsize=10)
    axes.set_xticks([i - 0.5 for i in range(1, len(source))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(target))], minor=True)
    axes.grid(which="minor", color="0.88", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color("0.6")
    if title is not None:
        axes.set_title(title, fontsize=11, pad=8)
    return image


def _finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        os.makedirs(os.path.dirname(os.fspath(path)) or ".", exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def plot_alignment(
    weights: Any,
    source: Sequence[str],
    target: Sequence[str],
    *,
    title: str | None = None,
    axes: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """One heat map, source tokens across, target tokens down, dark where the weight is 1.

    weights: [T, S], a tensor or what `torch.as_tensor` takes; rows and columns past the tokens are cut off as padding.
    axes: where to draw; a figure of fitting size is made without it. path: also save it there.
    Returns the figure. Raises ImportError without matplotlib, ValueError for weights smaller than the tokens.
    """
    weights = _checked(weights, source, target)
    if axes is None:
        figure = _figure(max(2.5, CELL * len(source) + 1.5 * MARGIN), max(2.0, CELL * len(target) + MARGIN))
        image = _draw(figure.add_subplot(), weights, source, target, title)
        figure.colorbar(image, ax=figure.axes, label="attention weight", shrink=0.8)
    else:
        figure = axes.get_figure(root=True)  # type: ignore[assignment]
        _draw(axes, weights, source, target, title)
    return _finish(figure, path)


def plot_alignments(
    alignments: Sequence[tuple[Any, Sequence[str], Sequence[str], str | None]],
    *,
    columns: int = 3,
    title: str | None = None,
    source_label: str | None = None,
    target_label: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """A grid of heat maps with one colour scale, each `(weights, source, target, title)` as in `plot_alignment`.

    Returns the figure. Raises ImportError without matplotlib, ValueError without alignments or with too small weights.
    """
    if not alignments:
        raise ValueError("alignments: expected at least one, got none")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    checked = [(_checked(w, source, target), source, target, name) for w, source, target, name in alignments]
    columns = min(columns, len(checked))
    rows = -(-len(checked) // columns)
    widths = [max(len(a[1]) for a in checked[c::columns]) for c in range(columns)]
    heights = [max(len(a[2]) for a in checked[r * columns : (r + 1) * columns]) for r in range(rows)]
    figure = _figure(CELL * sum(widths) + MARGIN * (columns + 1), CELL * sum(heights) + MARGIN * (rows + 0.5))
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths, height_ratios=heights)
    for i, axes in enumerate(grid.flat):
        if i >= len(checked):
            axes.axis("off")
            continue
        _draw(axes, *checked[i])
        if source_label is not None and i + columns >= len(checked):
            axes.set_xlabel(source_label, color="0.4")
        if target_label is not None and i % columns == 0:
            axes.set_ylabel(target_label, color="0.4")
    figure.colorbar(
        grid[0, 0].images[0], ax=grid, label="attention weight", shrink=0.6, aspect=30, pad=0.01, panchor=False
    )
    if title is not None:
        figure.suptitle(title, fontsize=13)
    return _finish(figure, path)


def plot_bars(
    groups: Sequence[str],
    series: dict[str, Sequence[float]],
    *,
    ylabel: str,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Bars side by side: in each of `groups` a bar for each entry of `series`, with its ratio to the first entry's.

    Returns the figure. Raises ImportError without matplotlib, ValueError for a series without one value a group.
    """
    for name, values in series.items():
        if len(values) != len(groups):
            raise ValueError(f"series: expected {len(groups)} values for {name!r} (from groups), got {len(values)}")
    figure = _figure(2.2 + 1.6 * len(groups), 3.8)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    first = next(iter(series.values()))
    for s, (name, values) in enumerate(series.items()):
        places = [g + (s - (len(series) - 1) / 2) * width for g in range(len(groups))]
        colour = ["0.72", "#2166ac", "#67a9cf", "#b2182b"][s % 4]
        axes.bar(places, values, width * 0.94, label=name, color=colour)
        for place, value, base in zip(places, values, first, strict=True):
            text = f"{value:,.0f}" if s == 0 else f"{value:,.0f}\n{value / base:.2f}x"
            axes.annotate(
                text, (place, value), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=9
            )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.set_ylim(0, 1.22 * max(max(values) for values in series.values()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    if title is not None:
        axes.set_title(title, fontsize=11)
    return _finish(figure, path)
