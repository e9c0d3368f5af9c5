"""How close two results must be, and what to say when they are not.

The oracle is the same computation in float64. There is one tolerance per dtype; nothing in the environment changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# The largest error allowed, as a share of the size of the value: an element may differ from the oracle by
# TOLERANCE * (its own size + the largest size in its tensor). The second term is there because sums of products lose
# digits in proportion to their largest terms, whatever they add up to.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

# Against float64, our error over that of stock torch on the same input (issue bars).
LARGEST_ERROR_RATIO = 2.0
MEAN_ERROR_RATIO = 1.5


def to_float64(value: Any) -> Any:
    """A copy of a nest with every floating tensor in float64, detached; they ask for gradients as before."""
    if isinstance(value, PackedSequence):
        return value._replace(data=to_float64(value.data))
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: to_float64(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_float64(item) for item in value)
    return value


def flatten(value: Any, name: str = "result") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest, each with the path that leads to it."""
    if isinstance(value, PackedSequence):
        yield f"{name}.data", value.data
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flatten(item, f"{name}[{index}]")
    elif value is not None:
        raise TypeError(f"{name}: expected tensors in tuples, lists or mappings, got {type(value).__name__}")


def difference(actual: Tensor, oracle: Tensor, dtype: torch.dtype | None = None, name: str = "result") -> str | None:
    """None where ``actual`` is within the tolerance of ``dtype`` (its own by default), else what differs and where.

    Infinities must match in place and sign, NaNs in place.
    """
    dtype = dtype or actual.dtype
    if actual.shape != oracle.shape:
        return f"{name}: expected shape {list(oracle.shape)}, got {list(actual.shape)}"
    if actual.numel() == 0:
        return None
    # Where the oracle is: results of a GPU are held against a CPU's, or against large ones left on the GPU.
    expected = oracle.detach().double()
    got = actual.detach().to(expected.device).double()
    # A finite oracle past the range of the dtype rounds to infinity there.
    expected = torch.where(expected.abs() > torch.finfo(dtype).max, expected.to(dtype).double(), expected)
    finite = expected.isfinite()
    size = expected[finite].abs().max().item() if finite.any() else 0.0
    # Below this a value of the dtype has fewer digits than the tolerance asks for.
    smallest = torch.finfo(dtype).tiny
    allowed = TOLERANCE[dtype] * (expected.abs() + size) + smallest
    error = (got - expected).abs()
    same_special = (got == expected) | (got.isnan() & expected.isnan())
    bad = torch.where(finite, ~(error <= allowed), ~same_special)
    count = int(bad.sum())
    if count == 0:
        return None
    excess = torch.where(bad, torch.where(finite & got.isfinite(), error / allowed, torch.inf), 0.0)
    place = [int(i) for i in torch.unravel_index(excess.argmax(), excess.shape)]
    at = tuple(place)
    return (
        f"{name}: {count} of {bad.numel()} elements differ; worst at {place}: expected {expected[at].item():.9g}, "
        f"got {got[at].item():.9g}, allowed error {allowed[at].item() if finite[at] else 0.0:.3g} "
        f"({str(dtype).removeprefix('torch.')}, largest size in the tensor {size:.3g})"
    )


def assert_close_to_float64(
    actual: Any, oracle: Any, dtype: torch.dtype | None = None, *, names: Sequence[str] | None = None
) -> None:
    """Every tensor of the nest ``actual`` equals its counterpart in ``oracle`` within the tolerance of its dtype.

    ``dtype`` is the dtype the computation ran in, where it is coarser than that of the result (autocast, bf16 weights).
    ``names`` call the tensors, in order; otherwise their paths do. All that differ are named, not only the first.
    """
    got, expected = list(flatten(actual)), list(flatten(oracle))
    if len(got) != len(expected):
        raise AssertionError(f"expected {len(expected)} tensors, got {len(got)}")
    problems = []
    for index, ((path, a), (_, o)) in enumerate(zip(got, expected, strict=True)):
        problem = difference(a, o, dtype, names[index] if names else path)
        if problem:
            problems.append(problem)
    if problems:
        raise AssertionError("\n".join(problems))


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Every tensor of the nests is equal bit for bit (NaNs in the same places count as equal)."""
    got, wanted = list(flatten(actual)), list(flatten(expected))
    if len(got) != len(wanted):
        raise AssertionError(f"expected {len(wanted)} tensors, got {len(got)}")
    for (path, a), (_, e) in zip(got, wanted, strict=True):
        if a.dtype != e.dtype or a.shape != e.shape:
            raise AssertionError(f"{path}: expected {e.dtype} {list(e.shape)}, got {a.dtype} {list(a.shape)}")
        different = ~((a == e) | (a.isnan() & e.isnan())) if a.is_floating_point() else a != e
        if different.any():
            raise AssertionError(f"{path}: {int(different.sum())} of {a.numel()} elements differ in their bits")


def gradients(result: Any, inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of ``inputs`` for a fixed random direction of ``result``; zeros where an input has no part in it.

    The direction is drawn in float64 and rounded, so that runs in different dtypes share it.
    """
    outputs = [tensor for _, tensor in flatten(result) if tensor.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    directions = [_drawn(t.shape, generator).to(t) for t in outputs]
    found = torch.autograd.grad(outputs, list(inputs), directions, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").bfloat16()


@dataclass(frozen=True)
class ErrorRatio:
    """Errors of ours and of stock against float64, and how many times larger ours are."""

    largest: float
    mean: float
    ours_largest: float
    ours_mean: float
    stock_largest: float
    stock_mean: float

    @property
    def within_bars(self) -> bool:
        return self.largest <= LARGEST_ERROR_RATIO and self.mean <= MEAN_ERROR_RATIO


def error_ratio(ours: Tensor, stock: Tensor, oracle: Tensor) -> ErrorRatio:
    """Compare the errors of two results of one dtype against a float64 oracle.

    An error of stock below that of rounding the oracle itself to the dtype is luck, not accuracy, and counts as the
    rounding error. Elements that are not finite in float64 are left out: ``difference`` holds those in place.
    """
    dtype = stock.dtype
    expected = oracle.detach().double()
    counted = expected.isfinite() & (expected.abs() <= torch.finfo(dtype).max)
    expected = expected[counted]
    if expected.numel() == 0:
        return ErrorRatio(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    a = (ours.detach().double()[counted] - expected).abs()
    b = (stock.detach().double()[counted] - expected).abs()
    rounding = (expected.to(dtype).double() - expected).abs()
    values = [f(x).item() for x in (a, b, rounding) for f in (torch.max, torch.mean)]
    ours_largest, ours_mean, stock_largest, stock_mean, least_largest, least_mean = values
    return ErrorRatio(
        largest=_over(ours_largest, max(stock_largest, least_largest)),
        mean=_over(ours_mean, max(stock_mean, least_mean)),
        ours_largest=ours_largest,
        ours_mean=ours_mean,
        stock_largest=stock_largest,
        stock_mean=stock_mean,
    )


def _over(a: float, b: float) -> float:
    if b == 0.0:
        return 1.0 if a == 0.0 else float("inf")
    return a / b


def oracle_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function`` on float64 copies of its arguments."""
    return function(*to_float64(list(args)), **to_float64(kwargs))
