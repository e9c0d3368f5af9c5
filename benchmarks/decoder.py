"""A decoder that attends at every step, teacher-forced: a loop in stock torch, and ours over the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.problems import Named, Problem, double

CELLS: dict[str, Callable[[int, int], nn.RNNCellBase]] = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}


class StockDecoder(nn.Module):
    """input [B, T, H], keys [B, S, H] (projected), values [B, S, H] -> h [B, T, H] and weights [B, T, S]."""

    def __init__(self, kind: str, hidden: int) -> None:
        super().__init__()
        self.cell = CELLS[kind](2 * hidden, hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.v = nn.Parameter(torch.randn(hidden) / hidden**0.5)

    def forward(self, input: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        state: Any = None
        h = input.new_zeros(input.shape[0], self.query.in_features)
        outputs, alignments = [], []
        for x in input.unbind(1):
            weights = (torch.tanh(self.query(h)[:, None] + keys) @ self.v).softmax(-1)
            context = (weights[:, None] @ values).squeeze(1)
            state = self.cell(torch.cat([x, context], 1), state)
            h = state[0] if isinstance(state, tuple) else state
            outputs.append(h)
            alignments.append(weights)
        return torch.stack(outputs, 1), torch.stack(alignments, 1)


class OurDecoder(nn.Module):
    """Our function over the parameters of a stock decoder."""

    def __init__(self, stock: StockDecoder, kind: str) -> None:
        super().__init__()
        self.stock, self.kind = stock, kind

    def forward(self, input: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        from seqattn_kernels.functional import attention_decoder

        cell = self.stock.cell
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
        found = attention_decoder(
            input, keys, values, weights, cell=self.kind, query_weight=self.stock.query.weight, v=self.stock.v
        )
        return found.output, found.weights


class DecoderProblem(Problem):
    """Gradients flow from the outputs."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        batch, steps, source, hidden = (case.shape[key] for key in "BTSH")
        trained = case.mode.has_gradients
        self.input = self.draw(batch, steps, hidden).requires_grad_(trained)
        self.keys = self.draw(batch, source, hidden).requires_grad_(trained)
        self.values = self.draw(batch, source, hidden).requires_grad_(trained)
        self.direction = self.draw(batch, steps, hidden)

    @property
    def cell(self) -> str:
        return self.case.operator.removesuffix("_decoder")

    def _stock(self) -> nn.Module:
        return StockDecoder(self.cell, self.case.shape["H"])

    def ours(self) -> nn.Module:
        stock = self.stock()
        assert isinstance(stock, StockDecoder)
        return OurDecoder(stock, self.cell)

    def parameters(self, module: nn.Module) -> Named:
        return [(name.removeprefix("stock."), tensor) for name, tensor in module.named_parameters()]

    @property
    def leaves(self) -> Named:
        return [("input", self.input), ("keys", self.keys), ("values", self.values)]

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        if not self.case.mode.has_gradients:
            return lambda: module(self.input, self.keys, self.values)
        leaves = self.differentiated(module)

        def step() -> Any:
            for leaf in leaves:
                leaf.grad = None
            results = module(self.input, self.keys, self.values)
            results[0].backward(self.direction)
            return results

        return step

    def outputs(self, result: Any) -> Named:
        return list(zip(("output", "weights"), result, strict=True))

    def in_float64(self) -> Problem:
        twin = super().in_float64()
        assert isinstance(twin, DecoderProblem)
        twin.input, twin.keys, twin.values = double(self.input), double(self.keys), double(self.values)
        twin.direction = self.direction.double()
        return twin
