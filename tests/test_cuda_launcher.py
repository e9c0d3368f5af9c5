"""The launcher of the CUDA operators without a GPU: its own sources, on CPU tensors, with kernels in the emulator.

What torch multiplies on a GPU it multiplies here on the CPU. The stepwise path, and who serves where it is not asked
for; persistent kernels have their tests in test_emulated_recurrence.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from seqattn_kernels import native, ops
from seqattn_kernels.reference.recurrence import BATCH_FIRST, PACKED, TIME_MAJOR, cell_step, recurrence
from tests import emulator_build, launcher_build
from tests.cases import DTYPES, KINDS, RecurrentKind
from tests.compare import assert_close_to_float64, gradients, to_float64
from tests.emulated import take_launched

_missing = native.why_not() or (None if emulator_build.compiler() else "no C++ compiler")
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
directions = pytest.mark.parametrize("D", [1, 2], ids=["one-way", "two-way"])


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Any:
    """The operators that Python calls are those over the emulator."""
    torch.ops.load_library(launcher_build.build())
    patch = pytest.MonkeyPatch()
    for name in ("recurrence_fwd", "recurrence_bwd", "cell_fwd", "cell_bwd"):
        patch.setattr(torch.ops.seqattn, name, getattr(torch.ops.seqattn_emulated, name))
    yield
    patch.undo()


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def agrees(
    kind: RecurrentKind,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    *,
    layout: int = TIME_MAJOR,
    D: int = 1,
    lengths: list[int] | None = None,
    bias: bool = True,
    projection: int = 0,
    allow_tf32: bool = False,
    given: bool = True,
    stepwise: bool = True,
) -> None:
    """Results, cell states and all gradients against the reference in float64."""
    T, B, I, H = shape
    options: dict[str, Any] = {"bidirectional": D == 2, "bias": bias}
    options |= {"proj_size": projection} if projection else {}
    weights = [w.detach().to(dtype).requires_grad_() for w in kind.stock(I, H, **options)._flat_weights]
    h0 = torch.randn(D, B, projection or H).to(dtype).requires_grad_() if given else None
    c0 = torch.randn(D, B, H).to(dtype).requires_grad_() if given and kind.has_cell_state else None
    x, sizes = torch.randn(T, B, I), None if lengths is None else torch.tensor(lengths)
    if layout == PACKED:
        packed = pack_padded_sequence(x, sizes)
        x, sizes = packed.data, packed.batch_sizes
    if layout == BATCH_FIRST:
        x = x.transpose(0, 1).contiguous()
    x = x.to(dtype).requires_grad_()
    *results, _ = ops.recurrence.RecurrenceFunction.apply(
        kind.name, bias, layout, kind.has_cell_state, allow_tf32, stepwise, x, sizes, h0, c0, *weights
    )
    results = results if kind.has_cell_state else results[:2]
    found = gradients(results, present(x, h0, c0, *weights))
    own = [None if t is None else to_float64(t) for t in (x, h0, c0)]
    own_weights = to_float64(weights)
    expected = present(*recurrence(kind.name, own[0], sizes, layout, own[1], own[2], own_weights, bias))
    wanted = gradients(expected, present(*own, *own_weights))
    assert_close_to_float64([*results, *found], [*expected, *wanted], torch.float16 if allow_tf32 else dtype)


@kinds
@dtypes
@directions
@pytest.mark.parametrize("layout", [TIME_MAJOR, BATCH_FIRST, PACKED], ids=["TB", "BT", "packed"])
def test_layouts(kind: RecurrentKind, dtype: torch.dtype, D: int, layout: int) -> None:
    lengths = [5, 3, 1] if layout == PACKED else [3, 0, 5]
    agrees(kind, dtype, (5, 3, 6, 17), layout=layout, D=D, lengths=lengths)


@kinds
@directions
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 2, 3, 5), (0, 3, 4, 5), (3, 0, 4, 5)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_full_length(kind: RecurrentKind, D: int, shape: Any, bias: bool, given: bool) -> None:
    agrees(kind, torch.float32, shape, D=D, bias=bias, given=given)


@dtypes
@directions
@pytest.mark.parametrize("layout", [TIME_MAJOR, BATCH_FIRST, PACKED], ids=["TB", "BT", "packed"])
def test_projection(dtype: torch.dtype, D: int, layout: int) -> None:
    lengths = [5, 3, 1] if layout == PACKED else [3, 0, 5]
    agrees(KINDS["lstm"], dtype, (5, 3, 6, 9), layout=layout, D=D, lengths=lengths, projection=4)


@kinds
@directions
def test_large_products_where_tf32_is_allowed(kind: RecurrentKind, D: int) -> None:
    agrees(kind, torch.float32, (16, 16, 48, 33), D=D, lengths=[16] * 8 + [7] * 8, allow_tf32=True)


@kinds
def test_large_products_keep_sixteen_bits(kind: RecurrentKind) -> None:
    x, weights = torch.randn(16, 16, 48), [w.detach() for w in kind.stock(48, 33)._flat_weights]
    arguments = (ops.recurrence.CELLS.index(kind.name), x, None, 0, None, None, weights, (), True, False, False)
    split, exact = (torch.ops.seqattn_emulated.recurrence_fwd(*arguments, tf32, True)[0] for tf32 in (True, False))
    assert not torch.equal(split, exact)
    assert (split - exact).abs().max() < 1e-4 * exact.abs().max()


@kinds
def test_long_packed_sequence(kind: RecurrentKind) -> None:
    """More batch sizes than one call of write_values takes."""
    agrees(kind, torch.float64, (450, 2, 2, 2), layout=PACKED, lengths=[450, 401])


@kinds
def test_nothing_is_read_past_the_end_of_a_sequence(kind: RecurrentKind) -> None:
    lengths, weights = torch.tensor([5, 2, 0]), [w.detach() for w in kind.stock(4, 6)._flat_weights]
    weights = [w.requires_grad_() for w in weights]
    spoiled = torch.randn(5, 3, 4)
    for b, n in enumerate(lengths):
        spoiled[n:, b] = torch.nan
    spoiled.requires_grad_()
    *results, _ = ops.recurrence.RecurrenceFunction.apply(
        kind.name, True, TIME_MAJOR, False, False, True, spoiled, lengths, None, None, *weights
    )
    found = gradients(results[:2], [spoiled, *weights])
    assert all(t.isfinite().all() for t in (*results[:2], *found))


@kinds
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_cell_step(kind: RecurrentKind, dtype: torch.dtype, bias: bool, given: bool) -> None:
    weights = [w.detach().to(dtype).requires_grad_() for w in kind.stock_cell(5, 9, bias=bias).parameters()]
    x = torch.randn(3, 5).to(dtype).requires_grad_()
    h = torch.randn(3, 9).to(dtype).requires_grad_() if given else None
    c = torch.randn(3, 9).to(dtype).requires_grad_() if given and kind.has_cell_state else None
    results = list(ops.recurrence.CellFunction.apply(kind.name, bias, x, h, c, *weights)[:-1])
    found = gradients(results, present(x, h, c, *weights))
    own, own_weights = [None if t is None else to_float64(t) for t in (x, h, c)], to_float64(weights)
    zeros = torch.zeros(3, 9, dtype=torch.float64)
    states = [zeros if t is None else t for t in own[1:]]
    expected = present(*cell_step(kind.name, own[0], states[0], states[1], own_weights, bias))[: len(results)]
    wanted = gradients(expected, present(*own, *own_weights))
    assert_close_to_float64([*results, *found], [*expected, *wanted])


H200 = (90, 132, 227 * 1024, 16)


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        pytest.param(H200, "cluster", id="H200"),
        pytest.param((90, 7, 227 * 1024, 16), "stepwise", id="no-room-for-a-cluster"),
        pytest.param((80, 108, 163 * 1024, 1), "cooperative", id="no-clusters"),
        pytest.param((75, 40, 64 * 1024, 1), "stepwise", id="too-old"),
    ],
)
def test_the_next_kernel_serves_where_one_cannot(device: tuple[int, ...], kernel: str) -> None:
    """On devices with less, forward and backward go by the plan."""
    library = ctypes.CDLL(str(launcher_build.build()))
    sizes = dict(zip(("sm", "sm_count", "smem_per_block", "max_cluster"), device, strict=True))
    for backward in (False, True):
        made = native.extension.plan_recurrence("gru", 64, 3, 1, "bfloat16", backward=backward, **sizes)  # type: ignore[union-attr]
        assert made.kernel == kernel
        assert bool(made.why_not) == (kernel == "stepwise")
    take_launched(launcher_build.build())
    library.seqattn_set_device(*device)
    try:
        # A persistent kernel starts, and finds that it reads memory the emulator hasn't handed out: torch has.
        ends = (
            contextlib.nullcontext() if kernel == "stepwise" else pytest.raises(RuntimeError, match="is in no buffer")
        )
        with ends:
            agrees(KINDS["gru"], torch.bfloat16, (5, 3, 6, 64), lengths=[3, 0, 5], stepwise=False)
    finally:
        library.seqattn_set_device(*H200)
    started = " ".join(take_launched(launcher_build.build()))
    assert ("step_forward_kernel" in started) == (kernel == "stepwise")
    assert ("persistent_forward_kernel" in started) == (kernel != "stepwise")


def call(**changes: Any) -> Any:
    weights = [w.detach() for w in KINDS["lstm"].stock(4, 6)._flat_weights]
    names = ["cell", "input", "sizes", "layout", "h0", "c0", "weights", "packed", "has_bias", "save", "cell_states"]
    values = (3, torch.randn(5, 3, 4), None, 0, None, None, weights, (), True, False, False)
    return torch.ops.seqattn_emulated.recurrence_fwd(*{**dict(zip(names, values, strict=True)), **changes}.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cell": 9}, "cell: expected a number of the registry, got 9"),
        ({"layout": 3}, "layout: expected 0, 1 or 2, got 3"),
        ({"input": torch.randn(5, 4)}, "input: expected 3 dimensions"),
        ({"input": torch.randn(5, 3, 7)}, r"weight_ih: expected shape \[24, 7\], got \[24, 4\]"),
        ({"input": torch.randn(5, 3, 4).int()}, "input: expected float64, float32, bfloat16 or float16, got int32"),
        ({"input": torch.randn(5, 3, 4).double()}, "weight_ih: expected float64, got float32"),
        ({"input": torch.randn(3, 5, 4).transpose(0, 1)}, "input: expected a contiguous tensor"),
        ({"sizes": torch.tensor([1, 2])}, r"lengths: expected \[3\], got \[2\]"),
        ({"sizes": torch.tensor([1, 2, 6])}, "lengths: expected values from 0 to 5"),
        ({"sizes": torch.tensor([1, 2, -1])}, "lengths: expected values from 0 to 5"),
        ({"sizes": torch.tensor([1, 2, 3]).int()}, "lengths: expected a contiguous tensor of int64"),
        ({"h0": torch.randn(1, 3, 5)}, r"h0: expected shape \[1, 3, 6\], got \[1, 3, 5\]"),
        ({"c0": torch.randn(1, 3, 6).half()}, "c0: expected float32, got float16"),
        ({"packed": (torch.zeros(3),)}, "packed: expected none with CUDA tensors"),
        ({"has_bias": False}, r"weight_ih: expected shape \[24, 4\], got \[24\]"),
        ({"input": torch.randn(6, 4), "layout": 2}, "sizes: expected the batch sizes"),
        ({"input": torch.randn(6, 4), "layout": 2, "sizes": torch.tensor([3, 2])}, "batch_sizes: expected a sum of 6"),
        ({"input": torch.randn(6, 4), "layout": 2, "sizes": torch.tensor([2, 4])}, "batch_sizes: expected positive"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        call(**changes)


def test_a_reserve_of_another_call_is_refused() -> None:
    weights = [w.detach() for w in KINDS["gru"].stock(4, 6)._flat_weights]
    x = torch.randn(5, 3, 4)
    reserve = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"reserve: expected the \d+ bytes that forward returned"):
        torch.ops.seqattn_emulated.recurrence_bwd(
            2, x, None, 0, None, None, weights, True, reserve, None, torch.randn(1, 3, 6), None, None, True, True
        )


OUT_OF_MEMORY = """
import resource, sys, torch
from seqattn_kernels import ops
torch.ops.load_library(sys.argv[1])
run = torch.ops.seqattn_emulated.recurrence_bwd

