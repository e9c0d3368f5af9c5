"""Sequence modules: everything that clients of torch.nn's rely on."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence

import seqattn_kernels.nn as fast
from tests.cases import KINDS
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, to_float64

pytestmark = pytest.mark.usefixtures("device")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "both directions": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "all at once": {"bias": False, "batch_first": True, "bidirectional": True, "num_layers": 3},
}
SHAPES = [(1, 1, 1, 1), (3, 5, 63, 3), (2, 4, 3, 63)]


def ours(stock: nn.RNNBase) -> nn.RNNBase:
    """Our module on a copy of the weights of one that torch.nn built, by way of a strict state dict."""
    options = {"nonlinearity": stock.nonlinearity} if isinstance(stock, nn.RNN) else {"proj_size": stock.proj_size}
    if isinstance(stock, nn.GRU):
        options = {}
    module = getattr(fast, type(stock).__name__)(
        stock.input_size,
        stock.hidden_size,
        stock.num_layers,
        bias=stock.bias,
        batch_first=stock.batch_first,
        dropout=stock.dropout,
        bidirectional=stock.bidirectional,
        dtype=stock.weight_ih_l0.dtype,
        **options,
    )
    module.load_state_dict(stock.state_dict(), strict=True)
    return module.train(stock.training)


def draw(module: nn.RNNBase, steps: int, batch: int, *, batched: bool = True):
    """A random input and initial state, all asking for gradients."""
    layers = module.num_layers * (1 + module.bidirectional)
    shape = (batch, steps) if module.batch_first else (steps, batch)
    input = torch.randn(*(shape if batched else (steps,)), module.input_size)
    inner = (batch,) if batched else ()
    h = torch.randn(layers, *inner, getattr(module, "proj_size", 0) or module.hidden_size) / 2
    hx = (h, torch.randn(layers, *inner, module.hidden_size)) if isinstance(module, nn.LSTM) else h
    for tensor in (input, *leaves(hx)):
        tensor.requires_grad_()
    return input, hx


def pack_sequence(sequences, enforce_sorted: bool = True) -> PackedSequence:
    """torch's own makes the lengths on the default device, and then wants them on the CPU."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device="cpu")
    return pack_padded_sequence(pad_sequence(sequences), lengths, enforce_sorted=enforce_sorted)


def leaves(hx) -> tuple[torch.Tensor, ...]:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def assert_as_stock(stock, module, input, hx=None, **call) -> None:
    """Results, and gradients of input, states and weights, are those of stock in float64."""
    exact, input64, hx64 = copy.deepcopy(stock).double(), to_float64(input), None if hx is None else to_float64(hx)
    result, oracle = module(input, hx, **call), exact(input64, hx64)
    assert_close_to_float64(result, oracle)

    def wanted(module, input, hx):
        data = input.data if isinstance(input, PackedSequence) else input
        return [data, *([] if hx is None else leaves(hx)), *module.parameters()]

    assert_close_to_float64(
        gradients(result, wanted(module, input, hx)), gradients(oracle, wanted(exact, input64, hx64))
    )


@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_computes_what_stock_does(kind, options, shape):
    batch, steps, input_size, hidden_size = shape
    stock = kind.stock(input_size, hidden_size, **options)
    input, hx = draw(stock, steps, batch)
    assert_as_stock(stock, ours(stock), input, hx)
    assert_as_stock(stock, ours(stock), input)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("proj_size", [1, 3])
def test_projects(options, proj_size):
    stock = nn.LSTM(5, 7, proj_size=proj_size, **options)
    input, hx = draw(stock, 4, 3)
    assert_as_stock(stock, ours(stock), input, hx)


@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_unbatched(kind, options):
    stock = kind.stock(3, 63, **options)
    input, hx = draw(stock, 5, 1, batched=False)
    assert_as_stock(stock, ours(stock), input, hx)
    assert_as_stock(stock, ours(stock), input)


