"""The inputs of a case, the stock module and ours with the same weights, and the float64 result both must match."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import LOOP_STEPS, Case, ragged_lengths

Named = list[tuple[str, Tensor]]
STOCK_SEQUENCES: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
STOCK_CELLS: dict[str, tuple[Callable[..., nn.RNNCellBase], dict[str, Any]]] = {
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
    "rnn_tanh": (nn.RNNCell, {}),
    "rnn_relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}


class Problem:
    """A case made concrete. Modules it hands out hold equal weights; inputs are shared by all contestants."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.stock_module = self._stock().train(case.mode.has_gradients)

    def _stock(self) -> nn.Module:
        raise NotImplementedError

    def stock(self) -> nn.Module:
        """A copy of the stock module."""
        return copy.deepcopy(self.stock_module)

    def ours(self) -> nn.Module:
        """Our module with the weights of the stock one."""
        raise NotImplementedError

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        """What is timed: one pass of ``module`` over the inputs, with its backward where the mode has one."""
        raise NotImplementedError

    def outputs(self, result: Any) -> Named:
        """What a call returned, in the one form that contestants are compared in."""
        raise NotImplementedError

    @property
    def leaves(self) -> Named:
        """The inputs that gradients are taken of, besides the module's parameters."""
        raise NotImplementedError

    def outcome(self, module: nn.Module, call: Callable[[], Any]) -> Named:
        """Run the call once: its outputs, and the gradients it left behind."""
        found = self.outputs(call())
        if self.case.mode.has_gradients:
            for name, tensor in [*self.leaves, *module.named_parameters()]:
                found.append((f"gradient of {name}", _gradient(name, tensor)))
        return [(name, tensor.detach()) for name, tensor in found]

    def in_float64(self) -> Problem:
        """The same problem, inputs and weights, in float64."""
        twin = copy.copy(self)
        twin.stock_module = self.stock().double()
        return twin

    @cached_property
    def oracle(self) -> Named:
        """Outputs and gradients of the stock module computed in float64."""
        twin = self.in_float64()
        module = twin.stock_module
        return twin.outcome(module, twin.call(module))


