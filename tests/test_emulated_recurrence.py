"""The CUDA kernels of recurrent layers on the emulator: results and gradients against float64, and no fault on the way
(races, accesses out of bounds, uninitialised shared memory, barriers that part of a block misses)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from tests import emulator_build
from tests.cases import DTYPES, KINDS
from tests.compare import assert_close_to_float64
from tests.emulated import emulator
from tests.emulated_recurrence import BATCH_FIRST, H200, PACKED, TIME_MAJOR, Layer, Run, plan_of

pytestmark = pytest.mark.skipif(emulator_build.compiler() is None, reason="no C++ compiler")

TENSOR_CORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PERSISTENT = ("cluster", "cooperative")
# Devices of the emulator: room for many clusters (8 columns each), for two (16 columns).
NARROW, WIDE = 0, 1
# Less shared memory leaves out the teams that hold most in each block.
FEW_BLOCKS = H200 | {"sm_count": 32}
DEVICES = [H200 | {"smem_per_block": kilobytes * 1024} for kilobytes in (227, 163, 99)]


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


def check(layer: Layer, path: str, *, device: int = NARROW, seed: int = 0, at_end: bool = True) -> None:
    # Products of float32 in persistent kernels are rounded to tf32, which has the digits of a half.
    dtype = torch.float16 if path != "stepwise" and layer.dtype == torch.float32 else layer.dtype
    results, given, gradients = layer.oracle()
    emulator().set_device(device)
    try:
        run = Run(layer, path, seed=seed, at_end=at_end)
        assert_close_to_float64(run.forward(), results, dtype)
        assert_close_to_float64(run.backward(given), gradients, dtype)
    finally:
        emulator().set_device(NARROW)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("cell", KINDS)
def test_stepwise(cell: str, dtype: torch.dtype) -> None:
    check(Layer(cell, dtype, batch=5, steps=4, input_size=3, hidden=33), "stepwise")


PLACES: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": [0, 4, 2, 9, 1]},
    "batch_first": {"layout": BATCH_FIRST, "lengths": [3, 4, 0, 1, 2]},
    "packed": {"layout": PACKED, "lengths": [4, 4, 2, 1, 1]},
    "both_directions": {"directions": 2, "lengths": [4, 0, 3, 1, 2]},
    "both_directions_batch_first": {"directions": 2, "layout": BATCH_FIRST},
    "both_directions_packed": {"directions": 2, "layout": PACKED, "lengths": [4, 3, 3, 2, 1]},
    "no_bias": {"bias": False},
    "no_state": {"initial": False, "directions": 2},
    "one_step": {"steps": 1},
    "two_steps": {"steps": 2},
    "one_unit": {"hidden": 1, "batch": 1, "input_size": 1},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("path", ["stepwise", *PERSISTENT])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_places(cell: str, path: str, place: str) -> None:
    """Layouts, lengths, directions, absent biases and states."""
    layer = Layer(cell, torch.float32, **{"batch": 5, "steps": 4, "input_size": 3, "hidden": 37} | PLACES[place])
    layer.device = FEW_BLOCKS
    check(layer, path, at_end=place != "batch_first")


@pytest.mark.parametrize("place", ["lengths", "both_directions_packed", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_projection(dtype: torch.dtype, place: str) -> None:
    check(Layer("lstm", dtype, 5, 4, 3, 33, projection=7, **PLACES[place]), "stepwise")


def team_sizes(path: str) -> list[tuple[int, int]]:
    """Units and blocks that a path's kernels are compiled for, from the text that says so: nothing is built for it."""
    text = (emulator_build.CSRC / "cuda" / "persistent_shapes.h").read_text()
    name = {"cluster": "kClusterSizes", "cooperative": "kGridSizes"}[path]
    (sizes,) = re.findall(rf"TeamSize {name}\[\] = {{(.*)}};", text)
    return [(int(units), int(blocks)) for units, blocks in re.findall(r"{(\d+), (\d+)}", sizes)]


def persistent_cases() -> Iterator[Any]:
    """Every kernel. Of those for more than 128 units some of each size and width run by default, the others as slow."""
    kinds = list(product(KINDS, TENSOR_CORE_DTYPES))
    for path in PERSISTENT:
        for i, (size, device) in enumerate(product(team_sizes(path), (NARROW, WIDE))):
            for j, (cell, dtype) in enumerate(kinds):
                often = (i + j) % (1 if size[0] <= 128 else 4 if size[0] <= 256 else len(kinds)) == 0
                width = "narrow" if device == NARROW else "wide"
                name = f"{cell}-{name_of(dtype)}-{path}-{size[0]}x{size[1]}-{width}"
                marks = () if often else pytest.mark.slow
                yield pytest.param(path, cell, dtype, size, device, id=name, marks=marks)