@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("lengths", [[6, 4, 1], [1, 6, 3, 6]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("given", [False, True], ids=["no state", "state"])
def test_packed_sequences(kind, options, lengths, given):
    stock = kind.stock(3, 7, **options)
    _, hx = draw(stock, 6, len(lengths))
    sequences = [torch.randn(length, 3) for length in lengths]
    packed = pack_sequence(sequences, enforce_sorted=lengths == sorted(lengths, reverse=True))
    packed.data.requires_grad_()
    assert_as_stock(stock, ours(stock), packed, hx if given else None)
    output = ours(stock)(packed)[0]
    assert isinstance(output, PackedSequence)
    for got, expected in zip(output[1:], packed[1:], strict=True):
        assert got is expected or torch.equal(got, expected)


@every_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_lengths_are_those_of_packed_sequences(kind, options):
    stock = kind.stock(3, 7, **options)
    module = ours(stock)
    input, hx = draw(stock, 6, 4)
    lengths = torch.tensor([1, 6, 3, 5])
    output, state = module(input, hx, lengths=lengths)
    packed = pack_padded_sequence(input, lengths.cpu(), stock.batch_first, enforce_sorted=False)
    oracle, oracle_state = copy.deepcopy(stock).double()(to_float64(packed), to_float64(hx))
    padded, _ = pad_packed_sequence(oracle, stock.batch_first, total_length=6)
    assert_close_to_float64((output, state), (padded, oracle_state))


@every_kind
def test_a_sequence_of_length_zero_keeps_its_state(kind):
    module = ours(kind.stock(3, 7, bidirectional=True))
    input, hx = draw(module, 4, 3)
    output, state = module(input, hx, lengths=torch.tensor([0, 4, 0]))
    assert not output[:, [0, 2]].any()
    for given, final in zip(leaves(hx), leaves(state), strict=True):
        assert_same_bits(final[:, [0, 2]], given[:, [0, 2]])
        assert final.data_ptr() != given.data_ptr()


@every_kind
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "batch_first": True}], ids=["plain", "two layers"])
def test_states_of_every_step(kind, options):
    stock = kind.stock(3, 7, **options)
    input, hx = draw(stock, 5, 2)
    output, state, states = ours(stock)(input, hx, return_all_states=True)
    assert_close_to_float64((output, state), copy.deepcopy(stock).double()(to_float64(input), to_float64(hx)))
    time = 1 if stock.batch_first else 0
    for step in range(5):
        final = leaves(stock(input.narrow(time, 0, step + 1), hx)[1])[-1][-1]
        torch.testing.assert_close(states.select(time, step), final)
    if kind.has_cell_state:
        assert output.data_ptr() != states.data_ptr()


@every_kind
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}], ids=str)
def test_dropout_draws_what_stock_draws(kind, options):
    stock = kind.stock(5, 16, num_layers=3, dropout=0.4, **options)
    module = ours(stock)
    input, _ = draw(stock, 4, 3)

    def run(module):
        torch.manual_seed(1)
        return module(input)

    torch.testing.assert_close(run(module), run(stock))
    module.dropout = stock.dropout = 0.9
    torch.testing.assert_close(run(module), run(stock))
    module.eval()
    torch.testing.assert_close(run(module), run(stock.eval()))


