"""Kinds of attention beyond plain scores, and weights from scores: stock torch as papers' code writes it, and ours.

Sources have lengths between half and all of S, as a decoder meets them; stock masks by a boolean tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, ragged_lengths
from benchmarks.problems import Named, Problem, double

FILTERS, TAPS = 32, 31


class StockKind(nn.Module):
    """One kind over its inputs and a mask [B, S], True where to attend."""

    def __init__(self, operator: str, shape: Any) -> None:
        super().__init__()
        self.operator = operator
        width = shape.get("A")
        if operator == "location_attention":
            self.conv = nn.Conv1d(2, FILTERS, TAPS, padding=TAPS // 2, bias=False)
            self.feature_proj = nn.Linear(FILTERS, width, bias=False)
        if operator in ("pooling_attention", "feature_attention"):
            self.linear = nn.Linear(width, width)
        if operator in ("location_attention", "pooling_attention"):
            self.v = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(self, inputs: list[Tensor], lengths: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.arange(inputs[-1].shape[-1 if self.is_weights else 1]) >= lengths.unsqueeze(1)
        if self.operator == "location_attention":
            query, history, keys, values = inputs
            location = self.feature_proj(self.conv(history).transpose(1, 2))
            scores = torch.tanh(query.unsqueeze(1) + location + keys) @ self.v
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            return torch.bmm(weights.unsqueeze(1), values).squeeze(1), weights
        if self.operator == "pooling_attention":
            (states,) = inputs
            scores = torch.tanh(self.linear(states)) @ self.v
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            return torch.bmm(weights.unsqueeze(1), states).squeeze(1), weights
        if self.operator == "feature_attention":
            (states,) = inputs
            scores = torch.tanh(self.linear(states)).masked_fill(hidden.unsqueeze(-1), -math.inf)
            weights = scores.softmax(1)
            return weights * states, weights
        z = inputs[0].masked_fill(hidden.unsqueeze(1), -math.inf)
        return ({"softmax": _softmax, "sparsemax": _sparsemax, "entmax15": _entmax15}[self.kind](z),)

    @property
    def kind(self) -> str:
        return self.operator.removesuffix("_weights")

    @property
    def is_weights(self) -> bool:
        return self.operator.endswith("_weights")


def _softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


def _sparsemax(z: Tensor) -> Tensor:
    """By sorting, as in the authors' code."""
    ordered = z.sort(-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    total = ordered.cumsum(-1)
    size = (1 + rank * ordered > total).sum(-1, keepdim=True)
    return (z - (total.gather(-1, size - 1) - 1) / size).clamp(min=0)


def _entmax15(z: Tensor) -> Tensor:
    """By sorting, as in the authors' code; what is 2 below the largest has no weight."""
    z = ((z - z.amax(-1, keepdim=True)) / 2).clamp(min=-2)
    ordered = z.sort(-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean = ordered.cumsum(-1) / rank
    spread = rank * (ordered.square().cumsum(-1) / rank - mean.square())
    tau = mean - ((1 - spread) / rank).clamp(min=1e-12).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    return (z - tau.gather(-1, size - 1)).clamp(min=0).square()


class OurKind(nn.Module):
    """Our functions over the parameters of a stock module."""

    def __init__(self, stock: StockKind) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, inputs: list[Tensor], lengths: Tensor) -> tuple[Tensor, ...]:
        from seqattn_kernels import functional

        stock = self.stock
        if stock.operator == "location_attention":
            query, history, keys, values = inputs
            return functional.location_attention(
                query, keys, stock.v, history, stock.conv.weight, stock.feature_proj.weight, values, lengths=lengths
            )
        if stock.operator == "pooling_attention":
            linear = stock.linear
            return functional.pooling_attention(inputs[0], linear.weight, stock.v, bias=linear.bias, lengths=lengths)
        if stock.operator == "feature_attention":
            return functional.feature_attention(inputs[0], stock.linear.weight, stock.linear.bias, lengths=lengths)
        function = {"softmax": functional.masked_softmax}.get(stock.kind) or getattr(functional, stock.kind)
        return (function(inputs[0], lengths=lengths),)


class KindProblem(Problem):
    """The inputs of a kind, all differentiated when training."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        shape = case.shape
        batch, source = shape["B"], shape["S"]
        self.lengths = torch.tensor([(source + n) // 2 for n in ragged_lengths(batch, source)])
        if case.operator == "location_attention":
            width = shape["A"]
            sizes = {"query": (batch, width), "history": (batch, 2, source), "keys": (batch, source, width)}
            sizes["values"] = (batch, source, 4 * width)
        elif case.operator.endswith("_weights"):
            sizes = {"scores": (batch, shape["T"], source)}
        else:
            sizes = {"states": (batch, source, shape["A"])}
        self.inputs = {name: self.draw(*size).requires_grad_(case.mode.has_gradients) for name, size in sizes.items()}
        with torch.no_grad():
            if "history" in self.inputs:
                self.inputs["history"].copy_(self.inputs["history"].softmax(-1))
            self.direction = self.draw(*self.stock_module(list(self.inputs.values()), self.lengths)[0].shape)

    def _stock(self) -> nn.Module:
        return StockKind(self.case.operator, self.case.shape)

    def ours(self) -> nn.Module:
        stock = self.stock()
        assert isinstance(stock, StockKind)
        return OurKind(stock)

    @property
    def leaves(self) -> Named:
        return list(self.inputs.items())

    def parameters(self, module: nn.Module) -> Named:
        return [(name.removeprefix("stock."), tensor) for name, tensor in super().parameters(module)]

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        inputs, lengths, direction = list(self.inputs.values()), self.lengths, self.direction
        if not self.case.mode.has_gradients:
            return lambda: module(inputs, lengths)

        def step() -> Any:
            module.zero_grad(set_to_none=True)
            for leaf in inputs:
                leaf.grad = None
            found = module(inputs, lengths)
            found[0].backward(direction)
            return found

        return step

    def outputs(self, result: Any) -> Named:
        return list(zip(("context", "weights") if len(result) == 2 else ("weights",), result, strict=True))

    def in_float64(self) -> Problem:
        twin = super().in_float64()
        assert isinstance(twin, KindProblem)
        twin.inputs = {name: double(t) for name, t in self.inputs.items()}
        twin.direction = self.direction.double()
        return twin
