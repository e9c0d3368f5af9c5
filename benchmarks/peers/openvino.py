"""OpenVINO's CPU plugin on the same ONNX model, latency hint, in float32 (its own choice would be bfloat16)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from benchmarks.environment import binding_kept, unpinned
from benchmarks.peers import Entry, Peer, onnx_model
from benchmarks.problems import Named, Problem, SequenceProblem


class OpenVino(Peer):
    name = "openvino"
    package = "openvino"

    def why_not(self, problem: Problem) -> str | None:
        return onnx_model.why_not(problem)

    def installed(self) -> str | None:
        missing = super().installed()
        if missing is None:
            try:
                import onnx  # noqa: F401
            except ImportError:
                return "onnx, which writes the model it reads, is not installed"
        return missing

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        assert isinstance(problem, SequenceProblem)
        assert isinstance(problem.stock_module, nn.RNNBase)
        with unpinned():
            import openvino

            case = problem.case
            model = onnx_model.recurrent_model(problem.stock_module, case.shape["T"], case.shape["B"])
            settings = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",
                "ENABLE_CPU_PINNING": True,
            }
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
            request = compiled.create_infer_request()
            feed = openvino.Tensor(problem.input.detach().transpose(0, 1).contiguous().numpy(), shared_memory=False)
            request.set_input_tensor(feed)
            for _ in range(3):
                request.infer()

        def call() -> Any:
            request.infer()

        def outcome() -> Named:
            with binding_kept():
                call()
            arrays = [request.get_output_tensor(index).data.copy() for index in range(len(compiled.outputs))]
            return onnx_model.named_outputs([torch.from_numpy(array) for array in arrays])

        return Entry(call, outcome)
