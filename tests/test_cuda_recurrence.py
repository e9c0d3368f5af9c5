"""The recurrence operators on CUDA against float64 on the CPU. Skipped without a GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqattn_kernels
from seqattn_kernels import backends, functional, native
from tests.cases import DTYPES, KINDS, SEQUENCES, RecurrentKind
from tests.compare import assert_close_to_float64, flatten, gradients, to_float64

_why_not = native.cuda_why_not() or (None if torch.cuda.is_available() else "no GPU that torch can use")
pytestmark = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Both kinds of kernels where a persistent one serves; the same twice where none does.
paths = pytest.mark.parametrize("backend", ["cuda", "cuda_stepwise"])


@pytest.fixture(autouse=True)
def exact_float32() -> Any:
    """The tolerance of float32 is that of exact products; tf32 has a test of its own."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def to_cuda(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cuda().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(to_cuda(item) for item in value)
    return value


def weights_of(kind: RecurrentKind, input_size: int, hidden: int, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Weights of torch.nn's module. In half precision those of relu keep every sum away from 0, where a rounding error
    would decide whether a gradient passes: half of the units are always on, the other half off."""
    weights = [w.detach().clone() for w in kind.stock(input_size, hidden, **options)._flat_weights]
    if kind.name == "rnn_relu" and dtype.itemsize == 2:
        signs = torch.ones(hidden)
        signs[::2] = -1
        for w in weights:
            w.copy_(w / 4 if w.dim() == 2 else 3 * signs)
    return [w.to(dtype).requires_grad_() for w in weights]


def states_of(kind: RecurrentKind, *shape: int, dtype: torch.dtype) -> Any:
    made = kind.state(*shape, dtype=dtype)
    return tuple(s.requires_grad_() for s in made) if isinstance(made, tuple) else made.requires_grad_()


def agrees(
    kind: RecurrentKind, x: Tensor, hx: Any, weights: list[Tensor], tolerance: torch.dtype | None = None, **options: Any
) -> None:
    """Results and gradients on the GPU against the reference in float64 on the CPU."""
    gx, gh, gw = to_cuda(x), to_cuda(hx), to_cuda(weights)
    lengths = options.pop("lengths", None)
    on_cuda = options.pop("lengths_on_cuda", True)
    given = {} if lengths is None else {"lengths": lengths.cuda() if on_cuda else lengths}
    actual = kind.run(gx, gh, gw, **options, **given)
    assert all(t.is_cuda and t.dtype == x.dtype for _, t in flatten(actual))
    wx, wh, ww = to_float64(x), to_float64(hx), to_float64(weights)
    expected = kind.run(wx, wh, ww, **{**options, "backend": "reference"}, lengths=lengths)
    states = list(hx) if isinstance(hx, tuple) else [] if hx is None else [hx]
    actual_inputs = [gx, *(t for _, t in flatten(gh)), *gw]
    expected_inputs = [wx, *(t for _, t in flatten(wh)), *ww]
    assert len(actual_inputs) == 1 + len(states) + len(weights)
    found, wanted = gradients(actual, actual_inputs), gradients(expected, expected_inputs)
    assert_close_to_float64([*(t for _, t in flatten(actual)), *found], [*(t for _, t in flatten(expected)), *wanted],
                            tolerance)  # fmt: skip


@kinds
@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
@dtypes
@paths
def test_forward_and_gradients(kind: RecurrentKind, shape: Any, dtype: torch.dtype, backend: str) -> None:
    B, T, I, H = shape
    x = torch.randn(T, B, I).to(dtype).requires_grad_()
    agrees(kind, x, states_of(kind, 1, B, H, dtype=dtype), weights_of(kind, I, H, dtype), backend=backend)


@kinds
@dtypes
@paths
@pytest.mark.parametrize("batch_first", [False, True], ids=["TB", "BT"])
@pytest.mark.parametrize("on_cuda", [False, True], ids=["lengths-cpu", "lengths-cuda"])
def test_lengths(kind: RecurrentKind, dtype: torch.dtype, backend: str, batch_first: bool, on_cuda: bool) -> None:
    B, T, I, H = 5, 7, 6, 17
    x = torch.randn(*((B, T) if batch_first else (T, B)), I).to(dtype).requires_grad_()
    agrees(
        kind,
        x,
        states_of(kind, 2, B, H, dtype=dtype),
        weights_of(kind, I, H, dtype, bidirectional=True),
        bidirectional=True,
        batch_first=batch_first,
        backend=backend,
        lengths=torch.tensor([7, 0, 3, 1, 6]),
        lengths_on_cuda=on_cuda,
    )


@kinds
@paths
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_layers_directions_and_no_state(kind: RecurrentKind, backend: str, bias: bool) -> None:
    x = torch.randn(6, 4, 5, requires_grad=True)
    options = {"bidirectional": True, "bias": bias, "num_layers": 2}
    weights = weights_of(kind, 5, 9, torch.float32, **options)
    agrees(kind, x, None, weights, backend=backend, return_all_states=True, **options)


@dtypes
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_projection(dtype: torch.dtype, bidirectional: bool, with_lengths: bool) -> None:
    kind, D = KINDS["lstm"], 2 if bidirectional else 1
    options = {"bidirectional": bidirectional, "proj_size": 5}
    x = torch.randn(6, 4, 7).to(dtype).requires_grad_()
    hx = (torch.randn(D, 4, 5).to(dtype).requires_grad_(), torch.randn(D, 4, 9).to(dtype).requires_grad_())
    lengths = torch.tensor([6, 2, 0, 5]) if with_lengths else None
    weights = weights_of(kind, 7, 9, dtype, **options)
    agrees(kind, x, hx, weights, backend="cuda", return_all_states=True, lengths=lengths, **options)


@kinds
@paths
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed(kind: RecurrentKind, backend: str, enforce_sorted: bool) -> None:
    lengths = torch.tensor([6, 5, 2, 1] if enforce_sorted else [2, 6, 1, 5])
    x = torch.randn(6, 4, 5)
    weights = weights_of(kind, 5, 33, torch.float32, bidirectional=True)
    hx = states_of(kind, 2, 4, 33, dtype=torch.float32)
    results = []
    for cuda in (True, False):
        own = to_cuda(weights) if cuda else to_float64(weights)
        own_hx = to_cuda(hx) if cuda else to_float64(hx)
        own_x = (x.cuda() if cuda else x.double()).requires_grad_()
        packed = pack_padded_sequence(own_x, lengths, enforce_sorted=enforce_sorted)
        name = backend if cuda else "reference"
        out = kind.run(packed, own_hx, own, bidirectional=True, backend=name)
        results.append([out, gradients(out, [own_x, *(t for _, t in flatten(own_hx)), *own])])
    assert_close_to_float64(*results)


@kinds
@paths
def test_long_packed_sequence(kind: RecurrentKind, backend: str) -> None:
    """More steps than one call of write_values takes."""
    lengths = torch.tensor([1100, 900])
    x = torch.randn(1100, 2, 3)
    weights = weights_of(kind, 3, 4, torch.float64)
    packed = pack_padded_sequence(x.double().cuda(), lengths)
    out = kind.run(packed, None, to_cuda(weights), backend=backend)
    oracle = kind.run(pack_padded_sequence(x.double(), lengths), None, weights, backend="reference")
    assert_close_to_float64(out, oracle)


@kinds
@paths
@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0), (0, 0)])
def test_empty(kind: RecurrentKind, backend: str, T: int, B: int) -> None:
    x = torch.randn(T, B, 5, requires_grad=True)
    agrees(
        kind,
        x,
        states_of(kind, 1, B, 6, dtype=torch.float32),
        weights_of(kind, 5, 6, torch.float32),
        backend=backend,
    )


@kinds
@paths
def test_nan_past_the_end_of_a_sequence(kind: RecurrentKind, backend: str) -> None:
    x = torch.randn(5, 3, 4)
    lengths = torch.tensor([5, 2, 0])
    spoiled = x.clone()
    for b, n in enumerate(lengths):
        spoiled[n:, b] = torch.nan
    weights = to_cuda(weights_of(kind, 4, 7, torch.float32))
    results = []
    for data in (x, spoiled):
        own = data.cuda().requires_grad_()
        out = kind.run(own, None, weights, lengths=lengths.cuda(), backend=backend)
        results.append([out, gradients(out, [own, *weights])])
    for (_, a), (_, b) in zip(flatten(results[0]), flatten(results[1]), strict=True):
        assert torch.equal(a, b)


@kinds
@paths
def test_lengths_out_of_range_stay_in_bounds(kind: RecurrentKind, backend: str) -> None:
    """Lengths on the device are not checked, which would take a synchronisation: they are clamped."""
    x = torch.randn(5, 3, 4).cuda()
    weights = to_cuda(weights_of(kind, 4, 7, torch.float32))
    wild = torch.tensor([9, -3, 2**40], device="cuda")
    got = kind.run(x, None, weights, lengths=wild, backend=backend)
    wanted = kind.run(x, None, weights, lengths=torch.tensor([5, 0, 5]), backend=backend)
    assert_close_to_float64(got, to_float64(wanted))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@paths
@pytest.mark.parametrize("shape", [(16, 40, 64, 128), (5, 33, 96, 200), (64, 12, 128, 512), (1, 20, 256, 256)], ids=str)
def test_sizes_of_persistent_kernels(cell: str, dtype: torch.dtype, backend: str, shape: Any) -> None:
    B, T, I, H = shape
    kind = KINDS[cell]
    x = torch.randn(T, B, I).to(dtype).requires_grad_()
    agrees(kind, x, states_of(kind, 1, B, H, dtype=dtype), weights_of(kind, I, H, dtype), backend=backend)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@paths
@pytest.mark.parametrize("bidirectional", [False, True])
def test_tf32(cell: str, backend: str, bidirectional: bool) -> None:
    """With tf32 allowed the products of a step have ten bits, as float16 has, and large products sixteen."""
    torch.backends.cudnn.allow_tf32 = True
    kind = KINDS[cell]
    x = torch.randn(40, 64, 256, requires_grad=True)
    hx = states_of(kind, 2 if bidirectional else 1, 64, 256, dtype=torch.float32)
    weights = weights_of(kind, 256, 256, torch.float32, bidirectional=bidirectional)
    lengths = torch.randint(0, 41, (64,)) if bidirectional else None
    agrees(kind, x, hx, weights, torch.float16, backend=backend, bidirectional=bidirectional, lengths=lengths)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_large_products_with_tf32_keep_sixteen_bits(cell: str) -> None:
    """Those of x, over all steps; a step's own are exact in the stepwise path."""
    torch.backends.cudnn.allow_tf32 = True
    kind = KINDS[cell]
    x = torch.randn(40, 64, 256, requires_grad=True)
    own_x, weights = x.detach().cuda().requires_grad_(), to_cuda(weights_of(kind, 256, 256, torch.float32))
    out = kind.run(own_x, None, weights, backend="cuda_stepwise")
    torch.backends.cudnn.allow_tf32 = False
    exact = kind.run(own_x, None, weights, backend="cuda_stepwise")
    for got, wanted in zip([out[0], *gradients(out, [own_x, *weights])],
                           [exact[0], *gradients(exact, [own_x, *weights])], strict=True):  # fmt: skip
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@kinds
@paths
def test_runs_under_graph_capture(kind: RecurrentKind, backend: str) -> None:
    weights = to_cuda(weights_of(kind, 4, 17, torch.float32, bidirectional=True))
    x = torch.randn(6, 3, 4, device="cuda", requires_grad=True)
    lengths = torch.tensor([6, 2, 4], device="cuda")

    def step() -> list[Tensor]:
        out = kind.run(x, None, weights, bidirectional=True, lengths=lengths, backend=backend)
        return [t for _, t in flatten([out, gradients_of_sums(out, [x, *weights])])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        lengths.copy_(torch.tensor([1, 5, 6]))
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, step(), strict=True):
        assert_close_to_float64(got, wanted.double())


def gradients_of_sums(result: Any, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum((t * t).sum() for _, t in flatten(result)), inputs))


