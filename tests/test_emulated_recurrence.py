"""The CUDA kernels of recurrent layers on the emulator: results and gradients against float64, and no fault on the way
(races, accesses out of bounds, uninitialised shared memory, barriers that part of a block misses)."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch

from csrc.cuda import units
from tests import emulator_build
from tests.cases import DTYPES, KINDS
from tests.compare import assert_close_to_float64
from tests.emulated import Memory, emulator, kernels, note_launched, take_launched
from tests.emulated_recurrence import (
    BATCH_FIRST,
    DTYPE_NUMBERS,
    H200,
    PACKED,
    TIME_MAJOR,
    Layer,
    Run,
    plans_of_team,
)

pytestmark = pytest.mark.skipif(emulator_build.compiler() is None, reason="no C++ compiler")

TENSOR_CORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PERSISTENT = ("cluster", "cooperative")
# Devices of the emulator: room for many clusters (8 columns each), for two (16 columns), for one.
NARROW, WIDE, SINGLE = 0, 1, 2
CASE, CASE_TEST = ("path", "size", "cell", "dtype"), "test_every_persistent_kernel"
FEW_BLOCKS = H200 | {"sm_count": 32}


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


def check(layer: Layer, path: str, *, device: int = NARROW, **options: Any) -> set[str]:
    """Names of the kernels that ran."""
    # Products of float32 in persistent kernels are rounded to tf32, which has the digits of a half.
    dtype = torch.float16 if path != "stepwise" and layer.dtype == torch.float32 else layer.dtype
    results, given, gradients = layer.oracle()
    emulator().set_device(device)
    take_launched()
    try:
        run = Run(layer, path, **options)
        assert_close_to_float64(run.forward(), results, dtype)
        assert_close_to_float64(run.backward(given), gradients, dtype)
    finally:
        emulator().set_device(NARROW)
    return take_launched()


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
    """Every size of every cell and type. A case runs both numbers of tiles, as far as blocks have room for them."""
    for path in PERSISTENT:
        for size, cell, dtype in product(team_sizes(path), KINDS, TENSOR_CORE_DTYPES):
            yield pytest.param(path, size, cell, dtype, id=f"{cell}-{name_of(dtype)}-{path}-{size[0]}x{size[1]}")


def kernel_names(cell: str, dtype: torch.dtype, path: str, size: tuple[int, int], tiles: int) -> set[str]:
    types = dict(zip((info["name"] for info in emulator().CELLS), units.cells(), strict=True))
    element = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype]
    grid = str(path == "cooperative").lower()
    arguments = f"{types[cell]}, {element}, {size[0]}, {size[1]}, {tiles}, {grid}"
    return {f"persistent_{way.lower()}_kernel<Persistent{way}<{arguments}>>" for way in ("Forward", "Backward")}


def small_layer(cell: str, dtype: torch.dtype, size: tuple[int, int], tiles: int) -> Layer:
    """What one team of this size serves: as few steps and sequences as use every buffer, barrier and tile of it."""
    hidden = size[0] - 3 * (dtype == torch.float32)  # leaves units of the last block empty
    batch = 3 if tiles == 1 else 9
    # Three steps use every buffer and barrier twice.
    steps = 3 if size[0] <= 256 else 2
    lengths = [(7 * b + 3) % (steps + 1) for b in range(batch)] if dtype == torch.float16 else None
    return Layer(cell, dtype, batch, steps, 4, hidden, lengths=lengths)


def test_sizes_are_the_compiled_ones() -> None:
    assert {path: team_sizes(path) for path in PERSISTENT} == emulator().TEAM_SIZES


def test_every_persistent_kernel_has_a_case() -> None:
    """What the next test runs is what was compiled."""
    tested = set()
    for case in persistent_cases():
        path, size, cell, dtype = case.values
        for tiles in (1, 2):
            if plans_of_team(small_layer(cell, dtype, size, tiles), path, size, tiles):
                tested |= kernel_names(cell, dtype, path, size, tiles)
    assert tested == {name for name in kernels().values() if name.startswith("persistent_")}


def run_case(path: str, size: tuple[int, int], cell: str, dtype: torch.dtype) -> set[str]:
    """In a process of its own: what was started, after it was found right."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    all_started = set()
    for tiles in (1, 2):
        layer = small_layer(cell, dtype, size, tiles)
        plans = plans_of_team(layer, path, size, tiles)
        if plans:
            started = check(layer, path, device=SINGLE, plans=plans)
            assert started >= kernel_names(cell, dtype, path, size, tiles), started
            all_started |= started
    return all_started


def take_module(path: str) -> None:
    os.environ["SEQATTN_EMULATOR"] = path


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[set[str]]]]:
    """What run_case says of every case that was selected, as it comes: the emulator takes one core, the cases all."""
    # The others take the module of this process: they must not build it as well.
    spawn, cores = multiprocessing.get_context("spawn"), min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(cores, spawn, take_module, (emulator().__file__,)) as pool:
        selected = [i for i in request.session.items if getattr(i, "originalname", "") == CASE_TEST]
        yield {i.name: pool.submit(run_case, *(i.callspec.params[k] for k in CASE)) for i in selected}  # type: ignore
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(CASE, list(persistent_cases()))
def test_every_persistent_kernel(
    path: str,
    size: tuple[int, int],
    cell: str,
    dtype: torch.dtype,
    results: dict[str, Future[set[str]]],
    request: pytest.FixtureRequest,
) -> None:
    note_launched(results[request.node.name].result())


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


@pytest.mark.parametrize("to", DTYPES, ids=name_of)
@pytest.mark.parametrize("source", DTYPES, ids=name_of)
def test_conversions(source: torch.dtype, to: torch.dtype) -> None:
    m, values = Memory(), torch.tensor([0, 1, -2.5, 1 / 3, 1e5, torch.inf, -torch.inf, torch.nan]).to(source)
    m.empty("to", len(values), dtype=to)
    a, b = DTYPE_NUMBERS[source], DTYPE_NUMBERS[to]
    emulator().convert(a, m.put("from", values), b, m.address("to"), len(values))
    # Sums are in float32 where the result isn't in float64, so a float64 is rounded twice.
    expected = values.to(to) if to == torch.float64 else values.float().to(to)
    assert torch.equal(m.get("to").nan_to_num(7), expected.nan_to_num(7))
    emulator().convert(a, 0, b, m.address("to"), len(values))
    assert torch.equal(m.get("to"), torch.zeros(len(values), dtype=to))


@pytest.mark.parametrize("second_low", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_matrix_is_split_into_halves(stacked: bool, second_low: bool) -> None:
    m, matrix = Memory(), torch.randn(5, 7)
    matrix[2, 3] = torch.inf
    begin, depth = 2, (5 if stacked else 7) + 3
    shape = (3 * depth, 7) if stacked else (5, 3 * depth)
    m.put("to", torch.zeros(shape, dtype=torch.bfloat16))
    emulator().split(m.put("from", matrix[:, :]), 5, 7, 7, m.address("to"), depth, begin, stacked, second_low)
    parts = m.get("to").double().split(depth, 0 if stacked else 1)
    parts = [p[begin : begin + 5] if stacked else p[:, begin : begin + 7] for p in parts]
    high, other, low = parts[0], parts[2 if second_low else 1], parts[1 if second_low else 2]
    assert torch.equal(high, other)
    finite = matrix.isfinite()
    assert ((high + low - matrix.double()).abs()[finite] <= 2.0**-16 * matrix.abs().double()[finite]).all()
    assert torch.isinf(high[2, 3])
    assert low[2, 3] == 0
