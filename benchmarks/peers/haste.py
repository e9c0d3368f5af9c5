"""haste (lmnt-com/haste): recurrent layers in float32 on a GPU. `pip install haste_pytorch` builds it."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from benchmarks.peers import Entry, Peer
from benchmarks.problems import Problem

LAYERS = {"lstm": "LSTM", "gru": "GRU"}


class Haste(Peer):
    """Inference: gradients of its parameters lie in another layout."""

    name = "haste"
    package = "haste_pytorch"

    def why_not(self, problem: Problem) -> str | None:
        case = problem.case
        if case.device != "cuda" or case.suite != "recurrent" or case.kind not in LAYERS:
            return "for LSTM and GRU on a GPU only"
        if case.mode.has_gradients or case.dtype != torch.float32:
            return "float32 inference only"
        return None

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        import haste_pytorch

        shape = problem.case.shape
        layer = getattr(haste_pytorch, LAYERS[problem.case.kind])(shape["I"], shape["H"], batch_first=True)
        layer.cuda().eval().from_native_weights(*(weight.detach() for weight in problem.stock_module.parameters()))
        call = problem.call(layer)
        return Entry(call, lambda: problem.outcome(layer, call), module=layer)
