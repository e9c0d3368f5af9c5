"""`seqattn compare`: a model of the user's, stock and accelerated, on the inputs it comes with."""

from __future__ import annotations

import copy
import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map

import seqattn_kernels as sk
from seqattn_kernels.cli.measure import Timing, peak_memory, time_in_turns

SEED = 0

# The largest difference allowed, as a share of the largest value of the tensor. What exceeds it still passes where the
# accelerated model is at most ERROR_RATIO times as far from float64 as stock is: then rounding is what differs.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ERROR_RATIO = 2.0
# A gradient far smaller than the model's largest is mostly rounding; it is measured against this share of the largest.
SMALLEST_GRADIENT = 1e-3


class FactoryError(Exception):
    """There is nothing to compare; the message says why."""


@dataclass(frozen=True)
class Difference:
    """How far the accelerated model is from stock in one kind of tensors, outputs or gradients, where it is farthest.

    absolute: the largest difference; relative: the same over the tensor's largest value; name: of that tensor.
    stock_error, our_error: the largest relative distances from a float64 copy of the model, None where there is none.
    """

    what: str
    name: str
    absolute: float
    relative: float
    tolerance: float
    stock_error: float | None = None
    our_error: float | None = None
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        if self.problem is not None:
            return False
        if self.relative <= self.tolerance:
            return True
        return self.our_error is not None and self.our_error <= ERROR_RATIO * (self.stock_error or 0)


@dataclass(frozen=True)
class Mode:
    """Times and peak extra memory (bytes of tensors) of one way to run the models; ratio: stock over accelerated."""

    name: str
    stock: Timing
    accelerated: Timing
    ratio: Timing
    stock_memory: int
    accelerated_memory: int

    @property
    def memory_ratio(self) -> float | None:
        return self.stock_memory / self.accelerated_memory if self.accelerated_memory else None


@dataclass
class Comparison:
    factory: str
    threads: int
    replaced: Any
    differences: list[Difference] = field(default_factory=list)
    modes: list[Mode] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return all(difference.agrees for difference in self.differences)


@dataclass(frozen=True)
class Case:
    """A model and the arguments to call it with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.model(*self.args, **self.kwargs)


def load_factory(path: str) -> Callable[[], Any]:
    """The function at `package.module:name`; FactoryError says what is wrong with the path."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise FactoryError(f"{path!r}: expected PKG.MODULE:FACTORY, such as mypackage.models:make_tagger")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # Importing runs the user's code: anything can come.
        raise FactoryError(f"{module_name}: can't be imported ({_describe(error)})") from error
    for part in name.split("."):
        if not hasattr(target, part):
            raise FactoryError(f"{path}: {module_name} has no {name!r}")
        target = getattr(target, part)
    if not callable(target):
        raise FactoryError(f"{path}: expected a function, got {type(target).__name__}")
    return target


def make_case(factory: Callable[[], Any], path: str) -> Case:
    """What the factory makes after seeding, checked."""
    torch.manual_seed(SEED)
    try:
        made = factory()
    except Exception as error:
        raise FactoryError(f"{path}: it raised {_describe(error)}") from error
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise FactoryError(f"{path}: expected (model, example_inputs), got {_kind(made)}")
    model, inputs = made
    if isinstance(inputs, (Tensor, PackedSequence)):
        return Case(model, (inputs,), {})
    if isinstance(inputs, (tuple, list)):
        return Case(model, tuple(inputs), {})
    if isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs):
        return Case(model, (), dict(inputs))
    raise FactoryError(
        f"{path}: example_inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"got {_kind(inputs)}"
    )


def make_pair(factory: Callable[[], Any], path: str) -> tuple[Case, Case]:
    """Two models with the same weights, each with its own copy of the first one's inputs."""
    first, second = make_case(factory, path), make_case(factory, path)
    model = second.model
    try:
        if model is first.model:
            model = copy.deepcopy(model)
        else:
            model.load_state_dict(first.model.state_dict())
    except Exception as error:
        raise FactoryError(f"{path}: its two models can't be given the same weights ({_describe(error)})") from error
    first, second = (Case(m, _copied(first.args), _copied(first.kwargs)) for m in (first.model, model))
    return first, second


