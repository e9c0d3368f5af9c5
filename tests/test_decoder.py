"""The attentional decoder: every backend against the reference in float64, gradients, states, steps, bad input."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
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
ORDERS = ("bahdanau", "luong", "between")
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

# Scores that know of earlier weights; windows of one and of more than all keys, filters of more than a vector.
REMEMBERING = (
    ("location", {"filters": 3, "kernel_size": 3}),
    ("location", {"filters": 20, "kernel_size": 31}),
    ("location", {"filters": 2, "kernel_size": 5, "cumulative": False, "history_gradient": False}),
    ("location", {"filters": 5, "kernel_size": 1, "cumulative": False}),
    ("coverage", {}),
    ("coverage", {"most_fertile": 3.0}),
)
REMEMBERING_CASES = [
    pytest.param(score, options, order, CELLS[n % 4], 1 + n % 3, SIZES[n % len(SIZES)], id=f"{score}-{order}-{n}")
    for n, ((score, options), order) in enumerate(itertools.product(REMEMBERING, ORDERS))
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


def run_with_gradients(
    decoder: nn.AttentionDecoder, given: dict[str, Any], **more: Any
) -> tuple[list[Tensor], list[Tensor]]:
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("score", "options", "order", "cell", "layers", "size"), REMEMBERING_CASES)
def test_earlier_weights(score, options, order, cell, layers, size, device) -> None:
    decoder, given = make(cell, score, order, "both", 6, layers, size, score_options=options)
    oracle = run_with_gradients(decoder, given, backend="reference")
    for dtype in (torch.float64, torch.float32):
        decoder, given = decoder.to(device, dtype), to(given, device, dtype)
        for backend in ("cpu", "composed") if device == "cpu" and native.why_not() is None else ("composed",):
            assert_close_to_float64(run_with_gradients(decoder, given, backend=backend), oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("feedback", "output"), FEEDBACKS)
@pytest.mark.parametrize(("cell", "score"), [("gru", "additive"), ("lstm", "dot")])
def test_attention_between_two_cells(cell, score, feedback, output, layers, device) -> None:
    decoder, given = make(cell, score, "between", feedback, output, layers, SIZES[layers])
    oracle = run_with_gradients(decoder, given, backend="reference")
    for backend in ("cpu", "composed") if device == "cpu" and native.why_not() is None else ("composed",):
        found = run_with_gradients(decoder.to(device), to(given, device, torch.float64), backend=backend)
        assert_close_to_float64(found, oracle)


def test_the_second_cell_sees_h_and_context() -> None:
    """One layer attends after its update, as in the order "luong"; two, against a loop of stock cells."""
    decoder, given = make("lstm", "additive", "between", "none", layers=2)
    first, second = (torch.nn.LSTMCell(n, 17, dtype=torch.float64) for n in (4, 17 + 5))
    for stock, cell in zip((first, second), decoder.cells, strict=True):
        stock.load_state_dict(cell.state_dict())
    out = decoder(**given)
    one = two = (torch.zeros(3, 17, dtype=torch.float64),) * 2
    for t, x in enumerate(given["input"].unbind(1)):
        one = first(x, one)
        context, weights = decoder.attention(one[0], given["keys"], given["values"], lengths=given["lengths"])
        two = second(torch.cat([one[0], context], 1), two)
        assert_close_to_float64((out.output[:, t], out.weights[:, t]), (two[0], weights))
    alone, given = make("gru", "additive", "between", "both", 6)
    luong, _ = make("gru", "additive", "luong", "both", 6)
    luong.load_state_dict(alone.state_dict())
    assert_close_to_float64(alone(**given).output, luong(**given).output)


@needs_native
@pytest.mark.parametrize(("cell", "score", "order", "feedback", "output", "layers", "size"), CASES[::3])
def test_float64_and_gradients(cell, score, order, feedback, output, layers, size) -> None:
    decoder, given = make(cell, score, order, feedback, output, layers, size)
    assert_close_to_float64(
        run_with_gradients(decoder, given, backend="cpu"), run_with_gradients(decoder, given, backend="reference")
    )


@needs_native
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("score", ["additive", "dot", "location", "coverage"])
@pytest.mark.parametrize(("rows", "steps"), [(1, 300), (9, 70)])
def test_longer_than_a_chunk(score: str, order: str, rows: int, steps: int) -> None:
    """Inputs are projected and gradients multiplied some hundred rows at a time; their seams must not show."""
    options = {"location": {"filters": 3, "kernel_size": 3}, "coverage": {"most_fertile": 3.0}}.get(score)
    size = rows, steps, 5, 4, 9, 9, 5
    decoder, given = make("lstm", score, order, "both", 6, 2, size=size, score_options=options)
    assert_close_to_float64(
        run_with_gradients(decoder, given, backend="cpu"), run_with_gradients(decoder, given, backend="reference")
    )


@needs_native
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability: str) -> None:
    """The same tests on the kernels that an older processor would take."""
    selection = "test_threads_change_no_bit or test_float64_and or test_longer or test_masked or test_earlier or rows"
    rows = Path(__file__).with_name("test_decoder_rows.py")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, rows, "-k", selection],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]


@needs_native
def test_gradients_of_gradients() -> None:
    decoder, given = make("lstm", "additive", "luong", "attentional", 3, size=(2, 2, 3, 2, 3, 2, 2))
    names = [name for name, _ in decoder.named_parameters()]

    def f(input: Tensor, keys: Tensor, values: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given_weights = dict(zip(names, weights, strict=True))
        out = torch.func.functional_call(
            decoder, given_weights, (input, keys, values), {"lengths": given["lengths"], "backend": "cpu"}
        )
        return out.output, out.weights, out.contexts, out.state.c

    inputs = [given[name].requires_grad_() for name in ("input", "keys", "values")]
    assert torch.autograd.gradgradcheck(f, [*inputs, *decoder.parameters()], atol=1e-6)


@needs_native
@pytest.mark.parametrize(("score", "order"), [("additive", "bahdanau"), ("location", "between")])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [1, 8, 16, 27])
def test_threads_change_no_bit(rows: int, layers: int, score: str, order: str) -> None:
    decoder, given = make("gru", score, order, "both", 40, layers, size=(rows, 9, 37, 16, 40, 24, 33))
    decoder, given = decoder.float(), to(given, "cpu", torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found, grads = run_with_gradients(decoder, given, backend="cpu")
        # The projection of the keys is torch's own.
        names = ["", "", "", *(name for name, _ in decoder.named_parameters())]
        results.append([*found, *(g for name, g in zip(names, grads, strict=True) if "key_proj" not in name)])
    assert_same_bits(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("feedback", "output"), FEEDBACKS)
@pytest.mark.parametrize(("cell", "score"), [("gru", "additive"), ("lstm", "additive"), ("lstm", "location")])
@pytest.mark.parametrize("grad", [False, True])
def test_steps_are_the_whole(cell, score, feedback, output, order, grad, device) -> None:
    decoder, given = make(cell, score, order, feedback, output, 2)
    decoder, given = decoder.to(device), to(given, device, torch.float64)
    with torch.set_grad_enabled(grad):
        whole = decoder(**given)
        state = decoder.begin(given["keys"], given["values"], lengths=given["lengths"])
        assert (state.packed is not None) == (not grad and device == "cpu" and native.why_not() is None)
        for t in range(given["input"].shape[1]):
            output, state = decoder.step(given["input"][:, t], state)
            assert_close_to_float64(
                (output, state.weights, state.context), (whole.output[:, t], whole.weights[:, t], whole.contexts[:, t])
            )
        assert_close_to_float64((state.h, state.c, state.context), (whole.state.h, whole.state.c, whole.state.context))


@pytest.mark.parametrize("backend", ["cpu", "composed", "reference"])
@pytest.mark.parametrize("score", ["general", "location", "coverage"])
@pytest.mark.parametrize("order", ORDERS)
def test_two_halves_are_the_whole(order: str, score: str, backend: str) -> None:
    if backend == "cpu" and native.why_not() is not None:
        pytest.skip("the native kernels were not built")
    options = {"most_fertile": 3.0} if score == "coverage" else None
    decoder, given = make("lstm", score, order, "both", 6, 2, score_options=options)
    input = given.pop("input").requires_grad_()
    whole = decoder(input, **given, backend=backend)
    first = decoder(input[:, :2], **given, backend=backend)
    second = decoder(input[:, 2:], state=first.state, backend=backend)
    parts = [torch.cat(pair, 1) for pair in zip(first, second, strict=True) if isinstance(pair[0], Tensor)]
    assert_close_to_float64(parts, [t for t in whole if isinstance(t, Tensor)])
    assert_close_to_float64(
        gradients([parts[0], second.state.c], [input, *decoder.parameters()]),
        gradients([whole.output, whole.state.c], [input, *decoder.parameters()]),
    )
    detached = first.state.detach()
    kept = [detached.h, detached.c, detached.context, detached.attentional]
    assert not any(t.requires_grad for t in kept + ([] if score == "general" else [detached.history]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["additive", "dot"])
@pytest.mark.parametrize("grad", [False, True])
def test_states_are_reordered(score: str, grad: bool, device: str) -> None:
    decoder, given = make("lstm", score, "luong", "both", 6)
    decoder, given = decoder.to(device), to(given, device, torch.float64)
    index = torch.tensor([2, 0, 0, 1, 2], device=device)
    input = given["input"]
    with torch.set_grad_enabled(grad):
        state = decoder.begin(given["keys"], given["values"], lengths=given["lengths"])
        _, state = decoder.step(input[:, 0], state)
        output, expected = decoder.step(input[:, 1], state)
        found, chosen = decoder.step(input[index, 1], state.select(index))
    assert_close_to_float64(
        (found, chosen.weights, chosen.h), (output[index], expected.weights[index], expected.h[:, index])
    )


@needs_native
def test_steps_without_gradients_keep_the_weights_they_began_with() -> None:
    decoder, given = make()
    with torch.no_grad():
        state = decoder.begin(given["keys"], given["values"])
        before, _ = decoder.step(given["input"][:, 0], state)
        fresh = decoder(given["input"][:, :1], given["keys"], given["values"]).output[:, 0]
        for p in decoder.parameters():
            p.data.mul_(2)
        after, _ = decoder.step(given["input"][:, 0], state)
        changed = decoder(given["input"][:, :1], state=state).output[:, 0]
    assert_close_to_float64(before, fresh)
    assert_same_bits(after, before)
    assert not torch.allclose(changed, before)


def nothing_but(decoder: nn.AttentionDecoder, given: dict[str, Any], mask: Tensor, backend: str) -> None:
    """Whatever stands where nobody attends changes nothing, and gets no gradient."""
    clean = run_with_gradients(decoder, given | {"mask": mask}, backend=backend)
    attended = mask & (torch.arange(mask.shape[1]) < given["lengths"].unsqueeze(1))
    dirty = dict(given)
    for name in ("keys", "values"):
        dirty[name] = given[name].masked_fill(~attended.unsqueeze(-1), torch.nan)
    found = run_with_gradients(decoder, dirty | {"mask": mask}, backend=backend)
    assert_close_to_float64(found, clean)
    for gradient in found[1][1:3]:
        assert (gradient.masked_select(~attended.unsqueeze(-1)) == 0).all()


@pytest.mark.parametrize("score", [*SCORES, "location", "coverage"])
@pytest.mark.parametrize("backend", ["cpu", "composed"])
def test_masked_positions(score: str, backend: str) -> None:
    if backend == "cpu" and native.why_not() is not None:
        pytest.skip("the native kernels were not built")
    options = {"coverage": {"most_fertile": 3.0}, "location": {"filters": 3, "kernel_size": 5}}.get(score)
    decoder, given = make("gru", score, "luong", "context", size=(4, 3, 19, 4, 8, 8, 6), score_options=options)
    given["lengths"] = torch.tensor([19, 0, 7, 16])
    mask = torch.rand(4, 19) < 0.6
    mask[3] = False  # attends to nothing
    nothing_but(decoder, given, mask, backend)
    out = decoder(**given, mask=mask, backend=backend)
    assert (out.weights[[1, 3]] == 0).all()
    assert (out.contexts[[1, 3]] == 0).all()
    assert_close_to_float64(out.weights[[0, 2]].sum(-1), torch.ones(2, 3, dtype=torch.float64))


@needs_native
def test_a_floating_mask_is_added_and_composed() -> None:
    decoder, given = make()
    given.pop("lengths")
    mask = torch.randn(3, 7, dtype=torch.float64)
    mask[0, 3] = -torch.inf
    out = decoder(**given, mask=mask)
    assert_close_to_float64(out.output, decoder(**given, mask=mask, backend="reference").output)
    assert (out.weights[0, :, 3] == 0).all()
    with pytest.raises(RuntimeError, match="a mask that is added"):
        decoder(**given, mask=mask, backend="cpu")


@pytest.mark.parametrize(
    "size", [(0, 3, 5, 2, 3, 3, 2), (2, 3, 0, 2, 3, 3, 2), (2, 0, 5, 2, 3, 3, 2)], ids=["B", "S", "T"]
)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_empty(cell: str, size: tuple[int, ...]) -> None:
    B, T, S, _, H, _, D = size
    decoder, given = make(cell, "additive", "luong", "both", 4, size=(max(B, 1), *size[1:]))
    given = {name: t[:B] for name, t in given.items()}
    found, grads = run_with_gradients(decoder, given)
    assert [list(t.shape) for t in found[:4]] == [[B, T, 4], [B, T, S], [B, T, D], [1, B, H]]
    assert all((t == 0).all() for t in found[1:3])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    decoder, given = make("gru", "additive", "bahdanau", "context")
    rounded = to(given, "cpu", dtype)
    decoder = decoder.to(dtype)
    found = run_with_gradients(decoder, rounded)
    assert all(t.dtype == dtype for t in found[0])
    oracle = run_with_gradients(decoder.double(), to(rounded, "cpu", torch.float64), backend="reference")
    assert_close_to_float64(found, oracle)


def test_stock_modules_in_a_loop() -> None:
    """The way tutorials write it, with the same parameters."""
    cell, w, u, v = (
        torch.nn.GRUCell(4 + 5, 17),
        torch.nn.Linear(17, 11),
        torch.nn.Linear(9, 11, bias=False),
        torch.nn.Linear(11, 1, bias=False),
    )
    decoder, given = make()
    decoder, given = decoder.float(), to(given, "cpu", torch.float32)
    decoder.cells[0].load_state_dict(cell.state_dict())
    decoder.attention.query_proj.load_state_dict(w.state_dict())
    decoder.attention.key_proj.load_state_dict(u.state_dict())
    decoder.attention.v.data.copy_(v.weight[0])
    h = torch.randn(3, 17)
    out = decoder(given["input"], given["keys"], given["values"], state=h)
    outputs = []
    for x in given["input"].unbind(1):
        weights = v(torch.tanh(w(h).unsqueeze(1) + u(given["keys"]))).squeeze(2).softmax(1)
        context = torch.bmm(weights.unsqueeze(1), given["values"]).squeeze(1)
        h = cell(torch.cat([x, context], 1), h)
        outputs.append(h)
    expected = torch.stack(outputs, 1)
    assert_close_to_float64(out.output, expected)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    out.output.backward(direction)
    assert_close_to_float64(decoder.cells[0].weight_ih.grad, cell.weight_ih.grad)
    assert_close_to_float64(decoder.attention.key_proj.weight.grad, u.weight.grad)


class OwnScore(torch.nn.Module):
    """Attends to the key whose first feature is nearest to the query's."""

    def forward(self, query, keys, values, *, lengths=None, mask=None):
        weights = (-(keys[:, :, 0] - query[:, :1]).abs()).softmax(1)
        return torch.bmm(weights.unsqueeze(1), values).squeeze(1), weights