@every_kind
def test_stands_in_for_stock(kind):
    stock = kind.stock(3, 7, num_layers=2, bidirectional=True)
    module = ours(stock)
    assert isinstance(module, kind.module)
    assert repr(module) == repr(stock)
    assert module._flat_weights_names == stock._flat_weights_names
    assert [[w.shape for w in ws] for ws in module.all_weights] == [[w.shape for w in ws] for ws in stock.all_weights]
    assert module.all_weights[0][0] is module.weight_ih_l0
    assert module.flatten_parameters() is None
    assert vars(module).keys() == vars(stock).keys()
    assert list(module.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(module.state_dict(), strict=True)


@every_kind
def test_instances_that_torch_built_serve_as_they_are(kind):
    stock = kind.stock(3, 7)
    old = pickle.loads(pickle.dumps(stock))
    old.__class__ = getattr(fast, kind.module.__name__)
    input, hx = draw(stock, 4, 2)
    assert_as_stock(stock, old, input, hx)


def test_checkpoints_from_before_proj_size_and_weight_names():
    stock = nn.LSTM(3, 7)
    state = {name: value for name, value in stock.__getstate__().items() if name not in ("proj_size", "_flat_weights")}
    state["_all_weights"] = [[stock.weight_ih_l0]]
    old = fast.LSTM.__new__(fast.LSTM)
    old.__setstate__(copy.copy(state))
    input, hx = draw(stock, 4, 2)
    assert_as_stock(stock, old, input, hx)


@every_kind
def test_copies(kind):
    module = ours(kind.stock(3, 7))
    input, hx = draw(module, 4, 2)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for other in copies:
        assert type(other) is type(module)
        assert other.weight_hh_l0 is not module.weight_hh_l0
        assert_same_bits(other(input, hx), module(input, hx))
    with torch.no_grad():
        copies[0].weight_hh_l0.zero_()
    assert not torch.equal(copies[0](input, hx)[0], module(input, hx)[0])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_converts(kind, dtype):
    stock = kind.stock(3, 7).to(dtype)
    module = ours(kind.stock(3, 7)).to(dtype)
    module.load_state_dict(stock.state_dict())
    input = torch.randn(4, 2, 3, dtype=dtype)
    result = module(input)
    assert {tensor.dtype for tensor in (result[0], *leaves(result[1]))} == {dtype}
    assert_close_to_float64(result, stock.double()(input.double()), dtype)


@every_kind
def test_autocast_gives_the_dtype_that_stock_gives(kind):
    stock = kind.stock(3, 7)
    input, _ = draw(stock, 4, 2)
    with torch.autocast(input.device.type, torch.bfloat16):
        expected, result = stock(input), ours(stock)(input)
    assert result[0].dtype == expected[0].dtype
    assert_close_to_float64(result, copy.deepcopy(stock).double()(input.double()), torch.bfloat16)


PARAMETRIZATIONS = {
    "weight_norm": lambda module: nn.utils.parametrizations.weight_norm(module, "weight_hh_l0"),
    "spectral_norm": lambda module: nn.utils.parametrizations.spectral_norm(module, "weight_ih_l0"),
    "old weight_norm": lambda module: _quietly(nn.utils.weight_norm, module, "weight_hh_l0"),
}


def _quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(*args)


@every_kind
@pytest.mark.parametrize("parametrize", PARAMETRIZATIONS.values(), ids=list(PARAMETRIZATIONS))
def test_parametrized_weights(kind, parametrize):
    stock = kind.stock(3, 7)
    module = ours(stock).eval()
    stock.eval()
    torch.manual_seed(0)
    parametrize(module)
    torch.manual_seed(0)
    parametrize(stock)
    input, _ = draw(stock, 4, 2)
    for _ in range(2):
        result, expected = module(input), stock(input)
        torch.testing.assert_close(result, expected)
        for a, b in zip(
            gradients(result, [*module.parameters()]), gradients(expected, [*stock.parameters()]), strict=True
        ):
            torch.testing.assert_close(a, b)
        with torch.no_grad():  # The second round computes the weights anew.
            for parameter in [*module.parameters(), *stock.parameters()]:
                parameter.mul_(1.5)


@every_kind
def test_weights_set_as_plain_tensors(kind):
    """As AWD-LSTM's weight drop: the parameter is renamed, and each forward sets what is left of it."""
    stock = kind.stock(3, 7)
    module = ours(stock)
    raw = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    input, _ = draw(stock, 4, 2)
    for keep in (0.5, 0.25):
        module.weight_hh_l0 = raw * keep
        with torch.no_grad():
            expected = copy.deepcopy(stock)
            expected.weight_hh_l0.mul_(keep)
        result, oracle = module(input), expected(input)
        torch.testing.assert_close(result, oracle)
        (gradient,) = gradients(result, [raw])
        (oracle_gradient,) = gradients(oracle, [expected.weight_hh_l0])
        torch.testing.assert_close(gradient, oracle_gradient * keep)
    del module.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        module(input)


@every_kind
def test_reads_the_weights_of_the_moment(kind):
    stock = kind.stock(3, 7)
    module = ours(stock)
    input, _ = draw(stock, 4, 2)

    def agree():
        torch.testing.assert_close(module(input), stock(input))

    with torch.inference_mode():
        agree()
    new = torch.randn_like(stock.weight_hh_l0)
    for each in (stock, module):
        each.weight_hh_l0.data.copy_(new)  # Unseen by _version.
    agree()
    for each in (stock, module):
        each.weight_ih_l0.data = new.clone()[:, :3]  # Other memory, not contiguous.
    agree()
    for each in (stock, module):
        each.weight_hh_l0 = nn.Parameter(new / 2)
    agree()
    for each in (stock, module):
        setattr(each, "weight_hh_l0", nn.Parameter(new / 3))  # noqa: B010
        each._parameters["bias_ih_l0"] = nn.Parameter(torch.ones_like(each.bias_ih_l0))
    agree()


@every_kind
def test_weights_shared_with_a_cell(kind):
    module = ours(kind.stock(3, 7))
    cell = kind.stock_cell(3, 7)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data = getattr(module, f"{name}_l0").data
    with torch.no_grad():
        cell.weight_hh.mul_(2)
    input, hx = draw(module, 1, 2)
    step = cell(input[0], tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0])
    torch.testing.assert_close(module(input, hx)[0][0], leaves(step)[0])


@every_kind
def test_functional_call(kind):
    stock = kind.stock(3, 7)
    module = ours(stock)
    input, _ = draw(stock, 4, 2)
    other = {name: torch.randn_like(value, requires_grad=True) for name, value in stock.named_parameters()}
    before = module(input)
    result, expected = (torch.func.functional_call(m, other, (input,)) for m in (module, stock))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradients(result, [*other.values()]), gradients(expected, [*other.values()]))
    assert_same_bits(module(input), before)


def test_states_as_a_list():
    stock = nn.LSTM(3, 7)
    input, hx = draw(stock, 4, 2)
    assert_same_bits(ours(stock)(input, list(hx)), ours(stock)(input, hx))


