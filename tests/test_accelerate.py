"""accelerate(), restore(), report() and the registry."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import seqattn_kernels.nn as fast
from seqattn_kernels.accelerate import accelerate, register_replacement, registry, report, restore
from tests.cases import KINDS
from tests.compare import assert_close_to_float64, assert_same_bits, gradients

pytestmark = pytest.mark.usefixtures("device")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


class Translator(nn.Module):
    """An encoder and a decoder as tutorials write them, with the encoder shared."""

    def __init__(self, kind=KINDS["gru"]):
        super().__init__()
        self.embed = nn.Embedding(13, 5)
        self.blocks = nn.ModuleDict({"source": nn.ModuleList([kind.stock(5, 7, bidirectional=True)])})
        self.decoder = kind.stock_cell(14, 9)
        self.again = self.blocks["source"][0]
        self.head = nn.Linear(9, 13)

    def forward(self, tokens):
        encoded, _ = self.blocks["source"][0](self.embed(tokens.to(self.embed.weight.device)))
        state, states = None, []
        for step in encoded:
            state = self.decoder(step, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(states))


tokens = torch.arange(12).reshape(4, 3) % 13


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def snapshot(model: nn.Module):
    """Everything by which one could tell that a model was changed."""
    return [
        (id(module), type(module), dict(vars(module)), {n: id(p) for n, p in module.named_parameters()})
        for module in model.modules()
    ]


@pytest.fixture
def table():
    """The registry, put back after the test."""
    replacements, refusals = dict(registry._replacements), list(registry._refusals)
    yield
    registry._replacements.clear()
    registry._replacements.update(replacements)
    registry._refusals[:] = refusals


@every_kind
def test_replaces_at_any_depth_and_restores_exactly(kind):
    model = Translator(kind)
    before, expected = snapshot(model), model(tokens)
    assert accelerate(model) is model
    assert type(model.blocks["source"][0]) is getattr(fast, kind.module.__name__)
    assert model.again is model.blocks["source"][0]
    assert type(model.decoder) is getattr(fast, kind.cell.__name__)
    torch.testing.assert_close(model(tokens), expected)
    accelerated = snapshot(model)
    accelerate(model)
    assert snapshot(model) == accelerated
    assert restore(model) is model
    assert snapshot(model) == before
    assert_same_bits(model(tokens), expected)
    assert restore(model) is model
    assert snapshot(model) == before


@every_kind
def test_the_model_may_be_recurrent_itself(kind):
    for stock in (kind.stock(3, 7), kind.stock_cell(3, 7)):
        original = type(stock)
        assert accelerate(stock) is stock
        assert isinstance(stock, original)
        assert type(stock) is not original
        assert type(restore(stock)) is original


def test_an_optimizer_made_before_goes_on():
    torch.manual_seed(0)
    stock = Translator()
    model = copy.deepcopy(stock)
    losses = {}
    for each in (stock, model):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.01)
        losses[each] = []
        for step in range(8):
            if each is model and step == 3:
                accelerate(model)
            if each is model and step == 6:
                restore(model)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(each(tokens).flatten(0, 1), tokens.flatten().to(each.head.weight.device))
            loss.backward()
            optimizer.step()
            losses[each].append(loss.item())
    assert losses[model] == pytest.approx(losses[stock], rel=1e-4)
    assert losses[model][-1] < losses[model][0]


def test_a_model_that_holds_a_graph():
    """As many do after a training step: deepcopy refuses it."""
    model = Translator()
    model.last = model(tokens)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    accelerate(model)
    torch.testing.assert_close(model(tokens), model.last)


def test_state_dicts_and_names_stay():
    model = Translator()
    names, repr_before = list(model.state_dict()), repr(model)
    accelerate(model)
    assert list(model.state_dict()) == names
    assert repr(model) == repr_before
    fresh = Translator()
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(fresh.state_dict(), strict=True)


def test_copies_of_an_accelerated_model():
    model = accelerate(Translator())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model)
        assert_same_bits(other(tokens), model(tokens))
        assert classes(restore(other)) == classes(Translator())
        assert classes(model) != classes(other)


def test_hooks_go_on():
    model = Translator()
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.decoder.register_forward_hook(lambda module, args, result: result * 2)
    model.again.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    expected = model(tokens)
    accelerate(model)
    result = model(tokens)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert seen == ["before"] * 8 + ["backward"]


@every_kind
def test_parametrized_modules(kind):
    stock = kind.stock(3, 7)
    nn.utils.parametrizations.weight_norm(stock, "weight_hh_l0")
    other = copy.deepcopy(stock)
    input = torch.randn(4, 2, 3)
    wanted = [*stock.parameters()]
    expected = stock(input)
    parametrized, before = type(stock), snapshot(stock)
    accelerate(stock)
    assert isinstance(stock, getattr(fast, kind.module.__name__))
    assert type(other) is parametrized
    assert [*stock.parameters()] == wanted
    result = stock(input)
    torch.testing.assert_close(result, expected)
    double = copy.deepcopy(other).double()
    oracle = gradients(double(input.double()), [*double.parameters()])
    assert_close_to_float64(gradients(result, wanted), oracle)
    copied = accelerate(other)
    assert type(copy.deepcopy(copied)) is type(copied)
    assert_same_bits(copy.deepcopy(copied)(input), result)
    restore(stock)
    assert snapshot(stock) == before
    assert_same_bits(stock(input), expected)


def test_parametrizations_may_come_and_go_in_between():
    input = torch.randn(4, 2, 3)
    model = nn.LSTM(3, 7)
    nn.utils.parametrizations.weight_norm(model, "weight_hh_l0")
    expected = model(input)
    accelerate(model)
    nn.utils.parametrizations.weight_norm(model, "weight_ih_l0")
    torch.testing.assert_close(model(input), expected)
    restore(model)
    assert not isinstance(model, fast.LSTM)
    torch.testing.assert_close(model(input), expected)
    accelerate(model)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        nn.utils.parametrize.remove_parametrizations(model, name)
    assert type(model) is fast.LSTM
    torch.testing.assert_close(model(input), expected)
    assert type(restore(model)) is nn.LSTM
    torch.testing.assert_close(model(input), expected)
    accelerate(model)
    nn.utils.parametrizations.weight_norm(model, "weight_hh_l0")
    restore(model)
    assert nn.utils.parametrize.type_before_parametrizations(model) is nn.LSTM
    torch.testing.assert_close(model(input), expected)


class Named(nn.LSTM):
    """A subclass that leaves forward alone."""

    def __init__(self, size):
        super().__init__(size, size, batch_first=True)

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def last(self, input):
        return self(input)[0][:, -1]


class Reversing(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input.flip(0), hx)


class Checking(nn.GRU):
    def check_input(self, input, batch_sizes):
        raise ValueError("never")


def test_subclasses_that_leave_forward_alone():
    model = nn.Sequential(Named(5))
    before, input = snapshot(model), torch.randn(2, 3, 5)
    expected = model[0].last(input)
    accelerate(model)
    assert isinstance(model[0], Named)
    assert isinstance(model[0], fast.LSTM)
    torch.testing.assert_close(model[0].last(input), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        assert_same_bits(other[0].last(input), model[0].last(input))
        assert type(restore(other)[0]) is Named
    restore(model)
    assert snapshot(model) == before


def refused(module: nn.Module) -> str:
    """Why accelerate leaves ``module`` alone; it must."""
    model = nn.ModuleDict({"child": module})
    before = snapshot(model)
    accelerate(model)
    assert snapshot(model) == before
    (row,) = (row for row in report(model).rows if row.name == "child")
    assert row.replaced_by is None
    return row.reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_refuses_with_a_reason():
    assert refused(Reversing(3, 7)) == "Reversing overrides forward"
    assert refused(Checking(3, 7)) == "Checking overrides check_input"
    patched = nn.LSTM(3, 7)
    patched.forward = lambda input: input
    assert refused(patched) == "its forward was replaced on the instance"
    assert "TorchScript" in refused(torch.jit.script(nn.LSTM(3, 7)))
    assert "TorchScript" in refused(torch.jit.trace(nn.GRU(3, 7), torch.randn(4, 2, 3)))


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_refuses_quantized_modules():
    model = nn.Sequential(nn.LSTM(3, 7), nn.GRUCell(3, 7))
    for module in torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8):
        assert "quantized" in refused(module)


def test_refuses_weights_that_are_not_plain_tensors():
    class Sharded(nn.Parameter):
        pass

    module = nn.GRU(3, 7)
    module._parameters["weight_hh_l0"] = Sharded(module.weight_hh_l0.detach())
    assert refused(module) == "weight_hh_l0 is a Sharded"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inside_scripted_models():
    model = torch.jit.script(nn.Sequential(nn.LSTM(3, 7)))
    assert accelerate(model) is model
    assert [row.name for row in report(model).rows] == ["0"]
    assert restore(model) is model


def test_data_parallel_wrappers():
    model = accelerate(nn.DataParallel(Translator()))
    assert type(model.module.decoder) is fast.GRUCell


@pytest.fixture
def process_group(tmp_path):
    """torch.distributed with this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.cpu
