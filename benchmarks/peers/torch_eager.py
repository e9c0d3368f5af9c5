"""Stock torch.nn modules: what every case is compared with. On CPU its LSTM forward runs in oneDNN."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.cases import STOCK
from benchmarks.peers import Entry, Peer
from benchmarks.problems import Problem


class TorchEager(Peer):
    name = STOCK
    package = "torch"

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        module = problem.stock()
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call))