@every_kind
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "batch_first": True}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_states_are_nobody_elses_memory(kind, steps, options, training):
    """Beam searches write into the states they got; nothing else may see it, the backward included."""
    module = ours(kind.stock(3, 7, **options))
    input, hx = draw(module, steps, 1)
    with torch.set_grad_enabled(training):
        output, state = module(input, hx)
    kept = output.detach().clone()
    expected = gradients(module(input, hx)[0], [input, *leaves(hx), *module.parameters()])
    with torch.no_grad():
        for tensor in leaves(state):
            tensor.fill_(float("nan"))
    assert_same_bits(output.detach(), kept)
    assert all(tensor.isfinite().all() for tensor in (input, *leaves(hx)))
    if training:
        assert_same_bits(gradients(output, [input, *leaves(hx), *module.parameters()]), expected)


@every_kind
def test_fine_tuning_with_frozen_layers(kind):
    stock = kind.stock(3, 7, num_layers=2)
    module = ours(stock)
    for each in (stock, module):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name.endswith("_l1") and "weight" in name)
    input, _ = draw(stock, 4, 2)
    input = input.detach()
    for each in (stock, module):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(input)[0].square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dict(module.named_parameters()), dict(stock.named_parameters()))


BAD_CALLS = {
    "rank 4": lambda m, x, h: m(x[None], h),
    "rank 1": lambda m, x, h: m(x[0, 0]),
    "input size": lambda m, x, h: m(x[..., :2], h),
    "dtype": lambda m, x, h: m(x.double()),
    "integers": lambda m, x, h: m(x.long()),
    "batch of the state": lambda m, x, h: m(x, _of(h, lambda s: s[:, :1])),
    "layers of the state": lambda m, x, h: m(x, _of(h, lambda s: s.repeat(2, 1, 1))),
    "size of the state": lambda m, x, h: m(x, _of(h, lambda s: s[..., :3])),
    "rank of the state": lambda m, x, h: m(x, _of(h, lambda s: s[0])),
    "batched state of an unbatched input": lambda m, x, h: m(x[:, 0], h),
}


def _of(hx, function):
    return tuple(function(s) for s in hx) if isinstance(hx, tuple) else function(hx)


@every_kind
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_refuses_what_stock_refuses(kind, call):
    stock = kind.stock(3, 7)
    input, hx = draw(stock, 4, 2)
    with pytest.raises((ValueError, RuntimeError, TypeError)) as expected:
        call(stock, input, hx)
    # Sizes that stock refuses with a RuntimeError are a ValueError here.
    with pytest.raises((expected.type, ValueError), match=r": expected .* got "):
        call(ours(stock), input, hx)


@every_kind
def test_refuses_packed_sequences_that_do_not_fit(kind):
    """torch.nn.LSTM reads past the end of these."""
    module = ours(kind.stock(3, 7))
    input, hx = draw(module, 4, 2)
    with pytest.raises(ValueError, match=r"input: expected last dimension 3 .* got \[4, 2\]"):
        module(pack_sequence([input[:, 0, :2]]))
    with pytest.raises(ValueError, match=r"(h_0|hx): expected \[1, 1, 7\].* got \[1, 2, 7\]"):
        module(pack_sequence([input[:, 0]]), hx)
    with pytest.raises(ValueError, match="lengths: expected None beside a PackedSequence"):
        module(pack_sequence([input[:, 0]]), lengths=torch.tensor([4]))


def test_constructors_refuse_what_stock_refuses():
    for arguments in ((torch.tensor(3), 7), (0, 7), (3, 7, 0), (3, 7, 1, 1)):
        with pytest.raises((TypeError, ValueError)) as expected:
            nn.LSTM(*arguments)
        with pytest.raises(expected.type, match=expected.value.args[0][:20]):
            fast.LSTM(*arguments)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(kind, training):
    module = ours(kind.stock(3, 7, num_layers=2))
    input, hx = draw(module, 4, 2)
    # torch.compile refuses any torch.nn.LSTM, GRU and RNN, subclasses included, unless told so.
    with torch._dynamo.config.patch(allow_rnn=True), torch.set_grad_enabled(training):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        result = compiled(input, hx)
    assert_same_bits(result, module(input, hx))
    if training:
        wanted = [input, *leaves(hx), *module.parameters()]
        assert_same_bits(gradients(result, wanted), gradients(module(input, hx), wanted))


@every_kind
def test_exports(kind):
    module = ours(kind.stock(3, 7, batch_first=True)).eval()
    input, _ = draw(module, 4, 2)
    program = torch.export.export(module, (input.detach(),))
    assert_same_bits(program.module()(input.detach()), module(input.detach()))
