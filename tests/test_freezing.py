"""The inference scope in which weights are packed once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import seqattn_kernels.nn as fast
from seqattn_kernels import native
from seqattn_kernels.accelerate import accelerate, restore
from seqattn_kernels.nn import freeze, frozen, unfreeze
from tests.cases import KINDS
from tests.compare import assert_close_to_float64, assert_same_bits, gradients

pytestmark = pytest.mark.usefixtures("device")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


class Tagger(nn.Module):
    """A sequence module, a cell and a module of another sort."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.encoder = kind.stock(5, 33, num_layers=2, bidirectional=True)
        self.cell = kind.stock_cell(66, 7)

    def forward(self, tokens):
        state, states = None, []
        for step in self.encoder(self.embed(tokens.to(self.embed.weight.device)))[0]:
            state = self.cell(step, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states)


tokens = torch.arange(12).reshape(4, 3) % 11
change = pytest.raises(RuntimeError, match="frozen")


@pytest.fixture
def model(device: torch.device) -> nn.Module:
    return accelerate(Tagger(KINDS["lstm"]))


@every_kind
def test_computes_the_same(kind):
    model = accelerate(Tagger(kind))
    oracle = copy.deepcopy(model).double()(tokens)
    with frozen(model) as same, torch.inference_mode():
        assert same is model
        first, second = model(tokens), model(tokens)
    assert_close_to_float64(first, oracle)
    assert_same_bits(first, second)
    assert "_frozen" not in vars(model.encoder)
    assert vars(model.cell).keys() == vars(restore(copy.deepcopy(model)).cell).keys() | {"_accelerated_from"}


@every_kind
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_cells_compute_the_same(kind, batch):
    stock = kind.stock_cell(16, 33)
    cell = accelerate(copy.deepcopy(stock))
    input = torch.randn(batch, 16)
    state = kind.state(batch, 33)
    with frozen(cell), torch.no_grad():
        result = cell(input, state)
    double = tuple(s.double() for s in state) if isinstance(state, tuple) else state.double()
    assert_close_to_float64(result, stock.double()(input.double(), double))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"bias": False}, {"num_layers": 3, "bidirectional": True}], ids=str)
def test_sequences_of_other_dtypes(kind, dtype, options):
    module = accelerate(kind.stock(3, 17, **options)).to(dtype)
    input = torch.randn(5, 2, 3, dtype=dtype)
    lengths = torch.tensor([5, 2])
    exact = copy.deepcopy(module).double()
    with frozen(module), torch.no_grad():
        assert_close_to_float64(module(input), exact(input.double()))
        assert_close_to_float64(module(input, lengths=lengths), exact(input.double(), lengths=lengths))


def test_projections():
    module = accelerate(nn.LSTM(3, 17, proj_size=5, num_layers=2))
    input = torch.randn(5, 2, 3)
    with frozen(module), torch.no_grad():
        assert_close_to_float64(module(input), copy.deepcopy(module).double()(input.double()))


@every_kind
def test_without_the_native_kernels(kind, monkeypatch):
    monkeypatch.setattr(native, "_why_not", "not compiled")
    monkeypatch.setattr(native, "extension", None)
    model = accelerate(Tagger(kind))
    with frozen(model), torch.no_grad():
        assert model.encoder._frozen.packed is None
        assert_close_to_float64(model(tokens), copy.deepcopy(model).double()(tokens))
        with change:
            model.half()


@every_kind
def test_gradients_of_inputs(kind):
    module = accelerate(kind.stock(5, 33)).requires_grad_(False)
    input = torch.randn(4, 3, 5, requires_grad=True)
    expected = gradients(module(input), [input])
    with frozen(module):
        torch.testing.assert_close(gradients(module(input), [input]), expected)


def test_weights_are_packed_once(model, monkeypatch):
    calls = []
    pack = fast.LSTMCell._pack_weights
    monkeypatch.setattr(fast.LSTMCell, "_pack_weights", lambda self, weights: calls.append(self) or pack(self, weights))
    with frozen(model), torch.no_grad():
        for _ in range(3):
            model(tokens)
        with frozen(model):
            model(tokens)
    assert calls == [model.cell]


def test_a_training_forward_is_refused(model):
    with frozen(model):
        with pytest.raises(RuntimeError, match="gradients would be recorded"):
            model(tokens)
        with torch.no_grad():
            model(tokens)
    model(tokens).sum().backward()


CHANGES = {
    "assignment": lambda m: setattr(m.cell, "weight_hh", nn.Parameter(torch.zeros(28, 7))),
    "assignment of a plain tensor": lambda m: setattr(m.encoder, "weight_hh_l0", torch.zeros(132, 33)),
    "deletion": lambda m: delattr(m.encoder, "bias_ih_l1_reverse"),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "half": lambda m: m.half(),
    "to": lambda m: m.encoder.to(torch.float64),
    "to_empty": lambda m: m.to_empty(device="cpu"),
}


