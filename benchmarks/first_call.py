"""`python -m benchmarks.first_call stock|ours KIND B H T THREADS`: seconds the first call in this process takes."""

from __future__ import annotations

import sys
import time

from benchmarks.environment import pin_threads


def main(which: str, kind: str, *sizes: str) -> float:
    import torch

    from benchmarks.problems import build
    from benchmarks.sweep import Point

    batch, hidden, steps, threads = (int(size) for size in sizes)
    torch.set_num_threads(threads)
    problem = build(Point(kind, "first call", batch, hidden, steps, threads).case)
    module = problem.ours() if which == "ours" else problem.stock()
    call = problem.call(module)
    with torch.no_grad():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


if __name__ == "__main__":
    pin_threads()
    print(main(*sys.argv[1:]))
