"""pytest-benchmark over the registry of cases: `pytest benchmarks`. Quick figures; `benchmarks.run` is the judge."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from benchmarks.cases import STOCK, SUITES, Case
from benchmarks.peers import registry
from benchmarks.problems import build
from benchmarks.runner import check

pytest.importorskip("pytest_benchmark")

# Cases of up to this many operations, so that all of them take a few minutes.
LARGEST = 5e9
CASES = [
    (case, name)
    for cases in SUITES.values()
    for case in cases
    if case.suite not in ("peers", "scaling") and (case.flops or 0) <= LARGEST and case.shape.get("S", 0) <= 100
    for name in (STOCK, *case.contestants)
    if name != "torch_compile"
]


@pytest.mark.parametrize(("case", "name"), CASES, ids=[f"{case.name}-{name}" for case, name in CASES])
def test_speed(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = case.name
    peer = registry()[name]
    with ExitStack() as stack, torch.set_grad_enabled(case.mode.has_gradients):
        problem = build(case)
        reason = peer.installed() or peer.why_not(problem)
        if reason:
            pytest.skip(reason)
        entry = peer.prepare(problem, stack)
        assert check(entry, problem) is None
        benchmark.pedantic(entry.call, rounds=5, iterations=3, warmup_rounds=1)
