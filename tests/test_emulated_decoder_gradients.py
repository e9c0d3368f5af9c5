"""Gradients of the attentional decoder's operators on CUDA without a GPU, against the reference in float64.

Kernels run in the emulator, on CPU tensors; what torch multiplies on a GPU it multiplies here on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels import native, ops, reference
from seqattn_kernels.ops.decoder import Tensors
from seqattn_kernels.reference.decoder import Spec
from seqattn_kernels.reference.recurrence import GATES
from tests import emulator_build, launcher_build
from tests.cases import KINDS
from tests.compare import assert_close_to_float64, difference, flatten, gradients, to_float64

_missing = native.why_not() or (None if emulator_build.compiler() else "no C++ compiler")
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

# The real ones, which have fakes: taken before the tests put the emulator's in their place.
OPERATORS = {name: getattr(torch.ops.seqattn, name) for name in ("decoder_loop", "decoder_loop_bwd") if not _missing}

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Any:
    """The operators that Python calls are those over the emulator; gradients of scores are the CPU's, in float32."""
    torch.ops.load_library(launcher_build.build())
    scores_bwd = torch.ops.seqattn.scores_bwd

    class Widened:
        @staticmethod
        def default(kind: int, d_scores: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
            query = tensors[0]
            assert query is not None
            wide = [t.float() if t is not None and t.is_floating_point() else t for t in tensors]
            return tuple(t.to(query.dtype) for t in scores_bwd.default(kind, d_scores.float(), *wide))

    patch = pytest.MonkeyPatch()
    for name in OPERATORS:
        patch.setattr(torch.ops.seqattn, name, getattr(torch.ops.seqattn_emulated, name))
    patch.setattr(torch.ops.seqattn, "scores_bwd", Widened)
    yield
    patch.undo()


class Case:
    """A decoder's tensors; every floating one asks for a gradient."""

    def __init__(
        self,
        cell: str,
        dtype: torch.dtype,
        shape: tuple[int, int, int] = (3, 4, 11),
        *,
        sizes: tuple[int, int, int] = (24, 16, 40),
        lengths: list[int] | None = None,
        masked: bool = False,
        bias: bool = True,
        initial: bool = True,
        output: bool = False,
        history: str = "none",
        fertile: bool = False,
    ) -> None:
        (B, T, S), (H, A, D), I = shape, sizes, 5
        rows, scale = GATES[cell] * H, H**-0.5

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size) * scale).to(dtype).requires_grad_()

        self.spec = Spec(cell=cell, has_bias=bias, context_at=I, output_hidden_at=D, history=history)
        self.weights = [draw(rows, I + D, scale=scale), draw(rows, H, scale=scale)]
        self.weights += [draw(rows, scale=scale) for _ in range(2)] if bias else []
        self.t = Tensors(
            draw(B, T, I),
            draw(B, S, A),
            draw(B, S, D),
            None if lengths is None else torch.tensor(lengths),
            torch.rand(B, S) < 0.5 if masked else None,
            draw(1, B, H) if initial else None,
            draw(1, B, H) if initial and cell == "lstm" else None,
            w_query=draw(A, H, scale=scale),
            b_query=draw(A) if bias else None,
            v=draw(A, scale=2 * A**-0.5),
            w_output=draw(7, D + H, scale=scale) if output else None,
            b_output=draw(7) if output else None,
        )
        if history != "none":
            channels = 2 if history == "both" else 1
            self.t = self.t._replace(
                history0=draw(B, channels, S, scale=0.1),
                w_conv=draw(3, channels, 5),
                w_feature=draw(A, 3),
                fertility=(torch.rand(B, S) + 0.5).to(dtype) if fertile else None,
            )

    def inputs(self) -> list[Tensor]:
        return [x for x in (*self.t, *self.weights) if x is not None and x.requires_grad]

    def run(self) -> list[Tensor]:
        return [x for x in ops.decoder_cuda.attention_decoder(self.spec, self.t, self.weights) if x is not None]

    def oracle(self) -> tuple[list[Tensor], list[Tensor]]:
        """Results and what they depend on."""
        t, weights = Tensors(*(to_float64(x) for x in self.t)), to_float64(self.weights)
        found = reference.decoder.attention_decoder(self.spec, *t[:9], weights, *t[9:])
        inputs = [x for x in (*t, *weights) if x is not None and x.requires_grad]
        return [x for x in found if x is not None], inputs

    def agrees(self) -> None:
        found = self.run()
        wanted, inputs = self.oracle()
        assert_close_to_float64(
            [*found, *gradients(found, self.inputs())], [*wanted, *gradients(wanted, inputs)], self.t.input.dtype
        )


@HALVES
@pytest.mark.parametrize("cell", KINDS)
def test_every_cell(cell: str, dtype: torch.dtype) -> None:
    Case(cell, dtype, lengths=[11, 4, 9]).agrees()


@pytest.mark.parametrize(("cell", "dtype"), [("gru", torch.bfloat16), ("lstm", torch.float16)])
def test_large(cell: str, dtype: torch.dtype) -> None:
    Case(cell, dtype, (3, 2, 13), sizes=(260, 264, 320), lengths=[13, 2, 7]).agrees()


