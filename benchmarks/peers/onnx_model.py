"""A recurrent module of torch.nn as an ONNX model of one RNN, GRU or LSTM operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# torch's gates in ONNX's order: LSTM i,f,g,o -> i,o,f,c; GRU r,z,n -> z,r,h.
GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _reordered(weight: Tensor, operator: str) -> Tensor:
    gates = weight.detach().chunk(len(GATE_ORDER[operator]))
    return torch.cat([gates[index] for index in GATE_ORDER[operator]])


def recurrent_model(module: nn.RNNBase, steps: int, batch: int) -> Any:
    """An onnx.ModelProto: X [T, B, I] -> Y [T, 1, B, H], Y_h [1, B, H] (and Y_c of an LSTM).

    The module has one layer, one direction and biases.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    operator = type(module).__name__
    hidden = module.hidden_size
    w_ih, w_hh, b_ih, b_hh = (_reordered(weight, operator) for weight in module.all_weights[0])
    weights = {"W": w_ih[None], "R": w_hh[None], "B": torch.cat([b_ih, b_hh])[None]}
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if operator == "GRU":
        attributes["linear_before_reset"] = 1  # torch applies the reset gate after the product with its bias
    if operator == "RNN":
        attributes["activations"] = [str(module.nonlinearity).capitalize()]
    states = ["Y_h", "Y_c"] if operator == "LSTM" else ["Y_h"]
    node = helper.make_node(operator, ["X", "W", "R", "B"], ["Y", *states], **attributes)
    graph = helper.make_graph(
        [node],
        "recurrence",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, batch, module.input_size])],
        [
            helper.make_tensor_value_info("Y", TensorProto.FLOAT, [steps, 1, batch, hidden]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, batch, hidden]) for name in states),
        ],
        [numpy_helper.from_array(weight.contiguous().numpy(), name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    return model


def why_not(problem: Any) -> str | None:
    """Shared by the engines that read the model: the cases an ONNX operator can't stand for."""
    case = problem.case
    if case.mode.has_gradients:
        return "inference only"
    if not isinstance(problem.stock_module, nn.RNNBase) or case.suite == "lengths":
        return "only whole padded sequences are modelled"
    return None


def named_outputs(outputs: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The model's outputs as torch.nn's batch_first modules return them."""
    return [("output", outputs[0][:, 0].transpose(0, 1)), *zip(("h_n", "c_n"), outputs[1:], strict=False)]