def test_a_score_of_ones_own() -> None:
    decoder, given = make(score=OwnScore())
    out = decoder(given["input"], given["keys"], given["values"])
    expected = (-(given["keys"][:, :, 0] - 0.0).abs()).softmax(1)  # h is zero at the first step
    assert_close_to_float64(out.weights[:, 0], expected)
    state = decoder.begin(given["keys"], given["values"])
    assert "module" in decoder.why_not(given["input"], state)
    output, _ = decoder.step(given["input"][:, 0], state)
    assert_close_to_float64(output, out.output[:, 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["bahdanau", "luong"])
@pytest.mark.parametrize(("score", "options"), [*REMEMBERING[:3], *REMEMBERING[4:]])
def test_scores_that_remember(score: str, options: dict[str, Any], order: str, device: str) -> None:
    """Against a loop over the module of the score."""
    decoder, given = make("gru", score, order, "context", score_options=options)
    decoder, given = decoder.to(device), to(given, device, torch.float64)
    keys, values, attention = given["keys"].requires_grad_(), given["values"], decoder.attention
    masks = {"lengths": given["lengths"]}
    out = decoder(**given)
    history = attention.initial(keys)
    h, context = keys.new_zeros(3, 17), keys.new_zeros(3, 5)
    outputs, found = [], []
    for x in given["input"].unbind(1):
        if order == "bahdanau":
            context, weights = attention(h, keys, history, values, **masks)
        h = decoder.cells[0](torch.cat([x, context], 1), h)
        if order == "luong":
            context, weights = attention(h, keys, history, values, **masks)
        if score == "location":
            history = attention.next_history(history, weights)
        else:
            history = attention.next_coverage(history, weights, attention.fertility(keys))
        outputs.append(h)
        found.append(weights)
    expected = torch.stack(outputs, 1), torch.stack(found, 1)
    assert_close_to_float64((out.output, out.weights), expected)
    leaves = [keys, *decoder.parameters()]
    assert_close_to_float64(gradients((out.output, out.weights), leaves), gradients(expected, leaves))
    with torch.no_grad():
        state = decoder.begin(keys, values, lengths=given["lengths"])
        index = torch.tensor([0, 1, 2, 2], device=device)
        _, state = decoder.step(given["input"][:, 0], state)
        state = state.select(index)
        for t in range(1, 5):
            output, state = decoder.step(given["input"][index, t], state)
            assert_close_to_float64(output, out.output[index, t])


def test_weightings_of_ones_own_are_composed() -> None:
    """Against a loop over the module of the score, which no longer is a softmax of it."""
    for score in ("additive", "location", "coverage", "dot"):
        decoder, given = make("gru", score, size=(3, 4, 6, 4, 9, 9, 5), score_options={"weighting": "sparsemax"})
        out = decoder(**given)
        assert (out.weights == 0).sum() > (6 - given["lengths"]).sum() * 4
        assert "module" in decoder.why_not(given["input"], out.state)
        attention, keys, values = decoder.attention, given["keys"], given["values"]
        history = [attention.initial(keys)] if hasattr(attention, "initial") else []
        h = torch.zeros(3, 9, dtype=torch.float64)
        for t, x in enumerate(given["input"].unbind(1)):
            context, weights = attention(h, keys, *history, values, lengths=given["lengths"])
            h = decoder.cells[0](torch.cat([x, context], 1), h)
            if score == "location":
                history = [attention.next_history(history[0], weights)]
            elif score == "coverage":
                history = [attention.next_coverage(history[0], weights)]
            assert_close_to_float64((out.output[:, t], out.weights[:, t]), (h, weights))


def test_zoneout() -> None:
    decoder, given = make("lstm", zoneout=0.25)
    plain, _ = make("lstm")
    plain.load_state_dict(decoder.state_dict())
    one = {**given, "input": given["input"][:, :1]}
    new, kept = plain(**one), decoder.eval()(**one)
    assert_close_to_float64((kept.output, kept.state.c), (0.75 * new.output, 0.75 * new.state.c))
    drawn = decoder.train()(**one).output
    assert ((drawn == 0) | (drawn - new.output).abs().lt(1e-12)).all()
    assert 0 < (drawn == 0).sum() < drawn.numel()


def test_dropout_of_the_recurrent_state() -> None:
    decoder, given = make("gru", hidden_dropout=0.5)
    plain, _ = make("gru")
    plain.load_state_dict(decoder.state_dict())
    assert_close_to_float64(decoder.eval()(**given).output, plain(**given).output)
    drawn = decoder.train()(**given)
    dropped = drawn.output == 0
    assert 0.2 < dropped.double().mean() < 0.8
    assert_close_to_float64(drawn.state.h[0], drawn.output[:, -1])


def test_scheduled_sampling() -> None:
    decoder, given = make("gru", size=(4, 6, 7, 17, 17, 9, 5))
    teacher = torch.rand(4, 6) < 0.5
    out = decoder(**given, feed=lambda output: 2 * output, teacher=teacher)
    state = decoder.begin(given["keys"], given["values"], lengths=given["lengths"])
    output = None
    for t in range(6):
        x = given["input"][:, t]
        if output is not None:
            x = torch.where(teacher[:, t : t + 1], x, 2 * output)
        output, state = decoder.step(x, state)
        assert_close_to_float64(out.output[:, t], output)
    with pytest.raises(ValueError, match="feed, teacher: expected both or neither"):
        decoder(**given, teacher=teacher)


@pytest.mark.parametrize("device", DEVICES)
def test_running_freely(device: str) -> None:
    decoder, given = make("gru", size=(4, 6, 7, 17, 17, 9, 5))
    decoder, given = decoder.to(device), to(given, device, torch.float64)
    with torch.no_grad():
        state = decoder.begin(given["keys"], given["values"], lengths=given["lengths"])
        first = given["input"][:, 0]
        out, lengths = decoder.run_freely(first, state, torch.tanh, max_length=6, stop=lambda y: y[:, 0] > 0)
        assert out.output.shape == (4, int(lengths.max()), 17)
        x = first
        for t in range(int(lengths.max())):
            y, state = decoder.step(x, state)
            assert_close_to_float64(out.output[:, t], y)
            ended = (out.output[:, : t + 1, 0] > 0).any(1)
            assert ((lengths <= t + 1) == (ended | (t == 5))).all()
            x = y.tanh()
        nothing, lengths = decoder.run_freely(first, state, torch.tanh, max_length=0)
    assert nothing.output.shape == (4, 0, 17)
    assert (lengths == 0).all()
    with pytest.raises(ValueError, match="max_length: expected at least 0, got -1"):
        decoder.run_freely(first, state, torch.tanh, max_length=-1)


@needs_native
@pytest.mark.parametrize(("cell", "history"), [("rnn", "none"), ("lstm", "none"), ("lstm", "both")])
def test_operators(cell: str, history: str) -> None:
    from seqattn_kernels.ops.decoder import Tensors, _arguments, _options
    from seqattn_kernels.reference.decoder import Spec

    name = {"rnn": "rnn_tanh"}.get(cell, cell)
    gates, number = {"rnn": (1, 0), "lstm": (4, 3)}[cell]
    spec = Spec(name, True, "additive", 1.0, "luong", 0, 3, -1, 0, 4, "tanh", history)
    t = Tensors(
        torch.randn(2, 3, 3), torch.randn(2, 5, 6), torch.randn(2, 5, 4), torch.tensor([5, 2]),
        h0=torch.randn(1, 2, 7), c0=torch.randn(1, 2, 7) if cell == "lstm" else None, context0=torch.randn(2, 4),
        w_query=torch.randn(6, 7), v=torch.randn(6), w_output=torch.randn(5, 11), b_output=torch.randn(5),
    )  # fmt: skip
    if history != "none":
        t = t._replace(history0=torch.rand(2, 2, 5), w_conv=torch.randn(3, 2, 3), w_feature=torch.randn(6, 3))
    weights = [torch.randn(gates * 7, n) for n in (7, 7)] + [torch.randn(gates * 7) for _ in range(2)]
    packed_keys = torch.ops.seqattn.additive_pack(t.keys)
    ops = torch.ops.seqattn
    projections = weights, True, t.w_query, t.b_query, t.w_output, t.b_output, t.w_conv, t.w_feature
    torch.library.opcheck(
        ops.decoder_pack.default, (number, *projections), test_utils=("test_schema", "test_faketensor")
    )
    shared = _arguments(spec, t, weights)
    forward = (number, _options(spec), 1.0, t.input, t.keys, packed_keys, t.values, *shared)
    checks = ("test_schema", "test_faketensor")
    packed = ops.decoder_pack(number, *projections)
    for arguments in ((None, None, True), (packed, None, False), (packed, torch.tensor([1, 1]), False)):
        torch.library.opcheck(ops.decoder_fwd.default, (*forward, *arguments), test_utils=checks)
    hidden, c_n, contexts, found, attentional, reserve = ops.decoder_fwd(*forward, None, None, True)
    free = list(forward)
    free[3] = torch.randn(8, 3)
    free = (*free, packed, None, torch.randn(8, 5), torch.randn(8), torch.tensor([0, 3]), 2, 4)
    torch.library.opcheck(ops.decoder_generate.default, free, test_utils=checks)
    given = (number, _options(spec), 1.0, t.input, t.keys, t.values, *shared)
    kept = hidden, contexts, found, attentional, reserve
    d_c_n = torch.randn_like(c_n) if cell == "lstm" else None
    for d_hidden, need_input in ((torch.randn_like(hidden), True), (None, False)):
        arguments = *given, *kept, d_hidden, d_c_n, torch.randn_like(contexts), None, None, need_input
        torch.library.opcheck(ops.decoder_bwd.default, arguments, test_utils=checks)


BAD = [
    ({"input": torch.zeros(3, 4)}, ValueError, r"input: expected \[B, T, I\] .* got \[3, 4\]"),
    ({"input": torch.zeros(3, 5, 9)}, ValueError, r"input: expected .* B=3 .* I=4 .* got \[3, 5, 9\]"),
    ({"input": torch.zeros(2, 5, 4)}, ValueError, r"input: expected .* B=3 .* got \[2, 5, 4\]"),
    ({"input": torch.zeros(3, 5, 4, dtype=torch.float64)}, TypeError, "expected torch.float64 .* got torch.float32"),
    ({"keys": torch.zeros(3, 7, 8)}, ValueError, r"keys: expected \[B, S, K\] with K=9, got \[3, 7, 8\]"),
    ({"keys": torch.zeros(3, 9)}, ValueError, r"keys: expected .* got \[3, 9\]"),
    ({"values": torch.zeros(3, 6, 5)}, ValueError, r"values: expected .* S=7 .* got \[3, 6, 5\]"),
    ({"values": torch.zeros(3, 7, 6)}, ValueError, r"values: expected .* D=5, got \[3, 7, 6\]"),
    ({"lengths": torch.tensor([1, 2, 8])}, ValueError, r"lengths: expected values in \[0, 7\] .* got 8 at \[2\]"),
    ({"lengths": torch.tensor([1, -2, 3])}, ValueError, r"lengths: expected values in \[0, 7\] .* got -2 at \[1\]"),
    ({"lengths": torch.ones(3, dtype=torch.bool)}, TypeError, "lengths: expected .* got torch.bool"),
    ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths: expected \[B\] with B=3 .* got \[2\]"),
    ({"mask": torch.ones(3, 6, dtype=torch.bool)}, ValueError, r"mask: expected .* got \[3, 6\]"),
    ({"mask": torch.ones(3, 5, 7, dtype=torch.bool)}, ValueError, r"mask: expected \[B, S\].* got \[3, 5, 7\]"),
    ({"mask": torch.ones(3, 7, dtype=torch.int32)}, TypeError, "mask: expected torch.bool"),
    ({"state": torch.zeros(3, 16)}, ValueError, r"h_0: expected \[L, B, H\] = \[1, 3, 17\], got \[1, 3, 16\]"),
    ({"state": (torch.zeros(3, 17), torch.zeros(3, 17))}, TypeError, "state: expected h_0 alone"),
    ({"backend": "gpu"}, ValueError, "backend: expected one of"),
    ({"keys": None}, ValueError, r"keys: expected \[B, S, K\], got None"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[f"{i}-{next(iter(b[0]))}" for i, b in enumerate(BAD)])
def test_bad_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    decoder, given = make()
    with pytest.raises(error, match=message):
        decoder.float()(**to(given, "cpu", torch.float32) | wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "mgu"}, "cell: expected one of .* got 'mgu'"),
        ({"score": "cosine"}, "score: expected one of .* got 'cosine'"),
        ({"order": "lung"}, "order: expected one of .* got 'lung'"),
        ({"feedback": "all"}, "feedback: expected one of .* got 'all'"),
        ({"feedback": "attentional"}, "output_weight: expected a tensor with feedback='attentional', got None"),
        ({"output": 3, "activation": "relu"}, "activation: expected one of .* got 'relu'"),
        ({"zoneout": 1.5}, "zoneout: expected a probability, got 1.5"),
        ({"layers": 0}, "num_layers: expected at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_function() -> None:
    decoder, given = make("lstm", "concat", "luong", "attentional", 6)
    attention, cell = decoder.attention, decoder.cells[0]
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    state = (torch.randn(3, 17, dtype=torch.float64), torch.randn(3, 17, dtype=torch.float64))
    out = functional.attention_decoder(
        given["input"], given["keys"], given["values"], weights, cell="lstm", score="concat",
        query_weight=attention.weight, query_bias=attention.bias, v=attention.v, order="luong", feedback="attentional",
        output_weight=decoder.output_proj.weight, output_bias=decoder.output_proj.bias, state=state,
        lengths=given["lengths"],
    )  # fmt: skip
    assert isinstance(out.state, DecoderState)
    assert_close_to_float64(out[0], decoder(**given, state=state).output)
    general, given = make("gru", "general")
    out = functional.attention_decoder(
        given["input"], given["keys"], given["values"], list(general.cells[0].parameters()), score="general",
        query_weight=general.attention.weight, lengths=given["lengths"],
    )  # fmt: skip
    assert_close_to_float64(out.output, general(**given).output)


@pytest.mark.parametrize("score", ["location", "coverage"])
def test_the_function_with_earlier_weights(score: str) -> None:
    options = {"most_fertile": 2.0} if score == "coverage" else {"filters": 3, "kernel_size": 3}
    decoder, given = make("gru", score, "luong", score_options=options)
    attention, keys = decoder.attention, given["keys"]
    term: dict[str, Any] = {"conv_weight": attention.conv.weight, "feature_weight": attention.feature_proj.weight} if (
        score == "location"
    ) else {"feature_weight": attention.coverage_weight, "fertility": attention.fertility(keys)}  # fmt: skip

    def run_it(**changed: Any) -> Tensor:
        return functional.attention_decoder(
            given["input"], attention.key_proj(keys), given["values"], list(decoder.cells[0].parameters()), score=score,
            query_weight=attention.query_proj.weight, query_bias=attention.query_proj.bias, v=attention.v,
            order="luong", lengths=given["lengths"], **(term | changed),
        ).output  # fmt: skip

    assert_close_to_float64(run_it(), decoder(**given).output)
    wrong = {
        "feature_weight": (torch.zeros(11, 4), r"feature_weight: expected \[A"),
        "fertility": (torch.ones(3, 6), "fertility"),
    }
    if score == "location":
        wrong["conv_weight"] = torch.zeros(3, 2, 4), r"conv_weight: expected .* W odd, got \[3, 2, 4\]"
    else:
        wrong["conv_weight"] = torch.zeros(1, 1, 1), "conv_weight: expected None with score='coverage'"
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            run_it(**{name: value})


@needs_native
def test_compiles_into_one_graph() -> None:
    decoder, given = make()
    decoder, given = decoder.float(), to(given, "cpu", torch.float32)

    def f(input: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out = decoder(input, keys, values)
        return out.output, out.weights

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [given[name].requires_grad_() for name in ("input", "keys", "values")]
    eager, traced = f(*leaves), compiled(*leaves)
    assert_close_to_float64(traced, eager)
    assert_close_to_float64(gradients(traced, leaves), gradients(eager, leaves))
