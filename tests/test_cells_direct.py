"""A cell's step past torch's dispatcher: the same bits, and not where something could tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import seqattn_kernels.nn as fast
from seqattn_kernels import frozen, functional, native, ops
from tests.cases import KINDS, RecurrentKind
from tests.compare import assert_same_bits, gradients

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(native.extension is None, reason="needs the compiled kernels"),
    pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch is too old for it"),
]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
direct = ops.recurrence.direct_step


def draw(kind: RecurrentKind, sizes: tuple[int, int, int] = (2, 3, 7), bias: bool = True, **options: Any) -> Any:
    """input, h, c and weights of a step."""
    B, I, H = sizes
    stock = kind.stock_cell(I, H, bias=bias, **options)
    c = torch.randn(B, H, **options) if kind.has_cell_state else None
    return torch.randn(B, I, **options), torch.randn(B, H, **options), c, [w.detach() for w in stock.parameters()]


def module_of(kind: RecurrentKind, I: int = 3, H: int = 7) -> nn.RNNCellBase:
    stock = kind.stock_cell(I, H)
    stock.__class__ = getattr(fast, type(stock).__name__)
    return stock


def state_of(kind: RecurrentKind, h: Tensor, c: Tensor | None) -> Any:
    return (h, c) if kind.has_cell_state else h


class Spy:
    """Which calls of `name` in ops.recurrence were served."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.served: list[bool] = []
        original = getattr(ops.recurrence, name)

        def call(*arguments: Any) -> Any:
            result = original(*arguments)
            self.served.append(result is not None)
            return result

        monkeypatch.setattr(ops.recurrence, name, call)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 63, 65), (2, 3, 63), (17, 63, 3), (33, 16, 17)], ids=str)
def test_same_bits_as_the_operators(kind, dtype, bias, sizes, threads):
    x, *states, weights = draw(kind, sizes, bias, dtype=dtype)
    number = ops.recurrence.CELLS.index(kind.name)
    for h, c in (states, (None, None)):
        expected = torch.ops.seqattn.cell_fwd(number, x, h, c, weights, [], bias, True)
        assert_same_bits(direct(kind.name, True, None, x, h, c, *weights), tuple(expected))
        assert_same_bits(direct(kind.name, False, None, x, h, c, *weights), tuple(expected[:-1]))
        d_h, d_c = torch.randn_like(expected[0]), None if c is None else torch.randn_like(c)
        for needs in ((True, True), (False, True), (True, False)):
            with torch.no_grad():
                found = ops.recurrence.direct_step_backward(
                    kind.name, x, h, c, weights, expected[-1], (d_h, d_c), needs
                )
            arguments = number, x, h, c, weights, bias, expected[-1], d_h, d_c, *needs
            assert_same_bits(found, tuple(torch.ops.seqattn.cell_bwd(*arguments)))


@every_kind
def test_packed_weights(kind):
    module = module_of(kind, 16, 33)
    x, h, c = torch.randn(4, 16), torch.randn(4, 33), torch.randn(4, 33) if kind.has_cell_state else None
    with frozen(module), torch.no_grad():
        weights, packed = module._weights()
        number = ops.recurrence.CELLS.index(kind.name)
        expected = torch.ops.seqattn.cell_fwd(number, x, h, c, weights, packed, True, False)
        assert_same_bits(direct(kind.name, False, packed, x, h, c, *weights), tuple(expected))
        for wrong in ([packed[0][1:].clone()], [packed[0].double()], [packed[0].view(1, -1)]):
            assert direct(kind.name, False, wrong, x, h, c, *weights) is None


@every_kind
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext], ids=lambda c: c.__name__)
def test_serves_inference(kind, context, monkeypatch):
    spy = Spy(monkeypatch, "direct_step")
    module = module_of(kind).requires_grad_(context is not nullcontext)
    x, h, c, _ = draw(kind)
    with context():
        results = module(x, state_of(kind, h, c))
    assert spy.served == [True]
    for result in results if isinstance(results, tuple) else (results,):
        assert type(result) is Tensor
        assert not result.requires_grad
        assert result.is_inference() == (context is torch.inference_mode)
        with context():
            assert result.resize_(5, 5).shape == (5, 5)  # memory of its own, as any other tensor's


