"""The attentional decoder: every backend against the reference in float64, gradients, states, steps, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels import functional, native, nn
from seqattn_kernels.functional import DecoderState
from tests.compare import assert_close_to_float64, assert_same_bits, gradients

needs_native = pytest.mark.skipif(native.why_not() is not None, reason="the native kernels were not built")
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

CELLS = ("rnn", "rnn_relu", "gru", "lstm")
SCORES = ("additive", "dot", "general", "concat")
# feedback, size of the attentional vector
FEEDBACKS = (("context", None), ("context", 6), ("attentional", 6), ("both", 6), ("none", 6))
# B, T, S, I, H, K, D: one of each, odd, more rows than a tile, whole vectors
SIZES = ((1, 1, 1, 1, 1, 1, 1), (3, 5, 7, 4, 17, 9, 5), (9, 3, 33, 5, 16, 16, 20), (18, 2, 20, 16, 32, 32, 32))
CASES = [
    pytest.param(cell, score, order, *feedback, layers, size, id=f"{cell}-{score}-{order}-{feedback[0]}-{n}")
    for n, (cell, score, order, feedback, layers, size) in enumerate(
        (*kinds, 1 + n % 2, SIZES[n % len(SIZES)])
        for n, kinds in enumerate(itertools.product(CELLS, SCORES, ("bahdanau", "luong"), FEEDBACKS))
    )
]


def make(
    cell: str = "gru",
    score: str = "additive",
    order: str = "bahdanau",
    feedback: str = "context",
    output: int | None = None,
    layers: int = 1,
    size: tuple[int, ...] = SIZES[1],
    **options: Any,
) -> tuple[nn.AttentionDecoder, dict[str, Tensor]]:
    """A decoder in float64, and its arguments."""
    B, T, S, I, H, K, D = size
    K = H if score == "dot" else K
    concat = ("input", "context", "attentional") if layers == 1 else ("attentional", "context", "input")
    output_concat = ("context", "hidden") if layers == 1 else ("hidden", "context")
    decoder = nn.AttentionDecoder(
        I, H, K, D, cell=cell, score=score, order=order, feedback=feedback, output_size=output, num_layers=layers,
        attention_size=11, concat=concat, output_concat=output_concat, dtype=torch.float64, **options,
    )  # fmt: skip
    lengths = torch.randint(0, S + 1, (B,))
    lengths[0] = S
    return decoder, {
        "input": torch.randn(B, T, I, dtype=torch.float64),
        "keys": torch.randn(B, S, K, dtype=torch.float64),
        "values": torch.randn(B, S, D, dtype=torch.float64),
        "lengths": lengths,
    }


def run(decoder: nn.AttentionDecoder, given: dict[str, Any], **more: Any) -> list[Tensor]:
    out = decoder(**given, **more)
    found = [out.output, out.weights, out.contexts, out.state.h, out.state.context]
    return found if out.state.c is None else [*found, out.state.c]


def run_with_gradients(decoder: nn.AttentionDecoder, given: dict[str, Any], **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    leaves = {k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in given.items()}
    found = run(decoder, leaves, **more)
    inputs = [v for v in leaves.values() if v.requires_grad] + list(decoder.parameters())
    return found, gradients(found, inputs)


def to(given: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in given.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("cell", "score", "order", "feedback", "output", "layers", "size"), CASES)
def test_results_and_gradients(cell, score, order, feedback, output, layers, size, device) -> None:
    decoder, given = make(cell, score, order, feedback, output, layers, size)
    oracle = run_with_gradients(decoder, given, backend="reference")
    decoder, given = decoder.to(device, torch.float32), to(given, device, torch.float32)
    for backend in ("cpu", "composed") if device == "cpu" and native.why_not() is None else ("composed",):
        assert_close_to_float64(run_with_gradients(decoder, given, backend=backend), oracle)


@needs_native
@pytest.mark.parametrize(("cell", "score", "order", "feedback", "output", "layers", "size"), CASES[::3])
def test_float64_and_gradients(cell, score, order, feedback, output, layers, size) -> None:
    decoder, given = make(cell, score, order, feedback, output, layers, size)
    assert_close_to_float64(
        run_with_gradients(decoder, given, backend="cpu"), run_with_gradients(decoder, given, backend="reference")
    )