PLACES: dict[str, dict[str, Any]] = {
    "none": {"shape": (0, 3, 4)},
    "one": {"shape": (1, 1, 1)},
    "one_key": {"shape": (2, 3, 1)},
    "lengths_out_of_range": {"shape": (5, 3, 12), "lengths": [0, 3, 12, 1, 0]},
    "mask": {"masked": True},
    "mask_and_lengths": {"shape": (5, 3, 12), "masked": True, "lengths": [11, 2, 1, 8, 12]},
    "no_bias": {"bias": False},
    "no_state": {"initial": False},
    "crowded": {"shape": (21, 2, 9)},
    "a_block_a_sequence": {"shape": (67, 2, 5), "sizes": (8, 8, 8)},
    "long": {"shape": (2, 3, 150)},
    "output": {"output": True},
}


@pytest.mark.parametrize("place", PLACES)
def test_places(place: str) -> None:
    Case("lstm", torch.float16, **PLACES[place]).agrees()


@pytest.mark.parametrize(
    ("history", "fertile"), [("last", False), ("sum", False), ("sum", True), ("both", False), ("both", True)]
)
def test_scores_that_know_of_earlier_weights(history: str, fertile: bool) -> None:
    case = Case("gru", torch.bfloat16, lengths=[11, 4, 9], history=history, fertile=fertile, output=True)
    with torch.no_grad():
        assert_close_to_float64(case.run(), case.oracle()[0])