def _gradient(name: str, tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise AssertionError(f"gradient of {name}: expected one after the backward, got none")
    return tensor.grad.clone()


def double(tensor: Tensor) -> Tensor:
    """A float64 copy without history that asks for gradients as ``tensor`` does."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


class SequenceProblem(Problem):
    """A recurrent module over whole sequences [B, T, I], padded or packed."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        shape = case.shape
        self.input = torch.randn(shape["B"], shape["T"], shape["I"])
        self.lengths: Tensor | None = None
        self.packed: PackedSequence | None = None
        if case.suite == "lengths":
            self.lengths = torch.tensor(ragged_lengths(shape["B"], shape["T"]))
            self.packed = pack_padded_sequence(self.input, self.lengths, batch_first=True, enforce_sorted=False)
            self.packed.data.requires_grad_(case.mode.has_gradients)
        self.input.requires_grad_(case.mode.has_gradients)
        rows = self.packed.data.shape[0] if self.packed is not None else None
        size = (shape["B"], shape["T"], shape["H"]) if rows is None else (rows, shape["H"])
        self.direction = torch.randn(size)

    def _stock(self) -> nn.Module:
        module, options = STOCK_SEQUENCES[self.case.kind]
        return module(self.case.shape["I"], self.case.shape["H"], batch_first=True, **options)

    def ours(self) -> nn.Module:
        import seqattn_kernels.nn as ours_nn

        module, options = getattr(ours_nn, type(self.stock_module).__name__), STOCK_SEQUENCES[self.case.kind][1]
        made = module(self.case.shape["I"], self.case.shape["H"], batch_first=True, **options)
        made.load_state_dict(self.stock_module.state_dict())
        return made.train(self.stock_module.training)

    @property
    def leaves(self) -> Named:
        return [("input", self.input if self.packed is None else self.packed.data)]

    def call(self, module: nn.Module, *, padded: bool = False, **options: Any) -> Callable[[], Any]:
        """``padded`` gives ours the padded input and ``lengths=`` where stock takes the packed one."""
        given: Any = self.input if self.packed is None or padded else self.packed
        keywords = {"lengths": self.lengths} if padded else {}
        if not self.case.mode.has_gradients:
            return lambda: module(given, **keywords)
        leaf, direction = self.leaves[0][1], self.direction

        def step() -> Any:
            module.zero_grad(set_to_none=True)
            leaf.grad = None
            output, state = module(given, **keywords)
            (output.data if isinstance(output, PackedSequence) else output).backward(direction)
            return output, state

        return step

    def outputs(self, result: Any) -> Named:
        output, state = result
        if isinstance(output, PackedSequence):
            output = pad_packed_sequence(output, batch_first=True)[0]
        states = state if isinstance(state, tuple) else (state,)
        return [("output", output), *zip(("h_n", "c_n"), states, strict=False)]

    def in_float64(self) -> Problem:
        twin = super().in_float64()
        assert isinstance(twin, SequenceProblem)
        twin.input, twin.direction = double(self.input), self.direction.double()
        if self.packed is not None:
            twin.packed = self.packed._replace(data=double(self.packed.data))
        return twin


class CellProblem(Problem):
    """A cell called LOOP_STEPS times in a Python loop, its state fed back."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        batch, width, hidden = (case.shape[key] for key in "BIH")
        self.input = [torch.randn(batch, width, requires_grad=case.mode.has_gradients) for _ in range(LOOP_STEPS)]
        self.state = torch.randn(batch, hidden) / 2
        self.direction = torch.randn(LOOP_STEPS, batch, hidden)

    def _stock(self) -> nn.Module:
        module, options = STOCK_CELLS[self.case.kind]
        return module(self.case.shape["I"], self.case.shape["H"], **options)

    def ours(self) -> nn.Module:
        import seqattn_kernels.nn as ours_nn

        module, options = getattr(ours_nn, type(self.stock_module).__name__), STOCK_CELLS[self.case.kind][1]
        made = module(self.case.shape["I"], self.case.shape["H"], **options)
        made.load_state_dict(self.stock_module.state_dict())
        return made.train(self.stock_module.training)

    @property
    def leaves(self) -> Named:
        return [(f"input[{step}]", tensor) for step, tensor in enumerate(self.input)]

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        inputs, initial, direction = self.input, self.state, self.direction
        is_lstm = self.case.kind == "lstm"

        def loop() -> list[Tensor]:
            outputs = []
            if is_lstm:
                state = (initial, initial)
                for x in inputs:
                    state = module(x, state)
                    outputs.append(state[0])
                return outputs
            h = initial
            for x in inputs:
                h = module(x, h)
                outputs.append(h)
            return outputs

        if not self.case.mode.has_gradients:
            return loop

        def step() -> list[Tensor]:
            module.zero_grad(set_to_none=True)
            for x in inputs:
                x.grad = None
            outputs = loop()
            torch.stack(outputs).backward(direction)
            return outputs

        return step

    def outputs(self, result: Any) -> Named:
        return [("h of all steps", torch.stack(result))]

    def in_float64(self) -> Problem:
        twin = super().in_float64()
        assert isinstance(twin, CellProblem)
        twin.input, twin.state = [double(x) for x in self.input], self.state.double()
        twin.direction = self.direction.double()
        return twin


def build(case: Case, seed: int = 0) -> Problem:
    """The problem of a case, its numbers drawn from ``seed``."""
    from benchmarks.attention import AttentionProblem

    if case.operator.endswith("_attention"):
        return AttentionProblem(case, seed)
    return CellProblem(case, seed) if case.operator.endswith("_cell") else SequenceProblem(case, seed)