@every_kind
def test_serves_training(kind, monkeypatch):
    module = module_of(kind)
    x, h, c, _ = draw(kind)
    wanted = [*module.parameters()]
    forward, backward = Spy(monkeypatch, "direct_step"), Spy(monkeypatch, "direct_step_backward")
    found = gradients(module(x, state_of(kind, h, c)), wanted)
    assert forward.served == [False, True]  # first asked for a step without gradients
    assert backward.served == [True]
    monkeypatch.setattr(ops.recurrence, "direct_step", lambda *_: None)
    monkeypatch.setattr(ops.recurrence, "direct_step_backward", lambda *_: None)
    assert_same_bits(found, gradients(module(x, state_of(kind, h, c)), wanted))


class Subclass(Tensor):
    pass


def _shrunk(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


# Arguments that aren't as the kernels take them; `x`, then each of the others, is made so.
UNUSUAL: dict[str, Callable[[Tensor], Any]] = {
    "no tensor": lambda t: t.numpy(),
    "subclass": lambda t: t.as_subclass(Subclass),
    "strides": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
    "negated": lambda t: torch._neg_view(t),
    "rank": lambda t: t[None],
    "size": lambda t: t[..., 1:].clone(),
    "rows": lambda t: torch.cat([t, t]),
    "empty": lambda t: t[:0],
    "dtype": lambda t: t.double(),
    "half": lambda t: t.half(),
    "integers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "functional": torch._to_functional_tensor,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "no memory": _shrunk,
}


@every_kind
@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=list(UNUSUAL))
def test_leaves_unusual_arguments_to_the_operator(kind, unusual):
    x, h, c, weights = draw(kind)
    arguments = [x, h, c, *weights]
    states = direct(kind.name, True, None, *arguments)
    assert states is not None
    step_back, reserve = ops.recurrence.direct_step_backward, states[-1]
    with torch.no_grad():
        for place, argument in enumerate(arguments):
            if argument is None:
                continue
            changed = [*arguments]
            changed[place] = unusual(argument)
            assert direct(kind.name, False, None, *changed) is None
            assert step_back(kind.name, *changed[:3], changed[3:], reserve, (h, None), (True, True)) is None
        for given, d_h in ((unusual(reserve), h), (reserve, unusual(h))):
            assert step_back(kind.name, x, h, c, weights, given, (d_h, None), (True, True)) is None


def test_arguments_that_are_views_count():
    x, h, _, weights = draw(KINDS["gru"], (2, 3, 7))
    negated = functional.gru_cell(torch._neg_view(x), h, *weights)
    assert_same_bits(negated, functional.gru_cell(-x, h, *weights))
    imaginary = torch.complex(x[:1, :1], h[:1, :1]).conj().imag  # of one value, contiguous, its sign in a bit
    weights = [torch.randn(3, 1), torch.randn(3, 1)]
    assert_same_bits(functional.gru_cell(imaginary, None, *weights), functional.gru_cell(-h[:1, :1], None, *weights))


def test_biases_come_in_pairs():
    x, h, _, weights = draw(KINDS["gru"])
    assert direct("gru", False, None, x, h, None, *weights[:2], None, None) is not None
    for place in (2, 3):
        one = [*weights]
        one[place] = None
        assert direct("gru", False, None, x, h, None, *one) is None
        with pytest.raises(ValueError, match="b_ih, b_hh: expected both or neither"):
            functional.gru_cell(x, h, *one)


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("log", [DispatchLog, FunctionLog])
def test_modes_see_the_operators(log):
    module = module_of(KINDS["gru"])
    x, h, _, _ = draw(KINDS["gru"])
    expected = module(x, h)
    found = gradients(expected, [*module.parameters()])
    with torch.no_grad(), log() as seen:
        assert_same_bits(module(x, h), expected)
    assert "seqattn.cell_fwd.default" in seen.seen
    with log() as seen:
        result = module(x, h)
        assert_same_bits(gradients(result, [*module.parameters()]), found)
    assert {"seqattn.cell_fwd.default", "seqattn.cell_bwd.default"} <= {*seen.seen} or log is FunctionLog