@pytest.mark.parametrize("change_weights", CHANGES.values(), ids=list(CHANGES))
def test_a_change_raises_when_made(model, change_weights):
    with frozen(model), change:
        change_weights(model)


LATE_CHANGES = {
    "in place": lambda m: m.cell.weight_hh.add_(1),
    "registered": lambda m: m.cell.register_parameter("bias_ih", nn.Parameter(torch.zeros(28))),
    "other memory": lambda m: setattr(m.encoder.weight_hh_l1, "data", torch.zeros(132, 33)),
    "in the dict": lambda m: m.encoder._parameters.update(bias_hh_l0=nn.Parameter(torch.zeros(132))),
    "there and back": lambda m: _there_and_back(m.cell.weight_ih),
}


def _there_and_back(weight):
    weight.data = weight.data.half()
    weight.data = weight.data.float().mul_(2)


@pytest.mark.parametrize("change_weights", LATE_CHANGES.values(), ids=list(LATE_CHANGES))
def test_a_change_raises_at_the_next_forward(model, change_weights):
    with frozen(model), torch.no_grad():
        change_weights(model)
        with change:
            model(tokens)
        with change, frozen(model):
            pass
    with torch.no_grad():
        model(tokens)


def test_an_optimizer_step_raises_at_the_next_forward(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens).sum().backward()
    with frozen(model), torch.no_grad():
        optimizer.step()
        with change:
            model(tokens)


def test_other_weights_by_functional_call_are_refused(model):
    weights = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    with frozen(model), torch.no_grad(), change:
        torch.func.functional_call(model, weights, (tokens,))


def test_conversions_that_change_nothing_are_welcome(model):
    with frozen(model), torch.no_grad():
        model.to(model.cell.weight_hh.device).float().eval().requires_grad_(False)
        model(tokens)


def test_scopes_nest_and_end_with_exceptions(model):
    with frozen(model):
        with pytest.raises(KeyError), frozen(model.cell):
            raise KeyError
        with change:
            model.cell.weight_hh = nn.Parameter(torch.zeros(28, 7))
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    model.cell.weight_hh = nn.Parameter(torch.zeros(28, 7))
    model(tokens).sum().backward()


def test_scopes_end_in_any_order(model):
    outer, inner = frozen(model), frozen(model)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with change:
        model.half()
    inner.__exit__(None, None, None)
    assert model.float().cell._frozen is None


def test_freeze_lasts_until_unfreeze(model):
    assert freeze(freeze(model)) is model
    with frozen(model):
        pass
    with change:
        model.load_state_dict(model.state_dict())
    assert unfreeze(model) is model
    model.load_state_dict(model.state_dict())
    model(tokens).sum().backward()
    unfreeze(model)


def test_accelerate_freezes_and_restore_releases():
    model = accelerate(Tagger(KINDS["gru"]), frozen=True)
    with change:
        model(tokens)
    with frozen(model):
        restore(model)
    assert "_frozen" not in vars(model.encoder)
    model(tokens).sum().backward()


def test_copies_are_not_frozen(model):
    with frozen(model), torch.no_grad():
        expected = model(tokens)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in copies:
            other.cell.weight_hh = other.cell.weight_hh
            assert_close_to_float64(other.double()(tokens), expected.double(), torch.float32)
    for other in copies:
        other(tokens).sum().backward()


def test_parametrized_weights(model):
    nn.utils.parametrizations.weight_norm(model.encoder, "weight_hh_l0")
    expected = copy.deepcopy(model).double()(tokens)
    with frozen(model), torch.no_grad():
        assert_close_to_float64(model(tokens), expected)
        with change:
            model.encoder.weight_hh_l0 = torch.zeros(132, 33)
        model.encoder.parametrizations.weight_hh_l0.original0.mul_(2)
        with change:
            model(tokens)
    with torch.no_grad():
        assert not torch.allclose(model(tokens).double(), expected)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        cell = fast.GRUCell(3, 7)
        input = torch.randn(2, 3)
        expected = cell(input)
        with frozen(cell):
            torch.testing.assert_close(cell(input), expected)


def test_a_compiled_graph_does_not_keep_packed_weights(model):
    compiled = torch.compile(model.cell, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 66)
    with torch.no_grad():
        with frozen(model):
            compiled(input)
        model.cell.weight_hh.mul_(3)
        torch.testing.assert_close(compiled(input), model.cell(input))


def test_a_failure_to_pack_leaves_nothing_frozen(model, monkeypatch):
    def fail(self, weights):
        raise MemoryError

    monkeypatch.setattr(fast.LSTMCell, "_pack_weights", fail)
    with pytest.raises(MemoryError), frozen(model):
        pass
    assert model.encoder._frozen is None
