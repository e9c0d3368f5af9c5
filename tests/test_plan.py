"""Which CUDA kernel is planned for which layer, on GPUs of every architecture; none of them is needed here."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from seqattn_kernels import native, ops

pytestmark = pytest.mark.skipif(native.extension is None, reason=str(native.why_not()))

# Shared memory that a block can ask for, as CUDA's programming guide has it.
DEVICES: dict[str, dict[str, int]] = {
    "A100": {"sm": 80, "sm_count": 108, "smem_per_block": 163 * 1024, "max_cluster": 1},
    "A10": {"sm": 86, "sm_count": 72, "smem_per_block": 99 * 1024, "max_cluster": 1},
    "H200": {"sm": 90, "sm_count": 132, "smem_per_block": 227 * 1024, "max_cluster": 16},
    "B200": {"sm": 100, "sm_count": 148, "smem_per_block": 227 * 1024, "max_cluster": 16},
}
REGISTERS = 64 * 1024  # of a multiprocessor, 32 bits each
HIDDEN = (1, 17, 64, 128, 200, 256, 384, 512, 513, 768, 1024, 1500)
BATCH = (1, 3, 16, 64, 100, 300)
PERSISTENT_DTYPES = ("float32", "bfloat16", "float16")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
devices = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
cells = pytest.mark.parametrize("cell", ops.recurrence.CELLS)


def plan(cell: str, hidden: int, batch: int, device: dict[str, int], dtype: str = "bfloat16", **options: Any) -> Any:
    directions = options.pop("directions", 1)
    return native.extension.plan_recurrence(cell, hidden, batch, directions, dtype, **device, **options)  # type: ignore[union-attr]


def every_plan(cell: str, device: dict[str, int]) -> Any:
    """All plans of a grid of layers that are persistent, each with what was asked."""
    for hidden, batch, directions, dtype, backward in itertools.product(
        HIDDEN, BATCH, (1, 2), PERSISTENT_DTYPES, (False, True)
    ):
        made = plan(cell, hidden, batch, device, dtype, directions=directions, backward=backward)
        if made.kernel == "stepwise":
            assert made.why_not
        else:
            assert made.why_not == ""
            yield made, hidden, batch, directions, dtype


@cells
@devices
def test_a_plan_fits_the_device(cell: str, device: dict[str, int]) -> None:
    for made, hidden, batch, _, dtype in every_plan(cell, device):
        at = f"{cell} H={hidden} B={batch} {dtype}: {made.kernel}"
        assert 0 < made.smem_bytes <= device["smem_per_block"], at
        assert 0 < made.warps <= 32, at
        # Weights in registers leave some for all else; a thread can have 255, a multiprocessor 64 Ki.
        assert made.weight_registers < 255, at
        assert made.weight_registers * made.warps * 32 < REGISTERS, at
        assert 1 <= made.cluster <= (device["max_cluster"] if made.kernel == "cluster" else device["sm_count"]), at


@cells
@devices
def test_a_plan_holds_the_whole_layer(cell: str, device: dict[str, int]) -> None:
    for made, hidden, batch, directions, dtype in every_plan(cell, device):
        at = f"{cell} H={hidden} B={batch} D={directions} {dtype}: {made.kernel}"
        assert made.rows_per_block * made.cluster >= hidden, at
        # No group is without sequences; where there are more, groups take turns.
        assert made.batch_columns > 0, at
        assert made.batch_columns * (made.clusters - 1) < batch, at
        # A block has room for its part of W_hh in shared memory and registers together.
        item = 4 if dtype == "float32" else 2
        held = made.smem_bytes + made.weight_registers * 4 * made.warps * 32
        assert held >= min(hidden, made.rows_per_block) * GATES[cell] * hidden * item // 4, at
        if made.kernel == "cooperative":
            # All blocks of the grid must be resident at once.
            assert made.cluster * made.clusters * directions <= device["sm_count"], at


@cells
@pytest.mark.parametrize("name", ["A100", "A10"])
def test_no_clusters_where_there_are_none(cell: str, name: str) -> None:
    kinds = {made.kernel for made, *_ in every_plan(cell, DEVICES[name])}
    assert "cluster" not in kinds
    assert "thread-block clusters" in plan(cell, 2**14, 1, DEVICES[name]).why_not


@cells
@pytest.mark.parametrize("sm_count", [1, 7, 8, 15, 16, 31])
def test_a_part_of_a_gpu_has_room_for_what_is_planned(cell: str, sm_count: int) -> None:
    """Each cluster has a multiprocessor for every block, or another kernel serves and `why_not` says so."""
    device = {**DEVICES["H200"], "sm_count": sm_count}
    for made, *_ in every_plan(cell, device):
        assert made.cluster <= sm_count
    assert ("cluster" in {made.kernel for made, *_ in every_plan(cell, device)}) == (sm_count >= 8)
    narrow = plan(cell, 512, 16, {**device, "smem_per_block": 99 * 1024})
    if sm_count < 8:
        assert narrow.kernel == "stepwise"
        assert f"the device has no room for a cluster: it has {sm_count} multiprocessors" in narrow.why_not


@cells
@pytest.mark.parametrize("sm", [70, 75])
def test_gpus_that_are_too_old(cell: str, sm: int) -> None:
    device = {"sm": sm, "sm_count": 40, "smem_per_block": 64 * 1024, "max_cluster": 1}
    assert not list(every_plan(cell, device))
    said = plan(cell, 64, 4, device).why_not
    assert said == "cluster: the device has no thread-block clusters; cooperative: needs compute capability 8.0"


DECODER = {"cell": "gru", "dtype": "bfloat16", "source": 50, "hidden": 256, "attention": 256, "value": 256}


@pytest.mark.parametrize("name", DEVICES)
def test_decoders_need_clusters_of_sixteen(name: str) -> None:
    said = native.extension.decoder_why_not(**DECODER, **DEVICES[name])  # type: ignore[union-attr]
    served = DEVICES[name]["max_cluster"] >= 16
    assert said == ("" if served else "the decoder's kernel needs clusters of 16 blocks (sm_90, sm_100)")
    small = {**DEVICES[name], "smem_per_block": 48 * 1024}
    assert native.extension.decoder_why_not(**DECODER, **small) != ""  # type: ignore[union-attr]


@cells
@pytest.mark.parametrize("name", ["H200", "B200"])
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_clusters_hold_layers_of_512_units(cell: str, name: str, dtype: str, backward: bool) -> None:
    for hidden in (64, 200, 256, 512):
        made = plan(cell, hidden, 16, DEVICES[name], dtype, backward=backward)
        assert made.kernel == "cluster", made.why_not


@devices
def test_what_persistent_kernels_never_take(device: dict[str, int]) -> None:
    for options, said in (
        ({"dtype": "float64"}, "float64"),
        ({"projected": True}, "projection"),
    ):
        made = plan("lstm", 128, 16, device, **options)
        assert made.kernel == "stepwise"
        assert said in made.why_not
    assert plan("lstm", 128, 0, device).kernel == "stepwise"
    exact = plan("lstm", 128, 16, device, "float32", allow_tf32=False)
    assert exact.kernel == "stepwise"
    assert "tf32" in exact.why_not
    large = plan("lstm", 2**14, 16, device)
    assert large.kernel == "stepwise"
    assert "hidden" in large.why_not


def test_a_smaller_budget_never_gives_a_larger_layer() -> None:
    """Shared memory taken away, down to nothing, leads to other plans and at last to none, never to one too large."""
    for smem in range(227, -1, -16):
        device = {**DEVICES["H200"], "smem_per_block": max(smem, 1) * 1024}
        for made, *_ in every_plan("lstm", device):
            assert made.smem_bytes <= device["smem_per_block"]
    none = plan("lstm", 512, 16, {**DEVICES["H200"], "smem_per_block": 1024})
    assert none.kernel == "stepwise"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cell": "peephole"}, "cell: expected a name of the registry, got 'peephole'"),
        ({"dtype": "int8"}, "dtype: expected 'float64', 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ({"hidden": 0}, "hidden: expected a positive number, got 0"),
        ({"batch": -1}, "batch: expected 0 or more, got -1"),
        ({"directions": 3}, "directions: expected 1 or 2, got 3"),
        ({"sm_count": 0}, "sm_count: expected a positive number"),
        ({"max_cluster": 0}, "max_cluster: expected a positive number"),
    ],
)
def test_bad_requests(changes: dict[str, Any], said: str) -> None:
    given = {"cell": "lstm", "hidden": 64, "batch": 4, "directions": 1, "dtype": "bfloat16", **DEVICES["H200"]}
    with pytest.raises(ValueError, match=said):
        native.extension.plan_recurrence(**{**given, **changes})  # type: ignore[union-attr]
