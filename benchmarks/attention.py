"""Attention cases: the formulas as tutorials write them in stock torch, and ours over the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Mode
from benchmarks.problems import Named, Problem, double

# Elements [B, T, S, A] the float64 result is computed over at a time.
ORACLE_ELEMENTS = 1 << 25
CUDA_ORACLE_ELEMENTS = 1 << 28


class StockAttention(nn.Module):
    """query [B, T, A], keys [B, S, A], values [B, S, D] -> context [B, T, D], weights [B, T, S]."""

    def __init__(self, operator: str, width: int) -> None:
        super().__init__()
        self.operator = operator
        if operator in ("additive_attention", "concat_attention"):
            self.v = nn.Parameter(torch.randn(width) / 16)
        if operator == "general_attention":
            self.weight = nn.Parameter(torch.randn(width, width) / width)
        if operator == "concat_attention":
            self.weight = nn.Parameter(torch.randn(width, 2 * width) / width**0.5)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        if self.operator == "additive_attention":
            return (query[:, :, None] + keys[:, None]).tanh() @ self.v
        if self.operator == "dot_attention":
            return query @ keys.transpose(1, 2) / query.shape[-1] ** 0.5
        if self.operator == "general_attention":
            return query @ self.weight @ keys.transpose(1, 2)
        if self.operator == "concat_attention":
            both = (query.shape[0], query.shape[1], keys.shape[1], query.shape[2])
            pair = torch.cat([query[:, :, None].expand(both), keys[:, None].expand(both)], -1)
            return nn.functional.linear(pair, self.weight).tanh() @ self.v
        raise ValueError(f"operator: expected an attention over query and keys, got {self.operator!r}")

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.scores(query, keys).softmax(-1)
        return weights @ values, weights


class StockFeatureAttention(nn.Module):
    """The widespread tutorial form: a softmax over time of tanh(Linear(h)) for each feature, times h [B, T, A]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(torch.tanh(self.linear(values)), dim=1)
        return weights * values, weights