def test_sizes_are_the_compiled_ones() -> None:
    assert {path: team_sizes(path) for path in PERSISTENT} == emulator().TEAM_SIZES


@pytest.mark.parametrize(("path", "cell", "dtype", "size", "device"), list(persistent_cases()))
def test_every_persistent_kernel(path: str, cell: str, dtype: torch.dtype, size: tuple[int, int], device: int) -> None:
    units = size[0] - 3 * (dtype == torch.float32)  # leaves units of the last block empty
    batch = 3 if device == NARROW else 19
    lengths = [(7 * b + 3) % 4 for b in range(batch)] if dtype == torch.float16 else None
    # Three steps use every buffer and barrier twice.
    layer = Layer(cell, dtype, batch, 3 if units <= 512 else 2, 4, units, lengths=lengths)
    refusals = []
    for limits in DEVICES:
        layer.device = limits | {"sm_count": size[1] * (1 if device == WIDE else 2)}
        plans = [plan_of(layer, path, backward) for backward in (False, True)]
        if all((plan.rows_per_block * plan.cluster, plan.cluster) == size for plan in plans):
            return check(layer, path, device=device)
        refusals += [plan.why_not for plan in plans]
    # Not compiled either, or a smaller team always serves.
    assert size[0] > 256
    assert all("holds" in why_not or why_not == "" for why_not in refusals), refusals


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("path", PERSISTENT)
@pytest.mark.parametrize("cell", KINDS)
def test_any_order_of_threads(cell: str, path: str, seed: int) -> None:
    layer = Layer(cell, torch.bfloat16, 11, 6, 5, 100, directions=2, lengths=[6, 5, 0, 1, 2, 6, 3, 4, 6, 6, 5])
    layer.device = FEW_BLOCKS
    check(layer, path, seed=seed, device=WIDE)


@pytest.mark.parametrize("path", PERSISTENT)
def test_order_of_threads_changes_nothing(path: str) -> None:
    layer = Layer("lstm", torch.bfloat16, 3, 5, 5, 128, device=FEW_BLOCKS)
    runs = [Run(layer, path, seed=seed) for seed in (0, 1, 2)]
    first, *others = [run.forward() for run in runs]
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("path", ["stepwise", "cluster"])
def test_either_backward_follows_either_forward(path: str) -> None:
    layer = Layer("lstm", torch.bfloat16, 5, 4, 3, 40, lengths=[4, 2, 0, 1, 3])
    results, given, gradients = layer.oracle()
    run = Run(layer, "cluster")
    run.path = "stepwise" if path == "cluster" else "cluster"
    assert_close_to_float64(run.forward(), results, layer.dtype)
    run.path = path
    assert_close_to_float64(run.backward(given), gradients, layer.dtype)


@pytest.mark.parametrize("layout", [TIME_MAJOR, BATCH_FIRST, PACKED])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_are_moved(dtype: torch.dtype, layout: int) -> None:
    layer = Layer("lstm", dtype, 4, 5, 3, 7, layout=layout, lengths=[5, 3, 3, 1])
    run = Run(layer, "stepwise")
    m, width = run.m, 6
    keys = ("steps", "batch", "rows", "lengths", "offsets", "out_step", "out_batch")
    rows = {k: run.common[k] for k in keys}
    padded = torch.randn(5, 4, width).to(dtype)
    outside = layer.lay_out(padded)
    m.empty("inside", run.rows, width, dtype=dtype)
    emulator().gather_rows(run.number, rows, m.put("outside", outside), m.address("inside"), width)
    expected = padded * layer.valid[..., None]
    assert torch.equal(layer.from_rows(m.get("inside")), expected)
    m.empty("back", *outside.shape, dtype=dtype)
    emulator().scatter_rows(run.number, rows, m.put("rows", layer.internal(padded)), m.address("back"), width)
    assert torch.equal(m.get("back"), layer.lay_out(expected))


def test_values_are_written() -> None:
    run = Run(Layer("gru", torch.float32, 1, 1, 1, 1), "stepwise")
    values = list(range(-5, 1200))
    run.m.empty("values", len(values), dtype=torch.int64)
    emulator().write_values(values, run.m.address("values"))
    assert run.m.get("values").tolist() == values
