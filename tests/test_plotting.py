"""Heat maps and bars: what is drawn, and clear errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seqattn_kernels.plotting import plot_alignment, plot_alignments, plot_bars

matplotlib = pytest.importorskip("matplotlib")


def drawn(axes: Any) -> torch.Tensor:
    return torch.as_tensor(axes.images[0].get_array().filled())


def labels(ticks: Any) -> list[str]:
    return [tick.get_text() for tick in ticks]


def test_alignment_shows_weights_and_tokens(tmp_path: Path) -> None:
    weights = torch.rand(5, 6, requires_grad=True, dtype=torch.bfloat16)
    path = tmp_path / "new" / "alignment.png"
    figure = plot_alignment(weights, list("word"), ["W", "ER", "D"], title="word", path=path)
    axes = figure.axes[0]
    assert torch.equal(drawn(axes), weights[:3, :4].detach().float())
    assert labels(axes.get_xticklabels()) == ["w", "o", "r", "d"]
    assert labels(axes.get_yticklabels()) == ["W", "ER", "D"]
    assert axes.get_title() == "word"
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_alignment_into_given_axes() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    assert plot_alignment([[1.0, 0.0]], ["a", "b"], ["X"], axes=axes) is figure
    assert len(figure.axes) == 1
    assert drawn(axes).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_grid_of_alignments(count: int, tmp_path: Path) -> None:
    items = [(torch.rand(n + 1, n + 2), ["s"] * (n + 2), ["t"] * (n + 1), f"word {n}") for n in range(count)]
    figure = plot_alignments(
        items, title="all", source_label="letters", target_label="phonemes", path=tmp_path / "a.png"
    )
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == [f"word {n}" for n in range(count)]
    for axes, (weights, *_) in zip(maps, items, strict=True):
        assert torch.equal(drawn(axes), weights)
        assert axes.images[0].get_clim() == (0, 1)
    assert (tmp_path / "a.png").exists()


def test_bars_stand_for_their_values(tmp_path: Path) -> None:
    figure = plot_bars(
        ["train", "decode"], {"stock": [10, 20], "ours": [25, 30]}, ylabel="words/s", path=tmp_path / "b.png"
    )
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [10, 20, 25, 30]
    assert [text.get_text() for text in axes.texts] == ["10", "20", "25\n2.50x", "30\n1.50x"]
    assert axes.get_ylabel() == "words/s"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"weights: expected \[T, S\], got \[2, 3, 4\]"):
        plot_alignment(torch.rand(2, 3, 4), ["a"], ["b"])
    with pytest.raises(
        ValueError, match=r"T of at least 3 \(from target\), S of at least 1 \(from source\), got \[2, 3\]"
    ):
        plot_alignment(torch.rand(2, 3), ["a"], ["b", "c", "d"])
    with pytest.raises(ValueError, match="alignments: expected at least one, got none"):
        plot_alignments([])
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        plot_alignments([(torch.rand(1, 1), ["a"], ["b"], None)], columns=0)
    with pytest.raises(ValueError, match=r"series: expected 2 values for 'x' \(from groups\), got 1"):
        plot_bars(["a", "b"], {"x": [1.0]}, ylabel="y")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plotting needs matplotlib: pip install matplotlib"):
        plot_alignment(torch.rand(1, 1), ["a"], ["b"])
