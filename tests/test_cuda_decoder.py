"""The attentional decoder on CUDA, called as users call it, against the reference in float64. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels import native, nn
from tests.compare import assert_close_to_float64, gradients, to_float64

DEVICE, BACKEND = "cuda", "cuda"


def _reason() -> str | None:
    if native.cuda_why_not() is not None:
        return native.cuda_why_not()
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    return None if torch.cuda.get_device_capability()[0] in (9, 10) else "needs clusters of 16 blocks"


pytestmark = pytest.mark.skipif(_reason() is not None, reason=str(_reason()))
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
# B, T, S, I, H, A, D
SIZES = [
    (1, 3, 1, 8, 64, 32, 40),
    (5, 4, 33, 16, 200, 136, 72),
    (64, 6, 100, 64, 512, 512, 512),
    (140, 3, 20, 8, 32, 32, 32),
]


class Case:
    def __init__(self, cell: str, dtype: torch.dtype, size: tuple[int, ...], **options: Any) -> None:
        B, T, S, I, H, A, D = size
        self.decoder = nn.AttentionDecoder(I, H, D, D, cell=cell, attention_size=A, **options).to(DEVICE, dtype)
        lengths = torch.randint(0, S + 1, (B,))
        lengths[0] = S
        self.lengths = lengths.to(DEVICE)
        self.leaves = [torch.randn(B, n, k).to(DEVICE, dtype).requires_grad_() for n, k in ((T, I), (S, D), (S, D))]

    def run(self, backend: str | None) -> tuple[list[Tensor], list[Tensor]]:
        out = self.decoder(*self.leaves, lengths=self.lengths, backend=backend)
        found = [out.output, out.weights, out.contexts, out.state.h]
        found += [] if out.state.c is None else [out.state.c]
        return found, gradients(found, [*self.leaves, *self.decoder.parameters()])

    def oracle(self) -> tuple[list[Tensor], list[Tensor]]:
        dtype = self.leaves[0].dtype
        leaves, self.leaves = self.leaves, to_float64(self.leaves)
        try:
            self.decoder.double()
            return self.run("reference")
        finally:
            self.leaves = leaves
            self.decoder.to(dtype)


@halves
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])  # rounding takes a ReLU over its edge
def test_results_and_gradients(cell: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(cell, dtype, size)
    assert_close_to_float64(case.run(BACKEND), case.oracle())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_with_an_output(cell: str) -> None:
    case = Case(cell, torch.bfloat16, SIZES[1], output_size=24)
    assert_close_to_float64(case.run(BACKEND), case.oracle())


HISTORIES: list[dict[str, Any]] = [
    {"score": "location", "score_options": {"filters": 32, "kernel_size": 31}},
    {"score": "location", "score_options": {"filters": 5, "kernel_size": 7, "cumulative": False}},
    {"score": "coverage", "score_options": {"most_fertile": 3.0}},
]


@halves
@pytest.mark.parametrize("options", HISTORIES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_scores_that_know_of_earlier_weights(
    cell: str, size: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Results alone: the kernel has no gradients of them; the rest of the steps from the state of the first."""
    case = Case(cell, dtype, size, **options)
    input, *memory = case.leaves
    with torch.no_grad():
        first = case.decoder(input[:, :2], *memory, lengths=case.lengths, backend=BACKEND)
        rest = case.decoder(input[:, 2:], state=first.state, backend=BACKEND)
        chosen = case.decoder(input[:, :2], *memory, lengths=case.lengths)
        found = [torch.cat([getattr(x, name) for x in (first, rest)], 1) for name in ("output", "weights", "contexts")]
    assert torch.equal(first.output, chosen.output)
    assert_close_to_float64(found, case.oracle()[0][:3])
    with pytest.raises(RuntimeError, match="no gradients of scores that know"):
        case.run(BACKEND)


def test_chosen_in_training() -> None:
    """The same bits as when it is asked for by name."""
    case = Case("gru", torch.bfloat16, SIZES[1])
    for chosen, named in zip(case.run(None)[0], case.run(BACKEND)[0], strict=True):
        assert torch.equal(chosen, named)


def test_tensors_of_two_dtypes_are_composed() -> None:
    case = Case("gru", torch.bfloat16, SIZES[1])
    case.decoder.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        case.decoder(*case.leaves, lengths=case.lengths)
        with pytest.raises(RuntimeError, match="tensors of one dtype"):
            case.decoder(*case.leaves, lengths=case.lengths, backend=BACKEND)


def test_runs_under_graph_capture() -> None:
    case = Case("lstm", torch.bfloat16, SIZES[1])
    inputs = [*case.leaves, *case.decoder.parameters()]

    def step() -> list[Tensor]:
        out = case.decoder(*case.leaves, lengths=case.lengths, backend=BACKEND)
        total = out.output.float().square().sum() + out.weights.float().square().sum()
        return [out.output, *torch.autograd.grad(total, inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        case.leaves[0].copy_(torch.randn_like(case.leaves[0]))
        case.lengths.copy_(torch.randint_like(case.lengths, 1, 34))
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, step(), strict=True):
        assert_close_to_float64(got, wanted.double())
