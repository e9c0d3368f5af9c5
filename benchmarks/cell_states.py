"""An LSTM that returns the cell state of every step, which torch has only as a loop over its cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.problems import Named, Problem, double, like


class CellLoop(nn.Module):
    """input [B, T, I] -> h and c of all steps, each [B, T, H]."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(input_size, hidden_size)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        state = None
        outputs, cells = [], []
        for x in input.unbind(1):
            state = self.lstm(x, state)
            outputs.append(state[0])
            cells.append(state[1])
        return torch.stack(outputs, 1), torch.stack(cells, 1)


class AllStates(nn.Module):
    """The same from our LSTM."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        import seqattn_kernels.nn as ours_nn

        self.lstm = ours_nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        output, _, cells = self.lstm(input, return_all_states=True)
        return output, cells


class CellStatesProblem(Problem):
    """Gradients flow from both the outputs and the cell states."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        shape = case.shape
        self.input = self.draw(shape["B"], shape["T"], shape["I"]).requires_grad_(case.mode.has_gradients)
        size = (shape["B"], shape["T"], shape["H"])
        self.directions = [self.draw(*size), self.draw(*size)]

    def _stock(self) -> nn.Module:
        return CellLoop(self.case.shape["I"], self.case.shape["H"])

    def ours(self) -> nn.Module:
        made = AllStates(self.case.shape["I"], self.case.shape["H"])
        assert isinstance(self.stock_module, CellLoop)
        cell = self.stock_module.lstm
        layer = nn.LSTM(cell.input_size, cell.hidden_size).to(cell.weight_ih.device, cell.weight_ih.dtype)
        layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
        like(layer.train(self.stock_module.training), made.lstm)
        return made

    def parameters(self, module: nn.Module) -> Named:
        return [(name.removesuffix("_l0"), tensor) for name, tensor in module.named_parameters()]

    @property
    def leaves(self) -> Named:
        return [("input", self.input)]

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        if not self.case.mode.has_gradients:
            return lambda: module(self.input)
        leaves = self.differentiated(module)

        def step() -> Any:
            for leaf in leaves:
                leaf.grad = None
            results = module(self.input)
            torch.autograd.backward(results, self.directions)
            return results

        return step

    def outputs(self, result: Any) -> Named:
        return list(zip(("output", "cell states"), result, strict=True))

    def in_float64(self) -> Problem:
        twin = super().in_float64()
        assert isinstance(twin, CellStatesProblem)
        twin.input, twin.directions = double(self.input), [d.double() for d in self.directions]
        return twin
