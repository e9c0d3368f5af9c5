"""FlashRNN (Pöppel, Beck, Hochreiter, 2024): recurrent weights kept on the chip. `pip install flashrnn`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Entry, Peer
from benchmarks.problems import Problem


class Layer(nn.Module):
    """One LSTM layer, batch first: the input's product by torch, the recurrence by FlashRNN's fused kernel."""

    def __init__(self, stock: nn.LSTM) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        import flashrnn

        w_ih, w_hh, b_ih, b_hh = self.stock.parameters()
        hidden = w_hh.shape[1]
        gates = nn.functional.linear(input, w_ih).view(*input.shape[:2], 4, 1, hidden)
        # Gates i, f, g, o as torch's; one head.
        states, last = flashrnn.flashrnn(
            gates, w_hh.view(4, 1, hidden, hidden), (b_ih + b_hh).view(4, 1, hidden), function="lstm",
            backend="cuda_fused",
        )  # fmt: skip
        h, c = (state.reshape(1, input.shape[0], hidden) for state in last)
        return states[0].reshape(*input.shape[:2], hidden), (h, c)


class FlashRnn(Peer):
    name = "flashrnn"
    package = "flashrnn"

    def why_not(self, problem: Problem) -> str | None:
        case = problem.case
        if case.device != "cuda" or case.suite != "recurrent" or case.kind != "lstm":
            return "for LSTM on a GPU only"
        if case.mode.has_gradients or case.dtype not in (torch.bfloat16, torch.float16):
            return "inference in 16 bits only"
        return None

    def takes_minutes(self, problem: Problem) -> bool:
        return True  # it compiles a kernel for each size

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        stock: Any = problem.stock()
        layer = Layer(stock)
        call = problem.call(layer)
        return Entry(call, lambda: problem.outcome(layer, call), module=layer)