def compare_models(path: str, *, train: bool, seconds: float, console: Console) -> Comparison:
    """Everything `seqattn compare` says of the factory at `path`. Raises FactoryError where there is nothing to say."""
    factory = load_factory(path)
    stock, ours = make_pair(factory, path)
    ours = Case(sk.accelerate(ours.model), ours.args, ours.kwargs)
    replaced = sk.report(ours.model)
    console.print(replaced)
    if not replaced.replaced:
        raise FactoryError(f"{path}: accelerate() replaces nothing in this model")
    exact, reason = _float64(factory, path, stock)
    comparison = Comparison(path, torch.get_num_threads(), replaced)
    if reason:
        comparison.notes.append(f"no float64 copy to measure errors against: {reason}")

    cases = [stock, ours, *([exact] if exact else [])]
    with console.status("Comparing outputs"):
        comparison.differences += _differences(("outputs",), _outputs, cases, path)
    if train and comparison.agrees:
        with console.status("Comparing gradients"):
            comparison.differences += _differences(("outputs in training", "gradients"), _gradients, cases, path)
    if any(difference.problem for difference in comparison.differences):
        comparison.notes.append("nothing was timed, since the accelerated model fails")
        return comparison

    tensors = tree_flatten((stock.args, stock.kwargs, list(stock.model.parameters())))[0]
    device = next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
    for case in (stock, ours):
        case.model.eval()
    with torch.inference_mode():
        comparison.modes.append(_mode("inference", stock, ours, seconds, device, console))
        with sk.frozen(ours.model):
            comparison.modes.append(_mode("frozen inference", stock, ours, seconds, device, console))
    if train:
        steps = [_training_step(case) for case in (stock, ours)]
        comparison.modes.append(_mode("training", steps[0], steps[1], seconds, device, console))
    return comparison


def _mode(
    name: str, stock: Callable[[], Any], ours: Callable[[], Any], seconds: float, device: torch.device, console: Console
) -> Mode:
    with console.status(f"Timing {name}"):
        times = time_in_turns(stock, ours, seconds)
        return Mode(name, *times, peak_memory(stock, device), peak_memory(ours, device))


def _training_step(case: Case) -> Callable[[], None]:
    """Forward and backward as a training step does them. Gradients are dropped after, so that none are added up."""
    case.model.train()
    directions: list[Tensor] = []

    def step() -> None:
        tensors = _differentiable(case())
        if not directions:
            directions.extend(_directions(tensors))
        torch.autograd.backward(tensors, directions)
        case.model.zero_grad(set_to_none=True)
        for tensor in _inputs(case).values():
            tensor.grad = None

    return step


Results = tuple[dict[str, Any], ...]


def _differences(
    what: tuple[str, ...], run: Callable[[Case], Results], cases: list[Case], path: str
) -> list[Difference]:
    """One for each kind of results that `run` gives. Every model meets the same random numbers."""
    results: list[Results] = []
    for case in cases:
        torch.manual_seed(SEED)
        try:
            results.append(run(case))
        except _NothingToDifferentiate as error:
            raise FactoryError(f"{path}: --train: {error}") from error
        except Exception as error:  # The user's model may raise anything.
            if case is cases[1]:
                return [Difference(what[0], "", 0.0, 0.0, 0.0, problem=f"accelerated, it raised {_describe(error)}")]
            if case is cases[0]:
                raise FactoryError(f"{path}: {_described_call(case)} raised {_describe(error)}") from error
    exact = results[2] if len(results) > 2 else None
    return [
        _difference(name, results[0][i], results[1][i], None if exact is None else exact[i])
        for i, name in enumerate(what)
    ]


def _outputs(case: Case) -> Results:
    case.model.eval()
    with torch.no_grad():
        return (_named(case()),)


class _NothingToDifferentiate(Exception):
    pass


def _differentiable(output: Any) -> list[Tensor]:
    tensors = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        raise _NothingToDifferentiate("no output depends on anything that requires a gradient")
    return tensors


