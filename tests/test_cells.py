"""Cell modules: everything that clients of torch.nn's rely on."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import seqattn_kernels.nn as fast
from tests.cases import KINDS
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, to_float64

pytestmark = pytest.mark.usefixtures("device")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))

# (B, I, H); B of None is unbatched.
SHAPES = [(1, 1, 1), (None, 3, 63), (3, 63, 1), (2, 3, 63), (17, 63, 3), (0, 3, 7)]


def ours(stock: nn.RNNCellBase) -> nn.RNNCellBase:
    """Our cell on a copy of the weights of one that torch.nn built, by way of a strict state dict."""
    options = {"nonlinearity": stock.nonlinearity} if isinstance(stock, nn.RNNCell) else {}
    module = getattr(fast, type(stock).__name__)(
        stock.input_size, stock.hidden_size, stock.bias, dtype=stock.weight_ih.dtype, **options
    )
    module.load_state_dict(stock.state_dict(), strict=True)
    return module


def draw(cell: nn.RNNCellBase, batch: int | None):
    rows = () if batch is None else (batch,)
    input = torch.randn(*rows, cell.input_size, requires_grad=True)
    h, c = (torch.randn(*rows, cell.hidden_size).requires_grad_() for _ in range(2))
    return input, (h, c) if isinstance(cell, nn.LSTMCell) else h


def leaves(hx) -> tuple[torch.Tensor, ...]:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def assert_as_stock(stock, module, input, hx) -> None:
    """Results, and gradients of input, state and weights, are those of stock in float64."""
    exact, input64, hx64 = copy.deepcopy(stock).double(), to_float64(input), None if hx is None else to_float64(hx)
    result, oracle = module(input, hx), exact(input64, hx64)
    assert_close_to_float64(result, oracle)
    states, states64 = ((), ()) if hx is None else (leaves(hx), leaves(hx64))
    assert_close_to_float64(
        gradients(result, [input, *states, *module.parameters()]),
        gradients(oracle, [input64, *states64, *exact.parameters()]),
    )


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_computes_what_stock_does(kind, bias, shape):
    batch, input_size, hidden_size = shape
    stock = kind.stock_cell(input_size, hidden_size, bias=bias)
    input, hx = draw(stock, batch)
    assert_as_stock(stock, ours(stock), input, hx)
    assert_as_stock(stock, ours(stock), input, None)


@every_kind
def test_constructors_that_clients_write(kind):
    for arguments in ((torch.tensor(3), 7), (3, 7, 1), (3, 7, 0)):
        cell = getattr(fast, kind.cell.__name__)(*arguments)
        stock = kind.cell(*arguments)
        stock.load_state_dict(cell.state_dict())
        input = torch.randn(2, 3)
        torch.testing.assert_close(cell(input), stock(input))


@every_kind
def test_stands_in_for_stock(kind):
    stock = kind.stock_cell(3, 7)
    cell = ours(stock)
    assert isinstance(cell, kind.cell)
    assert repr(cell) == repr(stock)
    assert vars(cell).keys() == vars(stock).keys()
    stock.load_state_dict(cell.state_dict(), strict=True)
    stock.__class__ = type(cell)
    input, hx = draw(cell, 2)
    assert_same_bits(stock(input, hx), cell(input, hx))


@every_kind
def test_copies(kind):
    cell = ours(kind.stock_cell(3, 7))
    input, hx = draw(cell, 2)
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), torch.load(file, weights_only=False)):
        assert type(other) is type(cell)
        assert_same_bits(other(input, hx), cell(input, hx))
        with torch.no_grad():
            other.weight_hh.zero_()
        assert not torch.equal(leaves(other(input, hx))[0], leaves(cell(input, hx))[0])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_converts(kind, dtype):
    stock = kind.stock_cell(3, 7).to(dtype)
    cell = ours(stock)
    input = torch.randn(2, 3, dtype=dtype)
    result = cell(input)
    assert all(tensor.dtype == dtype for tensor in leaves(result))
    assert_close_to_float64(result, stock.double()(input.double()), dtype)


@every_kind
def test_parametrized_weights(kind):
    stock = kind.stock_cell(3, 7)
    cell = ours(stock)
    for each in (stock, cell):
        nn.utils.parametrizations.weight_norm(each, "weight_hh")
    input, hx = draw(stock, 2)
    result, expected = cell(input, hx), stock(input, hx)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradients(result, [*cell.parameters()]), gradients(expected, [*stock.parameters()]))


@every_kind
def test_reads_the_weights_of_the_moment(kind):
    stock = kind.stock_cell(3, 7)
    cell = ours(stock)
    input, hx = draw(stock, 2)
    torch.testing.assert_close(cell(input, hx), stock(input, hx))
    new = torch.randn_like(stock.weight_hh)
    for each in (stock, cell):
        each.weight_hh.data.copy_(new)
    torch.testing.assert_close(cell(input, hx), stock(input, hx))
    for each in (stock, cell):
        del each._parameters["weight_hh"]
        each.weight_hh = new / 2
    torch.testing.assert_close(cell(input, hx), stock(input, hx))


@every_kind
def test_functional_call(kind):
    stock = kind.stock_cell(3, 7)
    input, hx = draw(stock, 2)
    other = {name: torch.randn_like(value) for name, value in stock.named_parameters()}
    result, expected = (torch.func.functional_call(m, other, (input, hx)) for m in (ours(stock), stock))
    torch.testing.assert_close(result, expected)


def test_states_as_a_list():
    stock = nn.LSTMCell(3, 7)
    input, hx = draw(stock, 2)
    assert_same_bits(ours(stock)(input, list(hx)), ours(stock)(input, hx))


@pytest.mark.cpu  # torch's own cells, which serve on a GPU, multiply by their results
@every_kind
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_states_are_nobody_elses_memory(kind, batch):
    cell = ours(kind.stock_cell(3, 7))
    input, hx = draw(cell, batch)
    wanted = [input, *leaves(hx), *cell.parameters()]
    expected = gradients(cell(input, hx), wanted)
    result = cell(input, hx)
    # What autograd multiplies by is none of the results: each may be written before the backward.
    copies = tuple(state * 1 for state in leaves(result))
    with torch.no_grad():
        for state in leaves(result):
            state.data.fill_(float("nan"))
    assert_same_bits(gradients(copies, wanted), expected)
    with torch.no_grad():
        first, second = cell(input, hx), cell(input, hx)
        for state in leaves(first):
            state.zero_()
    assert_same_bits(second, cell(input, hx))


@every_kind
def test_trains_as_stock_does(kind):
    stock = kind.stock_cell(3, 7)
    cell = ours(stock)
    inputs = torch.randn(5, 2, 3)
    for each in (stock, cell):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            state = None
            for input in inputs:
                state = each(input, state)
            leaves(state)[0].square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dict(cell.named_parameters()), dict(stock.named_parameters()), rtol=1e-4, atol=1e-5)


BAD_CALLS = {
    "rank 3": lambda m, x, h: m(x[None], h),
    "rank 0": lambda m, x, h: m(x[0, 0], h),
    "rank of the state": lambda m, x, h: m(x, _of(h, lambda s: s[None])),
    "input size": lambda m, x, h: m(x[:, :2], h),
    "batch of the state": lambda m, x, h: m(x, _of(h, lambda s: s.repeat(2, 1))),
    "size of the state": lambda m, x, h: m(x, _of(h, lambda s: s[:, :3])),
    "dtype": lambda m, x, h: m(x.double(), h),
    "integers": lambda m, x, h: m(x.long(), h),
}


def _of(hx, function):
    return tuple(function(s) for s in hx) if isinstance(hx, tuple) else function(hx)


@every_kind
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_refuses_what_stock_refuses(kind, call):
    stock = kind.stock_cell(3, 7)
    input, hx = draw(stock, 2)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        call(stock, input, hx)
    with pytest.raises((ValueError, TypeError), match=r": expected .* got "):
        call(ours(stock), input, hx)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(kind, training):
    cell = ours(kind.stock_cell(3, 7))
    input, hx = draw(cell, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_steps(input, hx):
        return cell(input, cell(input, hx))

    with torch.set_grad_enabled(training):
        result, expected = two_steps(input, hx), cell(input, cell(input, hx))
    assert_same_bits(result, expected)
    if training:
        wanted = [input, *leaves(hx), *cell.parameters()]
        torch.testing.assert_close(gradients(result, wanted), gradients(expected, wanted))


@every_kind
def test_exports(kind):
    cell = ours(kind.stock_cell(3, 7)).eval()
    input, hx = draw(cell, 2)
    with torch.no_grad():
        program = torch.export.export(cell, (input, hx))
        assert_same_bits(program.module()(input, hx), cell(input, hx))