def test_distributed_data_parallel(process_group):
    model = Translator()
    expected = model(tokens)
    for wrapped in (
        nn.parallel.DistributedDataParallel(accelerate(copy.deepcopy(model))),
        accelerate(nn.parallel.DistributedDataParallel(copy.deepcopy(model))),
    ):
        assert type(wrapped.module.decoder) is fast.GRUCell
        result = wrapped(tokens)
        torch.testing.assert_close(result, expected)
        wanted = dict(model.named_parameters())
        gradient = dict(
            zip(wanted, torch.autograd.grad(expected.sum(), [*wanted.values()], retain_graph=True), strict=True)
        )
        result.sum().backward()
        torch.testing.assert_close({n: p.grad for n, p in wrapped.module.named_parameters()}, gradient)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp_wraps_after_and_not_before(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = Translator()
    expected = model(tokens)

    def fsdp2(model):
        for module in (model.again, model.decoder, model):
            fully_shard(module, mesh=mesh)
        return model

    for wrap in (fsdp2, lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"))):
        before = wrap(copy.deepcopy(model))
        accelerate(before)
        assert {row.reason for row in report(before).rows} == {
            "it is sharded by FSDP: accelerate the model before wrapping it"
        }
        torch.testing.assert_close(before(tokens), expected)
        after = wrap(accelerate(copy.deepcopy(model)))
        assert sum(isinstance(module, (fast.GRU, fast.GRUCell)) for module in after.modules()) == 2
        torch.testing.assert_close(after(tokens), expected)
        after(tokens).sum().backward()
        if wrap is fsdp2:
            with pytest.raises(RuntimeError, match=r"FSDPGRU.*: the class was changed after accelerate"):
                restore(after)
            torch.testing.assert_close(after(tokens), expected)


def test_compiled_models():
    model = Translator()
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(tokens)
    assert accelerate(compiled) is compiled
    assert type(model.decoder) is fast.GRUCell
    torch.testing.assert_close(compiled(tokens), expected)
    restore(compiled)
    assert type(model.decoder) is nn.GRUCell
    torch.testing.assert_close(compiled(tokens), expected)


def test_the_packages_own_modules_stay():
    model = nn.ModuleList([fast.LSTM(3, 7), nn.GRU(3, 7)])
    accelerate(model)
    restore(model)
    assert classes(model)[1:] == [fast.LSTM, nn.GRU]


@pytest.mark.parametrize("function", [accelerate, restore])
def test_refuses_what_is_no_module(function):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        function([nn.LSTM(3, 7)])


class Attentive(nn.Module):
    """Somebody's class, and what they made to replace it."""

    def __init__(self, cell=None):
        super().__init__()
        self.cell = cell or nn.GRUCell(3, 7)

    def forward(self, input):
        return self.cell(input)


class FastAttentive(Attentive):
    pass


class Elsewhere(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, input):
        return self.cell(input)


def test_a_class_for_a_class(table):
    register_replacement(Attentive, FastAttentive)
    model = nn.Sequential(Attentive())
    before = snapshot(model)
    accelerate(model)
    assert type(model[0]) is FastAttentive
    assert type(model[0].cell) is fast.GRUCell
    restore(model)
    assert snapshot(model) == before


def test_a_function_for_a_class(table):
    @register_replacement(Attentive)
    def elsewhere(module):
        return Elsewhere(module.cell)

    model = nn.ModuleDict({"a": Attentive(), "b": nn.Sequential(nn.LSTM(3, 7))}).eval()
    model["c"] = model["a"]
    before, expected = snapshot(model), model["a"](torch.ones(1, 3))
    names = list(model.state_dict())
    accelerate(model)
    assert type(model["a"]) is Elsewhere
    assert model["c"] is model["a"]
    assert not model["a"].training
    assert list(model.state_dict()) == names
    assert_same_bits(model["a"](torch.ones(1, 3)), expected)
    accelerated = snapshot(model)
    accelerate(model)
    assert snapshot(model) == accelerated
    rows = {row.name: row.replaced_by for row in report(model).rows}
    assert rows == {"a": f"{__name__}.Elsewhere", "b.0": "seqattn_kernels.nn.LSTM"}
    other = copy.deepcopy(model)
    restore(model)
    assert snapshot(model) == before
    assert type(restore(other)["a"]) is Attentive
    assert list(other.state_dict()) == names


def test_a_function_for_the_model_itself(table):
    register_replacement(Attentive)(lambda module: Elsewhere(module.cell))
    model = Attentive()
    new = accelerate(model)
    assert type(new) is Elsewhere
    assert restore(new) is model


def test_a_function_must_return_a_module(table):
    register_replacement(Attentive)(lambda module: None)
    with pytest.raises(TypeError, match=r"replacement of Attentive: expected a torch.nn.Module, got NoneType"):
        accelerate(Attentive())


def test_a_function_leaves_modules_with_hooks(table):
    register_replacement(Attentive)(lambda module: Elsewhere(module.cell))
    module = Attentive()
    handle = module.register_forward_hook(lambda *_: None)
    assert "hooks" in report(module).rows[0].reason
    assert accelerate(module) is module
    handle.remove()
    assert type(accelerate(module)) is Elsewhere


def test_a_registration_may_object(table):
    register_replacement(Attentive, FastAttentive, why_not=lambda module: "it is too wide" if module.wide else None)
    module = Attentive()
    module.wide = True
    assert report(module).rows[0].reason == "it is too wide"
    module.wide = False
    assert type(accelerate(module)) is FastAttentive


def test_subclasses_of_what_a_function_replaces_stay(table):
    register_replacement(Attentive)(lambda module: Elsewhere(module.cell))
    assert "subclass of Attentive" in report(FastAttentive()).rows[0].reason


@pytest.mark.parametrize(("original", "by", "name"), [("LSTM", None, "original"), (nn.LSTM, print, "by")])
def test_the_registry_takes_classes(table, original, by, name):
    with pytest.raises(TypeError, match=f"{name}: expected a subclass of torch.nn.Module"):
        register_replacement(original, by)


def test_report_before_and_after(capsys):
    model = nn.ModuleDict({"encoder": nn.LSTM(3, 7), "odd": Reversing(3, 7), "head": nn.Linear(7, 2)})
    rows = report(model).rows
    assert [(row.name, row.replaced_by) for row in rows] == [("encoder", None), ("odd", None)]
    assert rows[0].reason.startswith("not yet")
    accelerate(model, verbose=True)
    printed = capsys.readouterr().out
    width = len(f"{__name__}.Reversing")
    assert str(report(model)).splitlines() == [
        "1 of 2 recurrent modules replaced",
        f"module   {'class':{width}}  replaced by, or why not",
        f"encoder  {'torch.nn.LSTM':{width}}  seqattn_kernels.nn.LSTM",
        f"odd      {__name__}.Reversing  no: Reversing overrides forward",
    ]
    for text in ("encoder", "seqattn_kernels.nn.LSTM", "Reversing overrides forward", "1 of 2"):
        assert text in printed
    assert str(report(nn.Linear(2, 2))) == "no recurrent modules to replace"


def test_report_names_parametrized_classes():
    model = nn.utils.parametrizations.weight_norm(nn.GRU(3, 7), "weight_hh_l0")
    for each in (model, accelerate(model)):
        assert report(each).rows[0].original == "torch.nn.GRU, parametrized"