def test_the_profiler_sees_the_operators():
    module = module_of(KINDS["lstm"])
    x, h, c, _ = draw(KINDS["lstm"])
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        module(x, (h, c))[0].sum().backward()
    assert {"seqattn::cell_fwd", "seqattn::cell_bwd"} <= {event.name for event in profile.function_events}


@every_kind
def test_a_trace_holds_the_operator(kind):
    module = module_of(kind).requires_grad_(False)
    x, h, c, _ = draw(kind)
    state = state_of(kind, h, c)
    traced = torch.jit.trace(module, (x, state), check_trace=False)
    assert_same_bits(traced(x + 1, state), module(x + 1, state))


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu"),
    "default device": lambda: torch.device("cpu"),
    "dispatch mode": DispatchLog,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=list(CONTEXTS))
def test_is_refused_under_a_mode(context):
    x, h, _, weights = draw(KINDS["gru"])
    with context():
        assert direct("gru", False, None, x, h, None, *weights) is None
    assert direct("gru", False, None, x, h, None, *weights) is not None


def test_is_refused_where_gradients_are_recorded():
    x, h, _, weights = draw(KINDS["gru"])
    for place in range(6):
        arguments = [x, h, None, *weights]
        if arguments[place] is None:
            continue
        arguments[place] = arguments[place].clone().requires_grad_()
        assert direct("gru", False, None, *arguments) is None
        with torch.no_grad():
            assert direct("gru", False, None, *arguments) is not None


@every_kind
def test_transforms(kind):
    module = module_of(kind).requires_grad_(False)
    x, h, c, _ = draw(kind)

    def loss(x: Tensor) -> Tensor:
        assert direct(kind.name, False, None, x.detach(), h, c, *module.parameters()) is None
        result = module(x, state_of(kind, h, c))
        return (result[0] if isinstance(result, tuple) else result).sum()

    leaf = x.clone().requires_grad_()
    result = module(leaf, state_of(kind, h, c))
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)


def test_keeps_no_memory():
    """A wrapper of handles that kept a reference would hold 90 MB, and have autograd copy what it could add to."""
    x, h, _, weights = draw(KINDS["gru"], (1, 128, 128))
    arguments = x, h, None, weights, direct("gru", True, None, x, h, None, *weights)[-1], (h, None), (True, True)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def repeat(count: int) -> None:
        for _ in range(count):
            ops.recurrence.direct_step_backward("gru", *arguments)

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    with torch.no_grad():
        repeat(20)
        before = resident()
        repeat(230)
    assert resident() - before < 2e7


def test_from_several_python_threads():
    module = module_of(KINDS["lstm"], 64, 65)
    inputs = [torch.randn(3, 64) for _ in range(40)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]

        def run(x: Tensor) -> Any:
            with torch.no_grad():
                return module(x)

        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for found, wanted in zip(pool.map(run, inputs), expected, strict=True):
                    assert_same_bits(found, wanted)


def test_wrong_calls():
    x, h, _, weights = draw(KINDS["gru"])
    extension = native.extension
    with pytest.raises(TypeError, match=r"cell_fwd: expected .* got 3 arguments"):
        extension.cell_fwd(2, False, None)
    with pytest.raises(TypeError, match=r"cell_bwd: expected .* got 0 arguments"):
        extension.cell_bwd()
    with pytest.raises(ValueError, match="cell: expected a number of the registry, got 9"):
        extension.cell_fwd(9, False, None, x, h, None, *weights)
    with pytest.raises(TypeError):
        extension.cell_fwd("gru", False, None, x, h, None, *weights)
    with pytest.raises(TypeError):
        extension.cell_connect(1, 2, 3, 4, 5)
    with pytest.raises(ValueError):
        extension.cell_connect((), (), None, None, object())


def test_an_older_torch_is_not_connected(monkeypatch):
    asked = []
    monkeypatch.setattr(native, "extension", SimpleNamespace(cell_connect=lambda *a: asked.append(a)))
    native._connect_cells()
    assert len(asked) == 1
    monkeypatch.delattr(torch._C, "_get_tracing_state")
    native._connect_cells()
    monkeypatch.setattr(native, "extension", None)
    native._connect_cells()
    assert len(asked) == 1