@pytest.mark.parametrize("result", ["hidden", "c", "contexts", "weights", "last"])
def test_gradient_of_one_result(result: str) -> None:
    """What the other results don't send is zero, not garbage."""
    case = Case("lstm", torch.float16)
    place = {"hidden": 0, "c": 1, "contexts": 2, "weights": 3, "last": 0}[result]

    def total(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        chosen = results[place][:, :, -1] if result == "last" else results[place]
        weight = torch.linspace(-1, 1, chosen.numel(), dtype=torch.float64).view(chosen.shape)
        found = torch.autograd.grad((chosen * weight.to(chosen.dtype)).sum(), inputs, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]

    wanted, inputs = case.oracle()
    assert_close_to_float64(total(case.run(), case.inputs()), total(wanted, inputs))


def test_second_derivatives() -> None:
    case = Case("lstm", torch.float16, (2, 2, 5))

    def twice(results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(sum(x.square().sum() for x in results), inputs, create_graph=True)  # type: ignore
        return list(torch.autograd.grad(sum(g.sum() for g in first), inputs[:3]))  # type: ignore[arg-type]

    wanted, inputs = case.oracle()
    assert_close_to_float64(twice(case.run(), case.inputs()), twice(wanted, inputs))


def test_what_stands_where_nobody_attends_does_not_matter() -> None:
    case = Case("gru", torch.bfloat16, (3, 3, 12), lengths=[5, 0, 12], masked=True)
    assert case.t.lengths is not None
    assert case.t.mask is not None
    hidden = (torch.arange(12) >= case.t.lengths[:, None]) | ~case.t.mask
    with torch.no_grad():
        for x in (case.t.keys, case.t.values):
            x[hidden] = torch.nan
    results = case.run()
    found = gradients(results, case.inputs())
    assert all(x.isfinite().all() for x in (*results, *found))
    assert not found[1][hidden].any()
    assert not found[2][hidden].any()


def test_saves_no_more_than_it_says() -> None:
    """O(B * T * (H + D + S)), and nothing of [B, T, S, A]."""
    B, T, S, H, A, D = 2, 5, 50, 24, 16, 40
    case, saved = Case("gru", torch.float16, (B, T, S)), {}
    own = {x.untyped_storage().data_ptr() for x in (*case.t, *case.weights) if x is not None}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        case.run()
    # x_gates 3 H, what units keep 4 H, h; contexts; weights; b_query and v in float32, and W_context, whose rows don't
    # begin at multiples of 16 bytes, as copies.
    copies = 2 * A + 3 * H * D
    assert sum(n for place, n in saved.items() if place not in own) == B * T * (8 * H + D + S) + copies


FAULTS = ["d_x_gates", "d_step", "d_context", "d_scores", "d_h0", "d_c0"]


@pytest.mark.parametrize("number", range(6), ids=FAULTS)
def test_a_wrong_sign_is_seen(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.ops.seqattn_emulated.decoder_loop_bwd

    class Wrong:
        @staticmethod
        def default(*arguments: Any) -> list[Tensor]:
            return [-x if i == number else x for i, x in enumerate(right.default(*arguments))]

    monkeypatch.setattr(torch.ops.seqattn, "decoder_loop_bwd", Wrong)
    case = Case("lstm", torch.float16)
    wanted, inputs = case.oracle()
    found, expected = gradients(case.run(), case.inputs()), gradients(wanted, inputs)
    pairs = zip(flatten(found), flatten(expected), strict=True)
    assert any(difference(a, b, torch.float16) for (_, a), (_, b) in pairs)


class Recorder:
    """An operator that keeps what it was called with and what came out."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name, self.calls, self.operator = name, calls, getattr(torch.ops.seqattn_emulated, name).default

    def default(self, *arguments: Any) -> Any:
        results = self.operator(*arguments)
        self.calls.append((self.name, arguments, results))
        return results


@pytest.mark.parametrize("cell", KINDS)
def test_fakes_know_the_shapes(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.seqattn, name, Recorder(name, calls))
    case = Case(cell, torch.float16)
    gradients(case.run(), case.inputs())
    assert [name for name, _, _ in calls] == list(OPERATORS)
    for name, operator in OPERATORS.items():
        monkeypatch.setattr(torch.ops.seqattn, name, operator)
    for name, arguments, results in calls:
        fakes = OPERATORS[name].default(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
        assert [(f.shape, f.dtype) for f in fakes] == [(r.shape, r.dtype) for r in results], name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"saved": torch.zeros(1, dtype=torch.float16)}, r"saved: expected shape \[3, 4, 24, 4\], got \[1\]"),
        ({"queries": torch.zeros(3, 4, 16)}, "queries: expected float16, got float32"),
        ({"w_recurrent": torch.zeros(5, 24, dtype=torch.float16)}, r"w_recurrent: expected shape \[112, 24\]"),
        ({"d_weights": torch.zeros(3, 4, 10, dtype=torch.float16)}, r"d_weights: expected shape \[3, 4, 11\]"),
        ({"cell": 9}, "cell: expected a number of the registry, got 9"),
        ({"w_context": torch.zeros(96, 41, dtype=torch.float16)[:, 1:]}, "w_context: expected rows of stride 1"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], said: str) -> None:
    half = {"dtype": torch.float16}
    arguments: dict[str, Any] = {
        "cell": 3,
        "w_recurrent": torch.zeros(112, 24, **half),
        "w_context": torch.zeros(96, 40, **half),
        "v": torch.zeros(16),
        "keys": torch.zeros(3, 11, 16, **half),
        "values": torch.zeros(3, 11, 40, **half),
        "lengths": None,
        "h0": None,
        "c0": None,
        "output": torch.zeros(3, 4, 24, **half),
        "weights": torch.zeros(3, 4, 11, **half),
        "queries": torch.zeros(3, 4, 16, **half),
        "saved": torch.zeros(3, 4, 24, 4, **half),
        "cells": torch.zeros(3, 4, 24),
        "d_output": None,
        "d_cn": None,
        "d_contexts": None,
        "d_weights": None,
    }
    torch.ops.seqattn_emulated.decoder_loop_bwd(*arguments.values())
    with pytest.raises(RuntimeError, match=said):
        torch.ops.seqattn_emulated.decoder_loop_bwd(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"save": True}, "save: expected false with a history"),
        ({"history": 4}, r"history: expected 0 \(none\), 1 \(last\), 2 \(sum\) or 3 \(both\), got 4"),
        ({"history": 0}, "history0, w_conv, w_feature, fertility: expected None with history=0"),
        ({"w_conv": None}, "w_conv, w_feature: expected tensors with history=3, got None"),
        ({"w_conv": torch.zeros(3, 1, 5, dtype=torch.float16)}, r"w_conv: expected \[F, C, W\] .* C=2"),
        ({"w_conv": torch.zeros(3, 2, 4, dtype=torch.float16)}, "W odd"),
        ({"w_conv": torch.zeros(3, 2, 5)}, "w_conv: expected float16, got float32"),
        ({"w_feature": torch.zeros(16, 4, dtype=torch.float16)}, r"w_feature: expected shape \[16, 3\]"),
        ({"history0": torch.zeros(3, 1, 11, dtype=torch.float16)}, r"history0: expected shape \[3, 2, 11\]"),
        ({"fertility": torch.zeros(3, 10, dtype=torch.float16)}, r"fertility: expected shape \[3, 11\]"),
    ],
)
def test_errors_of_a_history_name_the_argument(changes: dict[str, Any], said: str) -> None:
    half = {"dtype": torch.float16}
    arguments: dict[str, Any] = {
        "cell": 3,
        "x_gates": torch.zeros(3, 4, 96, **half),
        "w_hh": torch.zeros(96, 24, **half),
        "w_context": torch.zeros(96, 40, **half),
        "b_ih": None,
        "b_hh": None,
        "w_query": torch.zeros(16, 24, **half),
        "b_query": None,
        "v": torch.zeros(16),
        "keys": torch.zeros(3, 11, 16, **half),
        "values": torch.zeros(3, 11, 40, **half),
        "lengths": None,
        "mask": None,
        "h0": None,
        "c0": None,
        "save": False,
        "history": 3,
        "history0": torch.zeros(3, 2, 11, **half),
        "w_conv": torch.zeros(3, 2, 5, **half),
        "w_feature": torch.zeros(16, 3, **half),
        "fertility": torch.ones(3, 11, **half),
    }
    torch.ops.seqattn_emulated.decoder_loop(*arguments.values())
    with pytest.raises(RuntimeError, match=said):
        torch.ops.seqattn_emulated.decoder_loop(*(arguments | changes).values())
