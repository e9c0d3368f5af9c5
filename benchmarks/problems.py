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

    compiled: nn.Module | None = None  # by torch.compile, once for all that want it

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.stock_module = self._stock().to(case.device, case.dtype).train(case.mode.has_gradients)

    def draw(self, *size: int) -> Tensor:
        """Random numbers as the case wants them; the same on every device, up to rounding."""
        return torch.randn(size).to(self.case.device, self.case.dtype)

    def _stock(self) -> nn.Module:
        raise NotImplementedError

    def stock(self) -> nn.Module:
        """A copy of the stock module."""
        return _flattened(copy.deepcopy(self.stock_module))

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

    def parameters(self, module: nn.Module) -> Named:
        """Its parameters, by names that all contestants share."""
        return list(module.named_parameters())

    def outcome(self, module: nn.Module, call: Callable[[], Any]) -> Named:
        """Run the call once: its outputs, and the gradients it left behind."""
        found = self.outputs(call())
        if self.case.mode.has_gradients:
            found += self.leaf_gradients()
            found += [(f"gradient of {name}", _gradient(name, tensor)) for name, tensor in self.parameters(module)]
        return [(name, tensor.detach()) for name, tensor in found]

    def leaf_gradients(self) -> Named:
        """The gradients that the last call left at the inputs."""
        return [(f"gradient of {name}", _gradient(name, tensor)) for name, tensor in self.leaves]

    def differentiated(self, module: nn.Module) -> list[Tensor]:
        """Every tensor a call may leave a gradient at."""
        return [tensor for _, tensor in [*self.leaves, *self.parameters(module)]]

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


def like(stock: nn.Module, ours: nn.Module) -> nn.Module:
    """``ours`` with the weights, device, dtype and mode of the stock module."""
    weight = next(stock.parameters())
    ours.to(weight.device, weight.dtype).load_state_dict(stock.state_dict())
    return ours.train(stock.training)


def _flattened(module: nn.Module) -> nn.Module:
    """With the weights in one piece, as cuDNN wants them."""
    for each in module.modules():
        if isinstance(each, nn.RNNBase):
            each.flatten_parameters()
    return module


def double(tensor: Tensor) -> Tensor:
    """A float64 copy without history that asks for gradients as ``tensor`` does."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


class SequenceProblem(Problem):
    """A recurrent module over whole sequences [B, T, I], padded or packed."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        shape = case.shape
        self.input = self.draw(shape["B"], shape["T"], shape["I"])
        self.lengths: Tensor | None = None
        self.packed: PackedSequence | None = None
        if case.suite == "lengths":
            self.host_lengths = torch.tensor(ragged_lengths(shape["B"], shape["T"]))
            self.lengths = self.host_lengths.to(case.device)
            self.packed = pack_padded_sequence(self.input, self.host_lengths, batch_first=True, enforce_sorted=False)
            self.packed.data.requires_grad_(case.mode.has_gradients)
        self.input.requires_grad_(case.mode.has_gradients)
        rows = self.packed.data.shape[0] if self.packed is not None else None
        size = (shape["B"], shape["T"], shape["H"]) if rows is None else (rows, shape["H"])
        self.direction = self.draw(*size)

    def _stock(self) -> nn.Module:
        module, options = STOCK_SEQUENCES[self.case.kind]
        return module(self.case.shape["I"], self.case.shape["H"], batch_first=True, **options)

    def ours(self) -> nn.Module:
        import seqattn_kernels.nn as ours_nn

        module, options = getattr(ours_nn, type(self.stock_module).__name__), STOCK_SEQUENCES[self.case.kind][1]
        made = module(self.case.shape["I"], self.case.shape["H"], batch_first=True, **options)
        return like(self.stock_module, made)

    @property
    def leaves(self) -> Named:
        return [("input", self.input if self.packed is None else self.packed.data)]

    def leaf_gradients(self) -> Named:
        """Of ragged sequences padded, whichever form the call took them in."""
        if self.packed is None or self.input.grad is not None:
            return [("gradient of input", _gradient("input", self.input))]
        gradient = self.packed._replace(data=_gradient("input", self.packed.data))
        return [("gradient of input", pad_packed_sequence(gradient, batch_first=True)[0])]

    def differentiated(self, module: nn.Module) -> list[Tensor]:
        return [self.input, *super().differentiated(module)]

    def call(self, module: nn.Module, *, padded: bool = False, pack: bool = False, **options: Any) -> Callable[[], Any]:
        """Ragged sequences are given packed; ``padded`` gives ours the padded input and ``lengths=`` instead.

        ``pack``: the padded input is packed by each call, and the output padded, as a user of torch's has to.
        """
        if pack:
            run = self._packing(module)
        elif self.packed is None or padded:
            keywords = {} if self.packed is None else {"lengths": self.lengths}
            run = lambda: module(self.input, **keywords)  # noqa: E731
        else:
            run = lambda: module(self.packed)  # noqa: E731
        if not self.case.mode.has_gradients:
            return run
        direction = self.direction
        if self.packed is not None and (padded or pack):
            direction = pad_packed_sequence(self.packed._replace(data=direction), batch_first=True)[0]
        leaves = self.differentiated(module)

        def step() -> Any:
            for leaf in leaves:
                leaf.grad = None
            output, state = run()
            (output.data if isinstance(output, PackedSequence) else output).backward(direction)
            return output, state

        return step

    def _packing(self, module: nn.Module) -> Callable[[], Any]:
        def run() -> Any:
            packed = pack_padded_sequence(self.input, self.host_lengths, batch_first=True, enforce_sorted=False)
            output, state = module(packed)
            return pad_packed_sequence(output, batch_first=True)[0], state

        return run

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
        self.input = [self.draw(batch, width).requires_grad_(case.mode.has_gradients) for _ in range(LOOP_STEPS)]
        self.state = self.draw(batch, hidden) / 2
        self.direction = self.draw(LOOP_STEPS, batch, hidden)

    def _stock(self) -> nn.Module:
        module, options = STOCK_CELLS[self.case.kind]
        return module(self.case.shape["I"], self.case.shape["H"], **options)

    def ours(self) -> nn.Module:
        import seqattn_kernels.nn as ours_nn

        module, options = getattr(ours_nn, type(self.stock_module).__name__), STOCK_CELLS[self.case.kind][1]
        made = module(self.case.shape["I"], self.case.shape["H"], **options)
        return like(self.stock_module, made)

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
    from benchmarks.attention_kinds import KindProblem
    from benchmarks.cell_states import CellStatesProblem
    from benchmarks.decoder import DecoderProblem
    from benchmarks.models import ModelProblem
    from benchmarks.search import FreeProblem

    if case.operator in ("beam_decoder", "tacotron2_decoder"):
        return FreeProblem(case, seed)
    if case.suite == "decoder":
        return DecoderProblem(case, seed)
    if case.suite == "models":
        return ModelProblem(case, seed)
    if case.suite == "cell_states":
        return CellStatesProblem(case, seed)
    if case.suite == "attention_kinds":
        return KindProblem(case, seed)
    if case.operator.endswith("_attention"):
        return AttentionProblem(case, seed)
    return CellProblem(case, seed) if case.operator.endswith("_cell") else SequenceProblem(case, seed)