class ScaledDotProduct(nn.Module):
    """torch's own dot attention, which has no weights to return."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, None]:
        q, k, v = query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1), None


class OurAttention(nn.Module):
    """Our function over the parameters of a stock module; ``prepared`` keys stand for those given."""

    def __init__(self, stock: StockAttention | StockFeatureAttention, operator: str) -> None:
        super().__init__()
        self.stock = stock
        self.operator = operator
        self.prepared: Any = None
        self.need_weights = True

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        from seqattn_kernels import functional

        given, stock = self.prepared if self.prepared is not None else keys, self.stock
        if isinstance(stock, StockFeatureAttention):
            return functional.feature_attention(values, stock.linear.weight, stock.linear.bias)
        if self.operator == "additive_attention":
            return functional.additive_attention(query, given, stock.v, values)
        if self.operator == "dot_attention":
            return functional.dot_attention(query, given, values, scale=True, need_weights=self.need_weights)
        if self.operator == "general_attention":
            return functional.general_attention(query, given, stock.weight, values)
        return functional.concat_attention(query, given, stock.weight, stock.v, values)


class AttentionProblem(Problem):
    """Query, keys and values as wide as the attention; values of the last are what gradients flow from."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        batch, steps, source, width = (case.shape[key] for key in "BTSA")
        trained = case.mode.has_gradients
        self.query = self.draw(batch, steps, width).requires_grad_(trained)
        self.keys = self.draw(batch, source, width).requires_grad_(trained)
        self.values = self.draw(batch, source, width).requires_grad_(trained)
        self.is_feature = case.operator == "feature_attention"
        self.direction = self.draw(batch, source if self.is_feature else steps, width)

    def _stock(self) -> nn.Module:
        width = self.case.shape["A"]
        if self.case.operator == "feature_attention":
            return StockFeatureAttention(width)
        return StockAttention(self.case.operator, width)

    def ours(self) -> nn.Module:
        stock = self.stock()
        assert isinstance(stock, (StockAttention, StockFeatureAttention))
        ours = OurAttention(stock, self.case.operator)
        if self.is_decoder_step:
            from seqattn_kernels import functional

            ours.prepared = functional.prepare_keys(self.keys)
        return ours

    @property
    def is_decoder_step(self) -> bool:
        """One query at a time over the same keys, which are then prepared once."""
        return (
            self.case.operator == "additive_attention" and self.case.mode is Mode.FORWARD and self.case.shape["T"] == 1
        )

    @property
    def leaves(self) -> Named:
        if self.is_feature:
            return [("values", self.values)]
        return [("query", self.query), ("keys", self.keys), ("values", self.values)]

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        query, keys, values, direction = self.query, self.keys, self.values, self.direction
        if not self.case.mode.has_gradients:
            return lambda: module(query, keys, values)
        leaves = [tensor for _, tensor in self.leaves]

        def step() -> Any:
            module.zero_grad(set_to_none=True)
            for leaf in leaves:
                leaf.grad = None
            context, weights = module(query, keys, values)
            context.backward(direction)
            return context, weights

        return step

    def outputs(self, result: Any) -> Named:
        context, weights = result
        return [("context", context), *([] if weights is None else [("weights", weights)])]

    def outcome(self, module: nn.Module, call: Callable[[], Any]) -> Named:
        # Ours wraps the stock module's parameters: name them alike.
        return [(name.replace("stock.", ""), tensor) for name, tensor in super().outcome(module, call)]

    def _part(self, rows: slice, steps: slice) -> AttentionProblem:
        """The problem in float64 over some rows and queries, sharing no memory with this one."""
        twin = copy.copy(self)
        twin.stock_module = self.stock().double()
        twin.query, twin.keys, twin.values = (
            double(t) for t in (self.query[rows, steps].detach(), self.keys[rows].detach(), self.values[rows].detach())
        )
        for _, leaf in twin.leaves:
            leaf.requires_grad_(self.case.mode.has_gradients)
        twin.direction = (self.direction[rows] if self.is_feature else self.direction[rows, steps]).double()
        return twin

    @cached_property
    def oracle(self) -> Named:
        """Computed a few queries at a time, since stock torch keeps every [B, T, S, A] element."""
        batch, steps, source, width = (self.case.shape[key] for key in "BTSA")
        elements = ORACLE_ELEMENTS if self.case.device == "cpu" else CUDA_ORACLE_ELEMENTS
        chunk = steps if self.is_feature else max(1, min(steps, elements // (source * width)))
        rows = max(1, elements // (steps * source * width)) if self.case.device != "cpu" else 1
        context, weights = [], []
        gradients: dict[str, Tensor] = {}
        for row in range(0, batch, rows):
            row_context, row_weights = [], []
            for start in range(0, steps, chunk):
                part = self._part(slice(row, row + rows), slice(start, start + chunk))
                module = part.stock_module
                outcome = part.outcome(module, part.call(module))
                row_context.append(outcome[0][1])
                row_weights.append(outcome[1][1])
                for name, value in outcome[2:]:
                    self._add_gradient(gradients, name, value, row, start)
            context.append(torch.cat(row_context, 1))
            weights.append(torch.cat(row_weights, 1))
        return [("context", torch.cat(context)), ("weights", torch.cat(weights)), *gradients.items()]

    def _add_gradient(self, gradients: dict[str, Tensor], name: str, value: Tensor, row: int, start: int) -> None:
        """Gradients of parameters add up over parts; those of inputs have a place in the whole."""
        whole = dict(self.leaves).get(name.removeprefix("gradient of "))
        if whole is None:
            gradients[name] = gradients[name] + value if name in gradients else value
            return
        if name not in gradients:
            gradients[name] = torch.zeros(whole.shape, dtype=torch.float64, device=whole.device)
        first = start if name.endswith("query") else 0
        gradients[name][row : row + value.shape[0], first : first + value.shape[1]] += value
