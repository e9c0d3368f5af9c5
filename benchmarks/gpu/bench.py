"""`python -m benchmarks.gpu.bench SUITE...`: the cases of a GPU, measured in this process, kept case by case.

Results are written after each case, so that a run which ends early leaves what it has. A case in which the process
died or hung is found in the notes it left, and is run again without us when the command is given again with --resume.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, describe_gpu
from benchmarks.results import CaseResult, Contestant, Document

SUITES = ("recurrent", "additive", "lengths", "dot", "cell_states", "cells", "decoder", "models", "scaling")
# The share of the time a suite may take, where there is too little for all.
SHARES = {
    "recurrent": 0.26, "additive": 0.28, "lengths": 0.1, "dot": 0.05, "cell_states": 0.05, "cells": 0.06,
    "decoder": 0.09, "models": 0.06, "scaling": 0.05,
}  # fmt: skip
# A case that takes longer hangs.
CASE_SECONDS = 60.0
# This process can't go on, another one can: its CUDA context is broken, or a case hung.
BROKEN = 75
# What torch says once a kernel has failed: no later call of the process succeeds.
STICKY = ("CUDA error", "cudaError", "CUDNN_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=__doc__.splitlines()[0])
    made.add_argument("suite", nargs="*", choices=(*SUITES, []), help="what to measure; everything by default")
    made.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT, such as lstm/forward")
    made.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after that time")
    made.add_argument("--first", type=int, metavar="N", help="of each suite the first N of these")
    made.add_argument("--quick", action="store_true", help="less time for each case")
    made.add_argument("--peers", type=lambda text: text.split(","), metavar="A,B", help="these beside stock, no others")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="in place of benchmarks/results/<gpu>")
    made.add_argument("--resume", action="store_true", help="keep what the folder has and go on")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    begin = time.monotonic()
    import torch

    from benchmarks.cases import CUDA_SUITES
    from benchmarks.gpu.ceilings import measured
    from benchmarks.gpu.runner import FULL, QUICK

    faulthandler.enable()
    # torch flattens no bfloat16 weights and says so at each cuDNN call; one copy of them is part of stock's time.
    warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
    torch.set_num_threads(min(8, os.cpu_count() or 1))
    environment = describe_gpu()
    folder = options.out or RESULTS / environment["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    keeper = Keeper(folder, environment, QUICK.name if options.quick else FULL.name)
    if not options.resume:
        keeper.note.unlink(missing_ok=True)
    keeper.ceilings = keeper.load_ceilings() if options.resume else None
    if keeper.ceilings is None:
        keeper.ceilings = measured()
        print("ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in keeper.ceilings.items()), flush=True)
        (folder / "ceilings.json").write_text(json.dumps(keeper.ceilings, indent=1) + "\n")
    suites = options.suite or SUITES
    profile = QUICK if options.quick else FULL
    skipped: list[str] = []
    share = sum(SHARES[suite] for suite in suites)
    until = begin
    for suite in suites:
        cases = [case for case in CUDA_SUITES[suite] if options.only in case.name][: options.first]
        done = keeper.load(suite) if options.resume else set()
        if options.budget is not None:
            # What an earlier suite left over counts for the later ones.
            until += options.budget * SHARES[suite] / share
        for case in cases:
            if case.name in done:
                continue
            if options.budget is not None and time.monotonic() > until:
                skipped.append(case.name)
                continue
            result = _guarded(case, keeper, profile, options.peers, keeper.begin(case.name))
            print(line(result), flush=True)
            if _is_broken(result):
                return BROKEN
            keeper.add(suite, result)
    if skipped:
        print(f"not measured, for lack of time: {len(skipped)} cases, from {skipped[0]} on")
    return 0


class Keeper:
    """The results so far, in files."""

    def __init__(self, folder: Path, environment: dict[str, Any], profile: str) -> None:
        self.folder, self.environment, self.profile = folder, environment, profile
        self.found: dict[str, list[CaseResult]] = {}
        self.ceilings: dict[str, float] | None = None
        self.note = folder / ".running"

    def load_ceilings(self) -> dict[str, float] | None:
        path = self.folder / "ceilings.json"
        return json.loads(path.read_text()) if path.exists() else None

    def load(self, suite: str) -> set[str]:
        path = self.folder / f"{suite}.json"
        if path.exists():
            self.found[suite] = Document.read(path).cases
        return {case.name for case in self.found.get(suite, [])}

    def begin(self, name: str) -> int:
        """Note which case runs; how many earlier processes ended in this very one."""
        before = json.loads(self.note.read_text()) if self.note.exists() else {}
        tries = before.get(name, 0)
        self.note.write_text(json.dumps({name: tries + 1}))
        return tries

    def add(self, suite: str, result: CaseResult) -> None:
        self.found.setdefault(suite, []).append(result)
        document = Document(self.environment, self.found[suite], self.profile, ceilings=self.ceilings or {})
        document.write(self.folder / f"{suite}.json")
        self.note.unlink(missing_ok=True)


def _guarded(case: Any, keeper: Keeper, profile: Any, peers: list[str] | None, died: int) -> CaseResult:
    """The case. Where a process ended in it before, we are left out of it; where two did, it isn't run.

    One that hangs ends this process.
    """
    from benchmarks.gpu.runner import run_case

    assert keeper.ceilings is not None
    if died:
        peers = [name for name in (peers or case.contestants) if not name.startswith("ours")]
    with _limit(CASE_SECONDS, case.name):
        result = run_case(case, keeper.ceilings, profile, peers, nobody=died > 1)
    if not died:
        return result
    reason = "the process died or hung in this case"
    contestants = [
        Contestant(each.name, failure=reason) if each.name.startswith("ours") or died > 1 else each
        for each in result.contestants
    ]
    return replace(result, contestants=contestants)


@contextmanager
def _limit(seconds: float, name: str) -> Iterator[None]:
    def end() -> None:
        print(f"{name}: no end after {seconds:.0f} s", flush=True)
        faulthandler.dump_traceback(file=sys.stdout)
        sys.stdout.flush()
        os._exit(BROKEN)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_broken(result: CaseResult) -> bool:
    failures = [each.failure or "" for each in result.contestants]
    return any(sign in failure for failure in failures for sign in STICKY)


def line(result: CaseResult) -> str:
    """One line: the case, stock's milliseconds, and of each contestant the time and how many times faster it is."""
    parts = []
    for each in result.contestants:
        if each.milliseconds is None:
            if each.failure:
                parts.append(f"{each.name} FAILED ({each.failure.splitlines()[0][:160]})")
            continue
        device = "" if each.device_milliseconds is None else f"/{each.device_milliseconds:.4g}"
        ratio = "" if each.ratio is None or each.name == "torch_eager" else f" {each.ratio:.2f}x"
        wrong = " (past tolerance)" if each.failure else ""
        parts.append(f"{each.name} {each.milliseconds:.4g}{device} ms{ratio}{wrong}")
    floor = max(result.floors, key=lambda bound: result.floors[bound], default=None)
    least = "" if floor is None else f"; floor {result.floors[floor]:.3g} ({floor})"
    return f"{result.name}: {'; '.join(parts)}{least}"


if __name__ == "__main__":
    sys.exit(main())
