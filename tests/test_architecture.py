"""Imports run one way: accelerate, nn, functional, backends, ops, native; reference imports torch alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "seqattn_kernels"
# What each room may import of the package, beside itself.
BELOW = {
    "reference": set(),
    "native": set(),
    "kernels": set(),
    "ops": {"kernels", "native", "reference"},
    "thresholds": set(),
    "backends": {"native", "ops", "thresholds"},
    "functional": {"backends", "native", "ops", "reference"},
    "nn": {"functional"},
    "accelerate": {"nn"},
    "decoding": {"ops"},
    "plotting": set(),
}
ABOVE_ALL = {"cli", "demo"}


def rooms_imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            _, *rest = node.module.split(".")
            yield from rest[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name, *rest = alias.name.split(".")
                if name == PACKAGE.name:
                    yield from rest[:1] or ["__init__"]


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_room_is_known():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(BELOW) | ABOVE_ALL


@pytest.mark.parametrize("room", BELOW)
def test_imports_run_one_way(room):
    for path in files_of(room):
        forbidden = set(rooms_imported(path)) - BELOW[room] - {room}
        assert not forbidden, f"{path.relative_to(PACKAGE.parent)} imports {sorted(forbidden)}"
