"""What a GPU can do at most, measured, and the least time a case can take by each of these limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.gpu.timing import seconds_of
from benchmarks.work import work

# Operations of the additive score of one element where the reciprocals of four are taken as one: 14 for four.
FMAS_PER_ELEMENT = 3.5
PRODUCTS = {"bfloat16": "bf16_tflops", "float16": "bf16_tflops", "tf32": "tf32_tflops", "float32": "fp32_tflops"}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products, of matrices and inside cuDNN, may round their factors to tf32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def measured() -> dict[str, float]:
    """Copy bandwidth (read and written), product rates, multiply-adds, special functions, and the price of a kernel.

    Special functions and multiply-adds need Triton; without it they are left out.
    """
    found = {"copy_tbs": _copy() / 1e12}
    with tf32(False):
        found["bf16_tflops"] = _product(torch.bfloat16, 8192) / 1e12
        found["fp32_tflops"] = _product(torch.float32, 4096) / 1e12
    with tf32(True):
        found["tf32_tflops"] = _product(torch.float32, 8192) / 1e12
    try:
        from benchmarks.gpu import chains
    except ImportError:
        pass
    else:
        found["special_tops"] = chains.special_rate() / 1e12
        found["fma_tops"] = chains.fma_rate() / 1e12
    found["kernel_us"] = _kernel() * 1e6
    return found


def best(call: Callable[[], Any], rounds: int = 7) -> float:
    """Median seconds of a call after two that warm up."""
    call()
    call()
    return statistics.median(seconds_of(call) for _ in range(rounds))


def _copy() -> float:
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source))


def _product(dtype: torch.dtype, size: int) -> float:
    # Random numbers: products of zeros draw less power and run faster.
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best(lambda: torch.mm(a, b, out=out))  # the clock of a chip that has been busy for a while
    return 2.0 * size**3 / best(lambda: torch.mm(a, b, out=out))


def _kernel(count: int = 200) -> float:
    """Seconds from one tiny kernel of a graph to the next one that depends on it."""
    x = torch.zeros(32, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return best(graph.replay) / count


def floors(case: Case, ceilings: dict[str, float]) -> dict[str, float]:
    """Milliseconds that a case takes at least: its bytes, its products, its special functions, at the measured rates.

    Each input is read once and each result written once. A recurrence has a further limit, the latency of its steps,
    which no rate expresses. Of whole models nothing is said.
    """
    amount = work(case)
    if amount is None:
        return {}
    found = {"bytes": amount.size / ceilings["copy_tbs"] / 1e9}
    rate = ceilings.get(PRODUCTS[case.precision])
    if rate:
        found["products"] = amount.products / rate / 1e9
    if amount.elements and "special_tops" in ceilings:
        one_each = amount.elements / ceilings["special_tops"]
        merged = amount.elements * FMAS_PER_ELEMENT / ceilings["fma_tops"]
        found["scores"] = min(one_each, merged) / 1e9
    return found
