"""`python -m benchmarks.gpu`: environment, build, tests, sanitizer and benchmarks on one GPU, in under nine minutes.

Each part is a process of its own with a limit on its time: an error of CUDA outlasts the call that met it, but not the
process. A part that fails does not keep the next from running. Needs no network and installs nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import gpu_name
from benchmarks.gpu.parts import PARTS, Settings, run_parts, summary


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    made.add_argument("--only", metavar="A,B", help=f"these parts, out of {','.join(PARTS)}")
    made.add_argument("--budget", type=float, default=530.0, metavar="SECONDS", help="for all parts together (530)")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="in place of benchmarks/results/<gpu>")
    made.add_argument("--cases", default="", metavar="TEXT", help="bench: cases whose name contains TEXT")
    made.add_argument("--first", type=int, metavar="N", help="bench: of each suite the first N of these")
    made.add_argument("--suites", default="", metavar="A,B", help="bench: these suites")
    made.add_argument("--quick", action="store_true", help="bench: less time for each case")
    made.add_argument("--tests", default="", metavar="ARGS", help="tests: arguments for pytest")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    names = options.only.split(",") if options.only else list(PARTS)
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        made.error(f"--only: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if gpu_name() is None:
        made.error("expected a GPU that torch can use, got none")
    settings = Settings(
        options.budget, options.out, options.cases, options.suites, options.quick, options.tests, options.first
    )
    outcomes = run_parts(names, settings)
    print(summary(outcomes, settings))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
