"""torch.compile with inductor. It takes a recurrence only unrolled over its steps, which is slow to compile."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.peers import Entry, Peer
from benchmarks.problems import Problem


class TorchCompile(Peer):
    name = "torch_compile"
    package = "torch"

    def why_not(self, problem: Problem) -> str | None:
        if problem.case.suite == "lengths":
            return "torch.compile does not take packed sequences through nn.RNN"
        return None

    def takes_minutes(self, problem: Problem) -> bool:
        return not problem.case.operator.endswith("_attention")

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        import torch._dynamo

        stack.callback(torch._dynamo.reset)
        stack.enter_context(torch._dynamo.config.patch(allow_rnn=True))  # type: ignore[attr-defined]
        # As called and as a graph it is one compiled module: compiling takes longer than the measurement.
        module = problem.compiled
        if module is None:
            module = problem.compiled = problem.stock()
            module.compile(dynamic=False)
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call), module=module)
