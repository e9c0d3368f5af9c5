"""onnxruntime's RNN, GRU and LSTM operators on CPU, time-major input as they want it, all optimisations on."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from benchmarks.environment import unpinned
from benchmarks.peers import Entry, Peer, onnx_model
from benchmarks.problems import Named, Problem, SequenceProblem


class OnnxRuntime(Peer):
    name = "onnxruntime"
    package = "onnxruntime"

    def why_not(self, problem: Problem) -> str | None:
        return onnx_model.why_not(problem)

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        assert isinstance(problem, SequenceProblem)
        assert isinstance(problem.stock_module, nn.RNNBase)
        with unpinned():
            import onnxruntime

            options = onnxruntime.SessionOptions()
            threads = torch.get_num_threads()
            options.intra_op_num_threads = threads
            if threads > 1:
                # This thread is bound to the first core; without a place each, a worker may wait for it there.
                places = ";".join(str(core + 1) for core in range(1, threads))
                options.add_session_config_entry("session.intra_op_thread_affinities", places)
            options.inter_op_num_threads = 1
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            case = problem.case
            model = onnx_model.recurrent_model(problem.stock_module, case.shape["T"], case.shape["B"])
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            feed = {"X": problem.input.detach().transpose(0, 1).contiguous().numpy()}
            session.run(None, feed)

        def call() -> Any:
            return session.run(None, feed)

        def outcome() -> Named:
            return onnx_model.named_outputs([torch.from_numpy(array) for array in call()])

        # Its workers spin for some 30 ms after a run, on cores that the next contestant needs.
        return Entry(call, outcome, linger=0.06)
