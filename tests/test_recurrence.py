"""The recurrence operators and functions against float64, and what they do with bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqattn_kernels import backends, functional, native, ops, reference
from tests.cases import KINDS, SEQUENCES, RecurrentKind
from tests.compare import (
    LARGEST_ERROR_RATIO,
    MEAN_ERROR_RATIO,
    assert_close_to_float64,
    assert_same_bits,
    error_ratio,
    to_float64,
)

pytestmark = pytest.mark.usefixtures("device")
needs_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def weights_of(kind: RecurrentKind, input_size: int, hidden: int, dtype=torch.float32, **options) -> list[Tensor]:
    return [w.detach().to(dtype).requires_grad_() for w in kind.stock(input_size, hidden, **options)._flat_weights]


def run_with_gradients(kind, x, hx, weights, **options):
    """Results and the gradients of everything, from loss weights that depend on the shapes alone."""
    results = kind.run(x, hx, weights, **options)
    flat = []
    for result in results:
        flat += list(result) if isinstance(result, tuple) else [result]
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype, device=r.device).view(r.shape)).sum() for r in flat)
    inputs = [x, *(hx if isinstance(hx, tuple) else () if hx is None else (hx,)), *weights]
    return flat, torch.autograd.grad(loss, inputs)


def agrees_with_float64(kind, x, hx, weights, **options):
    actual = run_with_gradients(kind, x, hx, weights, **options)
    oracle = run_with_gradients(
        kind, to_float64(x), to_float64(hx), to_float64(weights), **{**options, "backend": "reference"}
    )
    assert_close_to_float64(actual, oracle)


def states(kind, *shape, dtype=torch.float32):
    made = kind.state(*shape, dtype=dtype)
    return tuple(s.requires_grad_() for s in made) if isinstance(made, tuple) else made.requires_grad_()


def test_every_registry_names_the_same_cells():
    assert set(ops.recurrence.CELLS) == set(reference.recurrence.CELLS) == set(KINDS)
    assert {k: v.gates for k, v in KINDS.items()} == reference.recurrence.GATES
    if native.extension is not None:
        assert tuple(native.extension.cells()) == ops.recurrence.CELLS


@kinds
@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_and_gradients(kind, shape, dtype, threads):
    B, T, I, H = shape
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    agrees_with_float64(kind, x, states(kind, 1, B, H, dtype=dtype), weights_of(kind, I, H, dtype))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind, dtype):
    x = torch.randn(5, 3, 6).to(dtype).requires_grad_()
    weights = weights_of(kind, 6, 9, dtype)
    actual = run_with_gradients(kind, x, states(kind, 1, 3, 9, dtype=dtype), weights)
    assert all(t.dtype == dtype for t in [*actual[0], *actual[1]])
    agrees_with_float64(kind, x, None, weights)


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_stacks_of_both_directions_with_lengths(kind, batch_first, given, threads):
    B, T, I, H = 5, 7, 6, 18
    options = {"num_layers": 2, "bidirectional": True}
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, requires_grad=True)
    hx = states(kind, 4, B, H) if given else None
    lengths = torch.tensor([3, 0, 7, 1, 3])
    agrees_with_float64(
        kind, x, hx, weights_of(kind, I, H, **options), batch_first=batch_first, lengths=lengths, **options
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", [None, [4, 2, 6]], ids=["full", "lengths"])
@pytest.mark.parametrize("proj_size", [1, 5, 20])
def test_projections(bias, lengths, proj_size, threads):
    kind, (B, T, I, H) = KINDS["lstm"], (3, 6, 4, 37)
    options = {"bidirectional": True, "bias": bias, "proj_size": proj_size}
    hx = tuple(torch.randn(2, B, n, requires_grad=True) for n in (proj_size, H))
    lengths = None if lengths is None else torch.tensor(lengths)
    agrees_with_float64(
        kind,
        torch.randn(T, B, I, requires_grad=True),
        hx,
        weights_of(kind, I, H, **options),
        lengths=lengths,
        return_all_states=True,
        **options,
    )


@kinds
@pytest.mark.parametrize(("B", "T", "H"), [(1, 1100, 5), (3, 400, 17), (40, 30, 33), (600, 2, 3)], ids=str)
def test_longer_than_a_chunk_and_a_block(kind, B, T, H, threads):
    """Input projections and gradients are made some hundred rows at a time; their seams must not show."""
    x = torch.randn(B, T, 4, requires_grad=True)
    lengths = torch.randint(0, T + 1, (B,))
    weights = weights_of(kind, 4, H, bidirectional=True)
    agrees_with_float64(kind, x, None, weights, batch_first=True, bidirectional=True)
    agrees_with_float64(kind, x, None, weights, batch_first=True, bidirectional=True, lengths=lengths)


@pytest.mark.cpu
@needs_native
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    """The same tests on the kernels that an older processor would take."""
    selection = "(test_forward_and_gradients or test_projections or test_longer or half) and not 2T"
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", selection, "--device", "cpu"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]


@pytest.mark.cpu
@needs_native
@kinds
def test_results_do_not_depend_on_threads_or_runs(kind):
    x = torch.randn(6, 19, 70, requires_grad=True)
    weights = weights_of(kind, 70, 200, bidirectional=True)

    def run(threads):
        torch.set_num_threads(threads)
        return run_with_gradients(kind, x, None, weights, bidirectional=True, backend="cpu")

    first = run(2)
    for threads in (2, 2, 1):
        assert_same_bits(run(threads), first)


@kinds
def test_strides_of_the_input_do_not_matter(kind):
    weights = weights_of(kind, 6, 9)
    base = torch.randn(3, 12, 5)
    for x in (base.permute(2, 0, 1)[..., ::2], torch.randn(1, 1, 6).expand(5, 3, 6), base.permute(2, 0, 1)[..., 3:9]):
        assert_same_bits(kind.run(x, None, weights), kind.run(x.contiguous(), None, weights))
    turned = [w.detach().t().contiguous().t() if w.dim() == 2 else w.detach() for w in weights]
    assert_same_bits(kind.run(x, None, turned), kind.run(x, None, [w.detach() for w in weights]))


@kinds
def test_packed_sequences_equal_stock(kind):
    x, lengths = torch.randn(4, 6, 5, dtype=torch.float64), torch.tensor([2, 6, 1, 4])
    stock = kind.stock(5, 8, bidirectional=True).double()
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    expected, expected_state = stock(packed)
    output, state = kind.run(packed, None, stock._flat_weights, bidirectional=True)
    assert_close_to_float64((output, state), (expected, expected_state))
    padded, same_state = kind.run(x, None, stock._flat_weights, batch_first=True, bidirectional=True, lengths=lengths)
    assert_close_to_float64(padded, pad_packed_sequence(expected, batch_first=True)[0])
    assert_close_to_float64(same_state, expected_state)


@kinds
def test_second_derivatives(kind):
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = weights_of(kind, 2, 3, torch.float64)

    def run(x, *weights):
        output, state = kind.run(x, None, weights, lengths=torch.tensor([3, 2]))
        return output, state[1] if kind.has_cell_state else state

    assert torch.autograd.gradcheck(run, (x, *weights))
    if kind.name != "rnn_relu":
        assert torch.autograd.gradgradcheck(run, (x, *weights))


@kinds
def test_second_derivatives_of_a_step(kind):
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    hx = states(kind, 2, 3, dtype=torch.float64)
    hx = hx if isinstance(hx, tuple) else (hx,)
    weights = [w.detach().double().requires_grad_() for w in kind.stock_cell(2, 3).parameters()]

    def run(x, *rest):
        state, weights = rest[: len(hx)], rest[len(hx) :]
        return kind.step(x, state if kind.has_cell_state else state[0], *weights)

    assert torch.autograd.gradcheck(run, (x, *hx, *weights))
    if kind.name != "rnn_relu":
        assert torch.autograd.gradgradcheck(run, (x, *hx, *weights))


@kinds
def test_torch_func(kind):
    weights = weights_of(kind, 3, 4, torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def loss(weights, backend):
        return kind.run(x, None, list(weights), backend=backend)[0].square().sum()

    actual = torch.func.grad(lambda w: loss(w, None))(tuple(weights))
    assert_close_to_float64(actual, torch.func.grad(lambda w: loss(w, "reference"))(tuple(weights)))


@pytest.mark.cpu
@needs_native
@kinds
@pytest.mark.parametrize("extras", [{}, {"lengths": torch.tensor([2, 4, 0])}], ids=["full", "lengths"])
def test_operators_pass_opcheck(kind, extras):
    number = ops.recurrence.CELLS.index(kind.name)
    weights = [w.detach() for w in weights_of(kind, 5, 6, bidirectional=True)]
    x, h0 = torch.randn(4, 3, 5), torch.randn(2, 3, 6)
    c0 = torch.randn(2, 3, 6) if kind.has_cell_state else None
    sizes = extras.get("lengths")
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.seqattn.recurrence_fwd.default
    arguments = (number, x, sizes, 0, h0, c0, weights)
    torch.library.opcheck(forward, (*arguments, [], True, True, kind.has_cell_state), test_utils=checks)
    if sizes is None:  # rows past a length are left unwritten in the reserve, so that two runs differ there
        reserve = forward(*arguments, [], True, True, False)[-1]
        torch.library.opcheck(
            torch.ops.seqattn.recurrence_bwd.default,
            (*arguments, True, reserve, torch.randn(4, 3, 12), None, None, None, True, True),
            test_utils=checks,
        )
    torch.library.opcheck(torch.ops.seqattn.recurrence_pack.default, (number, weights, True), test_utils=checks)
    step = torch.ops.seqattn.cell_fwd.default
    arguments = (number, x[0], h0[0], None if c0 is None else c0[0], weights[:4])
    torch.library.opcheck(step, (*arguments, [], True, True), test_utils=checks)
    reserve = step(*arguments, [], True, True)[-1]
    torch.library.opcheck(
        torch.ops.seqattn.cell_bwd.default, (*arguments, True, reserve, h0[1], None, True, True), test_utils=checks
    )


@kinds
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(kind, training):
    weights = [w.requires_grad_(training) for w in weights_of(kind, 4, 5)]
    x = torch.randn(3, 2, 4, requires_grad=training)
    lengths = torch.tensor([3, 1])
    function = getattr(functional, kind.function)

    def run(x, w):
        return function(x, None, w, lengths=lengths, **dict(kind.options))[0]

    actual, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weights), run(x, weights)
    assert_same_bits(actual, expected)
    if training:
        assert_same_bits(
            torch.autograd.grad(actual.sum(), [x, *weights]), torch.autograd.grad(expected.sum(), [x, *weights])
        )


@pytest.mark.cpu
@needs_native
@kinds
def test_packed_weights(kind):
    options = {"num_layers": 2, "bidirectional": True}
    weights = [w.detach() for w in weights_of(kind, 6, 21, **options)]
    packed = functional.pack_weights(kind.name, weights, **options)
    # So many rows that without packed weights the call packs them itself; fewer would be summed in another order.
    x = torch.randn(15, 3, 6)
    expected = kind.run(x, None, weights, **options)
    assert_same_bits(kind.run(x, None, weights, packed_weights=packed, **options), expected)
    few = kind.run(x[:2], None, weights, packed_weights=packed, **options)
    assert_close_to_float64(few, kind.run(to_float64(x[:2]), None, to_float64(weights), backend="reference", **options))
    with pytest.raises(RuntimeError, match="packed_weights"):
        kind.run(x, None, [w.requires_grad_() for w in weights], packed_weights=packed, **options)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30, 1e-42])
def test_extreme_input_propagates_as_in_stock(kind, value):
    stock = kind.stock(3, 20, bidirectional=True)
    x = torch.randn(6, 2, 3)
    x[2, 1, 0] = value
    with torch.no_grad():
        expected = stock(x)
        actual = kind.run(x, None, stock._flat_weights, bidirectional=True)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@kinds
@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0])
def test_errors_are_no_larger_than_those_of_stock(kind, scale):
    if kind.name == "rnn_relu" and scale > 1:
        pytest.skip("relu grows without bound")
    B, T, I, H = 4, 200, 32, 48
    stock = kind.stock(I, H)
    with torch.no_grad():
        for w in stock.parameters():
            w.mul_(scale)
    x = torch.randn(T, B, I)
    oracle = kind.stock(I, H).double()
    oracle.load_state_dict(stock.state_dict())
    with torch.no_grad():
        exact = oracle(x.double())[0]
        theirs = stock(x)[0]
        ours = kind.run(x, None, stock._flat_weights)[0]
    ratio = error_ratio(ours, theirs, exact)
    # Where the dynamics are chaotic, one rounding decides the rest of a sequence: only the mean says something then.
    assert ratio.mean <= MEAN_ERROR_RATIO
    assert scale > 1 or ratio.largest <= LARGEST_ERROR_RATIO


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("B", [0, 2])
@kinds
def test_empty_input(kind, T, B):
    weights = weights_of(kind, 3, 4)
    x = torch.randn(T, B, 3, requires_grad=True)
    results, gradients = run_with_gradients(kind, x, states(kind, 1, B, 4), weights)
    assert results[0].shape == (T, B, 4)
    assert results[1].shape == (1, B, 4)
    if T * B == 0:
        assert all(not g.any() for g in gradients[-4:])


@needs_native
@kinds
def test_weights_changed_between_forward_and_backward(kind):
    weights = weights_of(kind, 3, 4)
    output, _ = kind.run(torch.randn(2, 2, 3), None, weights)
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@needs_native
@kinds
def test_outputs_may_be_changed_in_place(kind):
    weights = weights_of(kind, 3, 4)
    x = torch.randn(2, 2, 3)
    results = kind.run(x, None, weights)
    expected = torch.autograd.grad(results[0].sum(), weights)
    output, state = kind.run(x, None, weights)
    output.add_(1)
    (state[0] if kind.has_cell_state else state).zero_()
    assert_same_bits(torch.autograd.grad(output.sum(), weights), expected)


@kinds
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 5]), ValueError, "lengths: expected values from 0 to 4"),
        (torch.tensor([-1, 2]), ValueError, "lengths: expected values from 0 to 4"),
        (torch.tensor([1, 2, 3]), ValueError, r"lengths: expected \[B\] with B=2"),
        (torch.tensor([[1, 2]]), ValueError, r"lengths: expected \[B\] with B=2"),
        (torch.tensor([1.0, float("nan")]), TypeError, "lengths: expected an integer tensor"),
        (torch.tensor([True, False]), TypeError, "lengths: expected an integer tensor"),
        ([1, 2], TypeError, "lengths: expected a Tensor"),
    ],
)
def test_bad_lengths(kind, lengths, error, message):
    with pytest.raises(error, match=message):
        kind.run(torch.randn(4, 2, 3), None, weights_of(kind, 3, 5), lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16, torch.int64], ids=str)
def test_lengths_of_any_integer_type(dtype):
    kind, weights, x = KINDS["gru"], weights_of(KINDS["gru"], 3, 5), torch.randn(4, 2, 3)
    expected = kind.run(x, None, weights, lengths=torch.tensor([4, 2]))
    assert_same_bits(kind.run(x, None, weights, lengths=torch.tensor([4, 2], dtype=dtype)), expected)
    spread = torch.tensor([4, 0, 2, 0], dtype=dtype)[::2]
    assert_same_bits(kind.run(x, None, weights, lengths=spread), expected)


BAD_INPUT = {
    "rank": (lambda x, h: (x[None], h), ValueError, "input: expected 2 or 3 dimensions"),
    "size": (lambda x, h: (x[..., :2], h), ValueError, "input: expected last dimension 3"),
    "dtype": (lambda x, h: (x.double(), None), ValueError, "input: expected torch.float32"),
    "integers": (lambda x, h: (x.long(), None), ValueError, "input: expected torch.float32"),
    "a list": (lambda x, h: (x.tolist(), h), TypeError, "input: expected a Tensor"),
    "state's batch": (lambda x, h: (x, h[:, :1]), ValueError, r"expected \[1, 2, 5\], got \[1, 1, 5\]"),
    "state's layers": (lambda x, h: (x, torch.cat([h, h])), ValueError, r"expected \[1, 2, 5\], got \[2, 2, 5\]"),
    "state's rank": (lambda x, h: (x, h[0]), ValueError, r"expected \[1, 2, 5\], got \[2, 5\]"),
    "state's dtype": (lambda x, h: (x, h.double()), ValueError, "expected torch.float32"),
    "a device": (lambda x, h: (x.to("meta"), None), ValueError, "input: expected device c(pu|uda)"),
}


@kinds
@pytest.mark.parametrize("case", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(kind, case):
    spoil, error, message = case
    x, h = spoil(torch.randn(4, 2, 3), torch.zeros(1, 2, 5))
    hx = h if h is None or not kind.has_cell_state else (h, torch.zeros(1, 2, 5))
    with pytest.raises(error, match=message):
        kind.run(x, hx, weights_of(kind, 3, 5))


def test_bad_options():
    kind, x = KINDS["lstm"], torch.randn(4, 2, 3)
    weights = weights_of(kind, 3, 5)
    with pytest.raises(TypeError, match=r"hx: expected \(h_0, c_0\)"):
        kind.run(x, torch.zeros(1, 2, 5), weights)
    with pytest.raises(ValueError, match="weights: expected 2 layers"):
        kind.run(x, None, weights[:3], num_layers=2)
    with pytest.raises(ValueError, match="nonlinearity"):
        functional.rnn(x, None, weights, nonlinearity="gelu")
    with pytest.raises(ValueError, match="backend: expected one of"):
        kind.run(x, None, weights, backend="tpu")
    with pytest.raises(RuntimeError, match="torch's own function has no lengths="):
        kind.run(x, None, weights, lengths=torch.tensor([4, 4]), backend="torch")


BAD_STEP = {
    "rank": (lambda x, h: (x[None], h), ValueError, r"input: expected \[B, I\] or \[I\]"),
    "size": (lambda x, h: (x[:, :2], h), ValueError, "input: expected last dimension 3"),
    "dtype": (lambda x, h: (x.double(), None), ValueError, "input: expected torch.float32"),
    "state's batch": (lambda x, h: (x, h[:1]), ValueError, r"h: expected \[2, 5\]"),
    "state's size": (lambda x, h: (x, h[:, :4]), ValueError, r"h: expected \[2, 5\]"),
    "state's dtype": (lambda x, h: (x, h.double()), ValueError, "h: expected torch.float32"),
    "state's type": (lambda x, h: (x, 3.0), TypeError, "h: expected a Tensor"),
}


@kinds
@pytest.mark.parametrize("case", BAD_STEP.values(), ids=BAD_STEP)
def test_bad_input_of_a_step(kind, case):
    spoil, error, message = case
    x, h = spoil(torch.randn(2, 3), torch.zeros(2, 5))
    hx = h if h is None or not kind.has_cell_state else (h, torch.zeros(2, 5))
    with pytest.raises(error, match=message):
        kind.step(x, hx, *kind.stock_cell(3, 5).parameters())


def test_backends_are_taken_in_order():
    request = backends.Request("gru", torch.device("cpu"), torch.float32, 1, 1, 1, False)
    assert backends.choose(backends.RECURRENCE, request) == ("cpu" if native.extension is not None else "torch")
    complex_request = backends.Request("gru", torch.device("cpu"), torch.complex64, 1, 1, 1, False)
    with pytest.raises(RuntimeError, match="float32, float64"):
        backends.choose(backends.RECURRENCE, complex_request, "cpu")


@kinds
def test_every_backend_agrees(kind):
    x = torch.randn(5, 3, 4, requires_grad=True)
    weights, hx = weights_of(kind, 4, 6), states(kind, 1, 3, 6)
    request = backends.Request(kind.name, x.device, x.dtype, 15, 3, 6, True)
    names = [b.name for b in backends.RECURRENCE if b.why_not(request) is None]
    assert {"torch", "reference"} <= set(names)
    for name in names:
        agrees_with_float64(kind, x, hx, weights, backend=name)