@kinds
def test_packed_under_graph_capture(kind: RecurrentKind) -> None:
    """Batch sizes reach the device without memory of the host that a replay would read."""
    weights = to_cuda(weights_of(kind, 4, 8, torch.float32))
    packed = pack_padded_sequence(torch.randn(6, 3, 4, device="cuda"), torch.tensor([6, 4, 1]))
    with torch.no_grad():
        wanted = kind.run(packed, None, weights, backend="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kind.run(packed, None, weights, backend="cuda")
    graph.replay()
    torch.cuda.synchronize()
    assert_close_to_float64(captured, to_float64(wanted))


@kinds
@paths
def test_side_stream(kind: RecurrentKind, backend: str) -> None:
    weights = to_cuda(weights_of(kind, 64, 96, torch.float32))
    x = torch.randn(50, 8, 64, device="cuda")
    wanted = kind.run(x, None, weights, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = kind.run(x * 1, None, weights, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close_to_float64(got, to_float64(wanted))


@kinds
def test_no_synchronisation(kind: RecurrentKind) -> None:
    weights = to_cuda(weights_of(kind, 4, 8, torch.float32))
    x = torch.randn(6, 3, 4, device="cuda", requires_grad=True)
    lengths = torch.tensor([6, 2, 0], device="cuda")
    kind.run(x, None, weights, lengths=lengths, backend="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = kind.run(x, None, weights, lengths=lengths, backend="cuda")
        gradients_of_sums(out, [x, *weights])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@kinds
@dtypes
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cell_step(kind: RecurrentKind, dtype: torch.dtype, with_state: bool, bias: bool) -> None:
    weights = [w.detach().to(dtype).requires_grad_() for w in kind.stock_cell(5, 9, bias=bias).parameters()]
    x = torch.randn(3, 5).to(dtype).requires_grad_()
    hx = states_of(kind, 3, 9, dtype=dtype) if with_state else None
    results = []
    for change, name in ((to_cuda, "cuda"), (to_float64, "reference")):
        own_x, own_hx, own = change(x), change(hx), change(weights)
        out = kind.step(own_x, own_hx, *own, backend=name)
        results.append([out, gradients(out, [own_x, *(t for _, t in flatten(own_hx)), *own])])
    assert_close_to_float64(*results)


@kinds
def test_second_derivative(kind: RecurrentKind) -> None:
    results = []
    weights, x = weights_of(kind, 3, 4, torch.float64), torch.randn(3, 2, 3, dtype=torch.float64)
    for change, name in ((to_cuda, "cuda"), (to_float64, "reference")):
        own, own_x = change(weights), change(x).requires_grad_()
        out, *_ = kind.run(own_x, None, own, backend=name)
        (first,) = torch.autograd.grad((out * out).sum(), own_x, create_graph=True)
        results.append(torch.autograd.grad((first * first).sum(), [own_x, *own], allow_unused=True))
    found, wanted = ([t for t in r if t is not None] for r in results)
    assert_close_to_float64(found, wanted)


@kinds
def test_backward_in_eval_mode(kind: RecurrentKind) -> None:
    """cuDNN refuses it; a module of ours takes the CUDA kernels there."""
    module = kind.stock(4, 6, batch_first=True).cuda().eval()
    fast = seqattn_kernels.accelerate(kind.stock(4, 6, batch_first=True).cuda().eval())
    fast.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 4, device="cuda", requires_grad=True)
    out, _ = fast(x)
    (got,) = torch.autograd.grad(out.sum(), x)
    module.train()
    (wanted,) = torch.autograd.grad(module(x)[0].sum(), x)
    assert_close_to_float64(got, wanted.double())


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_autocast(kind: RecurrentKind, dtype: torch.dtype, backend: str) -> None:
    module = kind.stock(4, 6).cuda()
    x = torch.randn(5, 3, 4, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        stock = module(x)
        ours = kind.run(x, None, module._flat_weights, training=True, backend=backend)
        again = kind.run(ours[0], None, module_weights(kind), training=True, backend=backend)
    for (_, a), (_, b) in zip(flatten(ours), flatten(stock), strict=True):
        assert a.dtype == b.dtype
    assert again[0].dtype == stock[0].dtype
    assert_close_to_float64(ours, to_float64(stock), dtype)
    for g, w in zip(
        gradients(ours, [x, *module.parameters()]), gradients(stock, [x, *module.parameters()]), strict=True
    ):
        assert g.dtype == w.dtype
        assert_close_to_float64(g, w.double(), dtype)


def module_weights(kind: RecurrentKind) -> list[Tensor]:
    return [w.detach().cuda() for w in kind.stock(6, 6)._flat_weights]


@kinds
def test_autocast_of_a_cell(kind: RecurrentKind) -> None:
    cell = kind.stock_cell(4, 6).cuda()
    fast = seqattn_kernels.accelerate(kind.stock_cell(4, 6).cuda())
    fast.load_state_dict(cell.state_dict())
    x = torch.randn(3, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        stock, ours = cell(x), fast(x)
    for (_, a), (_, b) in zip(flatten(ours), flatten(stock), strict=True):
        assert a.dtype == b.dtype
    assert_close_to_float64(ours, to_float64(stock), torch.bfloat16)


@kinds
def test_compiles_without_breaks(kind: RecurrentKind) -> None:
    weights = to_cuda(weights_of(kind, 4, 6, torch.float32))
    x = torch.randn(5, 3, 4, device="cuda", requires_grad=True)

    function = functools.partial(getattr(functional, kind.function), **dict(kind.options))

    def run(x: Tensor) -> Tensor:
        return function(x, None, weights, backend="cuda")[0].sin()

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    wanted = run(x)
    assert_close_to_float64([got, gradients(got, [x])], [wanted.double(), [g.double() for g in gradients(wanted, [x])]])


@kinds
@pytest.mark.parametrize("save", [False, True])
def test_fake_results_match(kind: RecurrentKind, save: bool) -> None:
    weights = [w.detach() for w in to_cuda(weights_of(kind, 4, 6, torch.bfloat16, bidirectional=True))]
    x = torch.randn(5, 3, 4, device="cuda", dtype=torch.bfloat16)
    number = list(native.extension.cells()).index(kind.name)
    arguments = (number, x, None, 0, None, None, weights, [], True, save, True)
    torch.library.opcheck(
        torch.ops.seqattn.recurrence_fwd.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )


def test_errors_name_the_argument() -> None:
    lstm = nn.LSTM(4, 6).cuda()
    weights = list(lstm._flat_weights)
    x = torch.randn(5, 3, 4, device="cuda")
    with pytest.raises(ValueError, match="input: expected device cuda:0"):
        functional.lstm(x.cpu(), None, weights, backend="reference")
    with pytest.raises(ValueError, match="h_0: expected"):
        functional.lstm(x, (torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)), weights, backend="cuda")
    mixed = [weights[0], weights[1].detach().cpu(), *weights[2:]]
    with pytest.raises(RuntimeError, match="weight_hh: expected device cuda:0"):
        functional.lstm(x, None, mixed, backend="cuda")
    with pytest.raises(ValueError, match="lengths: expected values from 0 to 5"):
        functional.lstm(x, None, weights, lengths=torch.tensor([1, 2, 6]), backend="cuda")
    with pytest.raises(RuntimeError, match="the CUDA kernels take CUDA tensors"):
        functional.lstm(x.cpu(), None, [w.cpu() for w in weights], backend="cuda")
    # No sticky error is left behind.
    out, _ = functional.lstm(x, None, weights, backend="cuda")
    assert out.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_two_gpus() -> None:
    lstm = nn.LSTM(4, 6).to("cuda:1")
    x = torch.randn(5, 3, 4, device="cuda:1")
    wanted = functional.lstm(x, None, lstm._flat_weights, backend="torch")
    with torch.cuda.device(0):
        assert_close_to_float64(functional.lstm(x, None, lstm._flat_weights, backend="cuda"), to_float64(wanted))
    with pytest.raises(RuntimeError, match="lengths: expected device cuda:1"):
        functional.lstm(x, None, lstm._flat_weights, lengths=torch.tensor([1, 2, 5], device="cuda:0"), backend="cuda")


def test_out_of_memory_in_backward_is_an_error_and_no_more() -> None:
    gru = nn.GRU(8, 512).cuda()
    x = torch.randn(64, 64, 8, device="cuda", requires_grad=True)
    out, _ = functional.gru(x, None, gru._flat_weights, training=True, backend="cuda")
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        torch.cuda.empty_cache()
        with pytest.raises(RuntimeError, match="memory"):
            out.sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    out, _ = functional.gru(x, None, gru._flat_weights, training=True, backend="cuda")
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_torch_serves_where_nothing_was_measured_to_be_better() -> None:
    device = torch.device("cuda", 0)

    def name(**options: Any) -> str:
        request = backends.Request("lstm", device, torch.float64, 60, 3, 7, options.pop("training", False), **options)
        return backends.choose(backends.RECURRENCE, request)

    assert name() == "torch"
    assert name(extras="lengths=") == "cuda"
    assert name(training=True, eval_backward=True) == "cuda"
    assert name(sequence=False) == "torch"