def _directions(tensors: list[Tensor]) -> list[Tensor]:
    """Gradients to send back from the outputs: fixed random ones, so that each element counts with its own weight."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


def _gradients(case: Case) -> Results:
    """Outputs in training mode, and gradients of inputs and parameters by name."""
    case.model.train()
    case.model.zero_grad(set_to_none=True)
    output = case()
    tensors = _differentiable(output)
    torch.autograd.backward(tensors, _directions(tensors))
    named = [*_inputs(case).items(), *case.model.named_parameters()]
    return _named(output), {name: tensor.grad for name, tensor in named if tensor.grad is not None}


def _inputs(case: Case) -> dict[str, Tensor]:
    """The inputs that gradients are asked of."""
    leaves = tree_flatten((case.args, case.kwargs))[0]
    return {f"input {i}": t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad and t.is_leaf}


def _named(output: Any) -> dict[str, Any]:
    leaves = tree_flatten(output)[0]
    return {f"output {i}": leaf.detach() if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)}


def _difference(what: str, stock: dict[str, Any], ours: dict[str, Any], exact: dict[str, Any] | None) -> Difference:
    """Over all tensors of one kind; exact values that another name or shape makes useless are left out."""
    nothing = Difference(what, "", 0.0, 0.0, 0.0)
    if stock.keys() != ours.keys():
        names = ", ".join(sorted(stock.keys() ^ ours.keys()))
        return Difference(what, "", 0.0, 0.0, 0.0, problem=f"only one of the models has {names}")
    floor = 0.0
    if what == "gradients":
        floor = SMALLEST_GRADIENT * max((_scale(t) for t in stock.values()), default=0.0)
    found = []
    for name, a in stock.items():
        b = ours[name]
        problem = _mismatch(a, b)
        if problem is not None:
            return Difference(what, name, 0.0, 0.0, 0.0, problem=f"{name}: {problem}")
        if not isinstance(a, Tensor) or not a.dtype.is_floating_point or a.numel() == 0:
            continue
        scale = max(_scale(a), floor) or 1.0
        absolute = _distance(a, b)
        oracle = exact.get(name) if exact else None
        errors: tuple[float | None, float | None] = (None, None)
        if isinstance(oracle, Tensor) and oracle.shape == a.shape:
            errors = (_distance(a, oracle) / scale, _distance(b, oracle) / scale)
        tolerance = TOLERANCE.get(a.dtype, TOLERANCE[torch.bfloat16])
        found.append(Difference(what, name, absolute, absolute / scale, tolerance, *errors))
    # The worst by how far it is past its tolerance, those that don't agree first.
    return max(found, key=lambda d: (not d.agrees, d.relative / d.tolerance), default=nothing)


def _mismatch(a: Any, b: Any) -> str | None:
    """What is wrong beyond rounding, if anything."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None if type(a) is type(b) and (isinstance(a, Tensor) or a == b) else f"stock gives {a!r}, ours {b!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"stock gives {list(a.shape)} of {a.dtype}, accelerated {list(b.shape)} of {b.dtype}"
    if not a.dtype.is_floating_point:
        return None if torch.equal(a, b) else "the values differ"
    if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return "infinities or NaNs stand in other places"
    return None


def _scale(t: Any) -> float:
    if not isinstance(t, Tensor) or not t.dtype.is_floating_point or t.numel() == 0:
        return 0.0
    return t.abs().double().nan_to_num(0, 0, 0).max().item()


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of finite elements."""
    return (a.double() - b.double()).abs().nan_to_num(0, 0, 0).max().item() if a.numel() else 0.0


def _float64(factory: Callable[[], Any], path: str, stock: Case) -> tuple[Case | None, str | None]:
    """A float64 copy of the stock model with its inputs, or why there is none."""
    try:
        model = make_case(factory, path).model
        if model is stock.model:
            model = copy.deepcopy(model)
        model = model.double()
        model.load_state_dict(stock.model.state_dict())
        case = Case(model, _copied(stock.args, torch.float64), _copied(stock.kwargs, torch.float64))
        torch.manual_seed(SEED)
        with torch.no_grad():
            model.eval()(*case.args, **case.kwargs)
        return case, None
    except Exception as error:  # The user's model may insist on a dtype in any way it likes.
        return None, _describe(error)


def _copied(inputs: Any, dtype: torch.dtype | None = None) -> Any:
    """Inputs whose tensors are copies, floating ones in `dtype`."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        result = value.detach().clone()
        if dtype is not None and result.dtype.is_floating_point:
            result = result.to(dtype)
        return result.requires_grad_(value.requires_grad)

    return tree_map(copied, inputs)


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)
    place = f", at {where[-1].filename}:{where[-1].lineno}" if where else ""
    return f"{type(error).__name__}: {error}{place}"


def _described_call(case: Case) -> str:
    shapes = [list(t.shape) for t in tree_flatten((case.args, case.kwargs))[0] if isinstance(t, Tensor)]
    return f"{type(case.model).__name__} called with {shapes}"


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
