"""Decoders in the inference scope: packed once, never stale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqattn_kernels import freeze, frozen, native, unfreeze
from seqattn_kernels.functional import decoder_run
from seqattn_kernels.nn import AttentionDecoder, GRUCell
from tests.compare import assert_close_to_float64, assert_same_bits, gradients
from tests.test_decoder import SCORES, make, run

change = pytest.raises(RuntimeError, match="frozen")
needs_native = pytest.mark.skipif(native.why_not() is not None, reason="the native kernels were not built")


def steps(decoder: AttentionDecoder, given: dict[str, Tensor]) -> list[Tensor]:
    """Two steps' outputs and the state after them."""
    state = decoder.begin(given["keys"], given["values"], lengths=given["lengths"])
    first, state = decoder.step(given["input"][:, 0], state)
    second, state = decoder.step(given["input"][:, 1], state)
    return [first, second, state.h]


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The decoders whose weights were packed."""
    packed: list[Any] = []
    pack = decoder_run.ops.decoder.pack_decoder
    monkeypatch.setattr(decoder_run.ops.decoder, "pack_decoder", lambda *args: packed.append(args) or pack(*args))
    return packed


@needs_native
@pytest.mark.parametrize("score", [*SCORES, "location", "coverage"])
@pytest.mark.parametrize("order", ["luong", "between"])
def test_computes_the_same_from_weights_packed_once(score: str, order: str, packings: list[Any]) -> None:
    decoder, given = make("lstm", score, order, "both", 6, 2)
    with torch.no_grad():
        expected = [*run(decoder, given), *steps(decoder, given)]
        packings.clear()
        with frozen(decoder), frozen(decoder):
            for _ in range(2):
                assert_same_bits([*run(decoder, given), *steps(decoder, given)], expected)
        assert len(packings) == 1
        assert decoder._frozen is None
        for parameter in decoder.parameters():
            parameter.mul_(1.5)
        fresh = copy.deepcopy(decoder)
        assert_same_bits([*run(decoder, given), *steps(decoder, given)], [*run(fresh, given), *steps(fresh, given)])
        assert not torch.equal(run(decoder, given)[0], expected[0])


@needs_native
def test_its_cells_are_not_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    pack = GRUCell._pack_weights
    monkeypatch.setattr(GRUCell, "_pack_weights", lambda self, weights: calls.append(self) or pack(self, weights))
    model = nn.ModuleDict({"decoder": make()[0], "cell": GRUCell(3, 4)})
    with frozen(model):
        assert calls == [model["cell"]]


@needs_native
def test_its_weights_are_what_the_kernels_read() -> None:
    """A forward that packed anew would see what was written through `data`, which a frozen scope is promised not to."""
    decoder, given = make("gru")
    with torch.no_grad(), frozen(decoder):
        expected = run(decoder, given)[0]
        for name in ("weight_ih", "weight_hh"):
            getattr(decoder.cells[0], name).data.mul_(2)
        assert_same_bits(run(decoder, given)[0], expected)


CHANGES = {
    "a cell's weight, in place": lambda d: d.cells[0].weight_ih.add_(1),
    "a cell's weight, another": lambda d: setattr(d.cells[0], "weight_hh", nn.Parameter(torch.zeros(51, 17))),
    "a cell": lambda d: d.cells.__setitem__(0, GRUCell(15, 17, dtype=torch.float64)),
    "the query": lambda d: d.attention.query_proj.weight.mul_(2),
    "the score's vector": lambda d: d.attention.v.zero_(),
    "the output": lambda d: d.output_proj.bias.add_(1),
    "other memory": lambda d: setattr(d.output_proj.weight, "data", torch.zeros(6, 22, dtype=torch.float64)),
    "a parametrization": lambda d: nn.utils.parametrizations.weight_norm(d.output_proj, "weight"),
}


@pytest.mark.parametrize("change_weights", CHANGES.values(), ids=list(CHANGES))
def test_a_change_raises_at_the_next_use(change_weights: Any) -> None:
    decoder, given = make("gru", "additive", "luong", "both", 6)
    with torch.no_grad(), frozen(decoder):
        run(decoder, given)
        change_weights(decoder)
        with change:
            run(decoder, given)
        with change:
            steps(decoder, given)


ASSIGNMENTS = {
    "a module": lambda d: setattr(d, "output_proj", None),
    "load_state_dict": lambda d: d.load_state_dict(d.state_dict()),
    "half": lambda d: d.half(),
}


@pytest.mark.parametrize("assign", ASSIGNMENTS.values(), ids=list(ASSIGNMENTS))
def test_a_change_raises_when_made(assign: Any) -> None:
    decoder, _ = make("gru", output=6)
    with frozen(decoder), change:
        assign(decoder)


def test_training_is_refused_and_gradients_of_inputs_are_not() -> None:
    decoder, given = make("gru")
    with frozen(decoder):
        with pytest.raises(RuntimeError, match="gradients would be recorded"):
            run(decoder, given)
        with pytest.raises(RuntimeError, match="gradients would be recorded"):
            steps(decoder, given)
    decoder.requires_grad_(False)
    given["input"].requires_grad_()
    expected = gradients(run(decoder, given), [given["input"]])
    with frozen(decoder):
        assert_close_to_float64(gradients(run(decoder, given), [given["input"]]), expected)


def test_freeze_lasts_until_unfreeze_and_copies_are_not_frozen() -> None:
    decoder, given = make("gru")
    with torch.no_grad():
        freeze(decoder)
        other = copy.deepcopy(decoder)
        other.cells[0].weight_ih.mul_(2)
        run(other, given)
        decoder.cells[0].weight_ih.mul_(2)
        with change:
            run(decoder, given)
        assert_close_to_float64(run(unfreeze(decoder), given), run(other, given))


def test_a_score_of_ones_own_is_not_packed() -> None:
    class Mean(nn.Module):
        def forward(self, query: Tensor, keys: Tensor, values: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
            weights = keys.new_full(keys.shape[:2], 1 / keys.shape[1])
            return values.mean(1), weights

    decoder = AttentionDecoder(4, 7, 5, score=Mean())
    input, keys = torch.randn(2, 3, 4), torch.randn(2, 6, 5)
    with torch.no_grad():
        expected = decoder(input, keys).output
        with frozen(decoder):
            assert_same_bits(decoder(input, keys).output, expected)


def test_without_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_why_not", "not compiled")
    monkeypatch.setattr(native, "extension", None)
    decoder, given = make("gru")
    with torch.no_grad(), frozen(decoder):
        assert decoder._frozen.packed is None
        run(decoder, given)
        decoder.cells[0].bias_ih.add_(1)
        with change:
            run(decoder, given)