def backward(T, B, H):
    weights = [torch.zeros(4 * H, 2), torch.zeros(4 * H, H)]
    reserve = torch.zeros(ops.recurrence._cuda_reserve_bytes("lstm", torch.float32, 1, T * B, H, H), dtype=torch.uint8)
    return lambda: run(3, torch.zeros(T, B, 2), None, 0, None, None, weights, False, reserve, None,
                       torch.zeros(1, B, H), None, None, True, True, False, True)

large, small = backward(1000, 64, 64), backward(3, 2, 4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, before[1]))
try:
    large()
except RuntimeError as error:
    print(str(error).splitlines()[0])
resource.setrlimit(resource.RLIMIT_AS, before)
print(small()[0].shape)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are Linux's")
def test_out_of_memory_in_backward_is_an_error_and_no_more() -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(launcher_build.build())]
    done = subprocess.run(command, cwd=emulator_build.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, shape = done.stdout.splitlines()
    assert said.startswith("out of memory? cpu gave no 62.5 MiB"), said
    assert shape == "torch.Size([3, 2, 2])"


@kinds
@directions
@pytest.mark.parametrize("projection", [0, 4])
def test_python_knows_the_size_of_the_reserve(kind: RecurrentKind, D: int, projection: int) -> None:
    if projection and not kind.has_cell_state:
        pytest.skip("only an LSTM projects")
    options = {"proj_size": projection} if projection else {}
    for dtype in DTYPES:
        weights = [w.detach().to(dtype) for w in kind.stock(4, 6, bidirectional=D == 2, **options)._flat_weights]
        x = torch.randn(5, 3, 4).to(dtype)
        number = ops.recurrence.CELLS.index(kind.name)
        reserve = torch.ops.seqattn_emulated.recurrence_fwd(
            number, x, None, 0, None, None, weights, (), True, True, False, False, True
        )[-1]
        expected = ops.recurrence._cuda_reserve_bytes(kind.name, dtype, D, 15, 6, projection or 6)
        assert reserve.numel() == expected
