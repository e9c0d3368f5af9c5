"""The decoder's kernel at its extremes of rows: one, whose values are folded into the weights, and many in one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels import native, ops
from seqattn_kernels.reference.decoder import Spec
from tests.compare import assert_close_to_float64, assert_same_bits
from tests.test_decoder import CELLS, make, run, run_with_gradients, to

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="the native kernels were not built")

# B, T, S, I, H, K, D: few keys for many steps and wide values, where one row's values are folded into the weights.
FOLDED = (1, 9, 19, 5, 17, 9, 70)


def on_both_threads(decoder: Any, given: dict[str, Tensor], **more: Any) -> list[Tensor]:
    """Results, the same with one thread and with two."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(decoder, given, backend="cpu", **more))
    assert_same_bits(*results)
    return results[0]


@pytest.mark.parametrize("order", ["bahdanau", "luong", "between"])
@pytest.mark.parametrize("score", ["additive", "dot", "location", "coverage"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_row_and_few_keys(cell: str, score: str, order: str) -> None:
    options = {"location": {"filters": 3, "kernel_size": 5}, "coverage": {"most_fertile": 3.0}}.get(score)
    layers = 2 if order != "between" else 1
    decoder, given = make(cell, score, order, layers=layers, size=FOLDED, score_options=options)
    for length in (19, 7, 1, 0):
        given["lengths"] = torch.tensor([length])
        oracle = run_with_gradients(decoder, given, backend="reference")
        assert_close_to_float64(run_with_gradients(decoder, given, backend="cpu"), oracle)
        narrow = to(given, "cpu", torch.float32)
        assert_close_to_float64(on_both_threads(decoder.float(), narrow), oracle[0])
        decoder.double()


@pytest.mark.parametrize("order", ["bahdanau", "luong"])
def test_one_row_goes_on_from_a_state(order: str) -> None:
    """The first step of the second half sees a context that no weights of its own made."""
    decoder, given = make("lstm", "additive", order, size=(1, 18, *FOLDED[2:]))
    input = given.pop("input")
    whole = decoder(input, **given, backend="reference")
    first = decoder(input[:, :9], **given, backend="cpu")
    second = decoder(input[:, 9:], state=first.state, backend="cpu")
    assert_close_to_float64(torch.cat([first.output, second.output], 1), whole.output)
    assert_close_to_float64(torch.cat([first.contexts, second.contexts], 1), whole.contexts)


def test_values_that_nobody_attends_to_are_not_folded() -> None:
    """Straight to the operator: above it, a mask has values cleaned already."""
    _, T, S, I, H, A, D = FOLDED
    A = H
    spec = Spec("gru", False, "dot", 1.0, "bahdanau", 0, I, -1, 0, D, "tanh", "none", True)
    mask = torch.rand(1, S) < 0.5
    mask[:, :2] = torch.tensor([True, False])
    input, keys, values = (torch.randn(1, n, width) for n, width in ((T, I), (S, A), (S, D)))
    weights = [torch.randn(3 * H, I + D) / 9, torch.randn(3 * H, H) / 4]

    def results(values: Tensor) -> list[Tensor | None]:
        t = ops.decoder.Tensors(input, keys, values, torch.tensor([S - 2]), mask)
        return list(ops.decoder.attention_decoder(spec, t, weights))

    dirty = values.masked_fill(~mask.unsqueeze(-1), torch.nan)
    dirty[:, S - 2 :] = torch.nan
    found, clean = results(dirty), results(values)
    assert all(bool(t.isfinite().all()) for t in found if t is not None)
    assert_same_bits([t for t in found if t is not None], [t for t in clean if t is not None])
    unmasked = ops.decoder.Tensors(input, keys, values, torch.tensor([S - 2]))
    assert not torch.equal(ops.decoder.attention_decoder(spec, unmasked, weights)[0], found[0])


@pytest.mark.parametrize("order", ["bahdanau", "luong", "between"])
@pytest.mark.parametrize(("cell", "score"), [("gru", "additive"), ("lstm", "location"), ("rnn", "dot")])
@pytest.mark.parametrize("rows", [40, 65, 130])
def test_one_step_of_many_rows(cell: str, score: str, order: str, rows: int) -> None:
    options = {"filters": 3, "kernel_size": 5} if score == "location" else None
    decoder, given = make(cell, score, order, "both", 33, 2, size=(rows, 1, 19, 5, 33, 9, 20), score_options=options)
    oracle = run_with_gradients(decoder, given, backend="reference")
    assert_close_to_float64(run_with_gradients(decoder, given, backend="cpu"), oracle)
    found = on_both_threads(decoder.float(), to(given, "cpu", torch.float32))
    assert_close_to_float64(found, oracle[0])


def test_a_step_without_an_input() -> None:
    decoder, given = make("gru", size=(40, 1, 7, 0, 17, 9, 5))
    assert_close_to_float64(run(decoder, given, backend="cpu"), run(decoder, given, backend="reference"))
