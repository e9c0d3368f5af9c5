"""Stock torch.nn modules: what every case is compared with. LSTM runs in oneDNN on a CPU (forward), cuDNN on a GPU."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks.cases import STOCK
from benchmarks.peers import Entry, Peer
from benchmarks.problems import Problem


class TorchEager(Peer):
    name = STOCK
    package = "torch"

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        module = problem.stock()
        call = problem.call(module, **self.options(problem))
        return Entry(call, lambda: problem.outcome(module, call), module=module)

    def options(self, problem: Problem) -> dict[str, Any]:
        """How ``problem.call`` is to give the module its input."""
        return {}
