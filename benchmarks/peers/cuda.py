"""Contestants of a GPU: calls recorded as CUDA graphs, torch's own dot attention, sequences packed on each call."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.attention import AttentionProblem, OurAttention, ScaledDotProduct
from benchmarks.gpu.timing import peak_mib
from benchmarks.peers import Entry, Peer, Unsuitable
from benchmarks.peers.ours import Ours
from benchmarks.peers.torch_compile import TorchCompile
from benchmarks.peers.torch_eager import TorchEager
from benchmarks.problems import Problem
from seqattn_kernels import backends, functional, native

WARM_UP_CALLS = 3
# Of the device's memory that one recorded call may keep from the others.
LARGEST_SHARE = 0.08


def needs_gpu(problem: Problem) -> str | None:
    return None if problem.case.device == "cuda" else "for a GPU only"


class Graph(Peer):
    """Another contestant's call recorded once and replayed: what it takes on the device, without the host."""

    package = "torch"

    def __init__(self, name: str, original: Peer) -> None:
        self.name, self.original = name, original

    def installed(self) -> str | None:
        return self.original.installed()

    def why_not(self, problem: Problem) -> str | None:
        if problem.case.suite == "lengths":
            return "packed sequences read their lengths on the host"
        return needs_gpu(problem) or self.original.why_not(problem)

    def takes_minutes(self, problem: Problem) -> bool:
        return self.original.takes_minutes(problem)

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        entry = self.original.prepare(problem, stack)
        peak, whole = peak_mib(entry.call), torch.cuda.get_device_properties(0).total_memory / 2**20
        if peak > LARGEST_SHARE * whole:
            raise Unsuitable(f"a recorded graph keeps its memory, here {peak / 1024:.0f} GiB")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                entry.call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = entry.call()
        module = entry.module
        assert module is not None
        held = [(tensor, tensor.grad) for tensor in problem.differentiated(module)]

        def replay_and_return() -> Any:
            graph.replay()
            for tensor, gradient in held:
                tensor.grad = gradient
            return result

        stack.callback(graph.reset)
        return Entry(
            graph.replay,
            lambda: problem.outcome(module, replay_and_return),
            omits=entry.omits,
            module=module,
            replays=True,
        )


class Packing(TorchEager):
    """Stock torch from padded input to padded output, as a user with ragged sequences calls it."""

    name = "torch_pack"

    def why_not(self, problem: Problem) -> str | None:
        return None if problem.case.suite == "lengths" else "for variable lengths only"

    def options(self, problem: Problem) -> dict[str, Any]:
        return {"pack": True}


class ScaledDotProductAttention(Peer):
    name = "torch_sdpa"
    package = "torch"

    def why_not(self, problem: Problem) -> str | None:
        return None if problem.case.operator == "dot_attention" else "for dot attention only"

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        module = ScaledDotProduct()
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call), omits=("weights",), module=module)


class OursContext(Ours):
    """Our attention asked for the context alone."""

    name = "ours_context"

    def why_not(self, problem: Problem) -> str | None:
        return None if isinstance(problem, AttentionProblem) else "for attention only"

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        module = problem.ours()
        assert isinstance(module, OurAttention)
        module.need_weights = False
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call), omits=("weights",), module=module)


class OursByName(Ours):
    """One layer of ours by the CUDA kernels where the measured thresholds choose torch."""

    name = "ours_cuda"

    def why_not(self, problem: Problem) -> str | None:
        if needs_gpu(problem) or problem.case.suite not in ("recurrent", "lengths"):
            return "for recurrent layers on a GPU only"
        case = problem.case
        rows, batch, hidden = case.active_steps, case.shape["B"], case.shape["H"]
        request = backends.Request(
            case.kind, torch.device("cuda", 0), case.dtype, rows, batch, hidden, case.mode.has_gradients,
            packed=case.suite == "lengths",
        )  # fmt: skip
        if native.cuda_why_not() is None and backends.choose(backends.RECURRENCE, request) == "cuda":
            return "chosen anyway"
        return native.cuda_why_not()

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        module = problem.ours()
        function = getattr(functional, type(module).__name__.lower())
        # The weights themselves: the module's own list is what torch flattens.
        weights = list(module.parameters())

        def forward(input: Any) -> Any:
            return function(input, None, weights, batch_first=True, training=module.training, backend="cuda")

        module.forward = forward  # type: ignore[method-assign]
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call), module=module)


PEERS: tuple[Peer, ...] = (
    Graph("torch_graph", TorchEager()),
    Graph("torch_compile_graph", TorchCompile()),
    Graph("ours_graph", Ours()),
    OursByName(),
    Packing(),
    ScaledDotProductAttention(),
    OursContext(),
)
