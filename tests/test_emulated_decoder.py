"""The CUDA kernel of the attentional decoder on the emulator, against a loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels.reference.attention import location_features
from seqattn_kernels.reference.decoder import Spec, extend_history
from seqattn_kernels.reference.recurrence import CELLS
from tests import emulator_build
from tests.cases import KINDS
from tests.compare import assert_close_to_float64
from tests.emulated import Memory, emulator
from tests.emulated_recurrence import DTYPE_NUMBERS

pytestmark = pytest.mark.skipif(emulator_build.compiler() is None, reason="no C++ compiler")

SHARED_LIMIT = 227 * 1024
SMALL, LARGE = {"hidden": 40, "attention": 24, "value": 16}, {"hidden": 260, "attention": 264, "value": 72}


class Decoder:
    def __init__(
        self,
        cell: str,
        dtype: torch.dtype,
        batch: int,
        steps: int,
        source: int,
        hidden: int,
        attention: int,
        value: int,
        *,
        lengths: list[int] | None = None,
        masked: bool = False,
        bias: bool = True,
        initial: bool = True,
        history: str = "none",
        filters: int = 3,
        window: int = 5,
        began: bool = True,
        fertile: bool = False,
    ) -> None:
        self.cell, self.dtype = cell, dtype
        self.batch, self.steps, self.source = batch, steps, source
        self.hidden, self.attention, self.value = hidden, attention, value
        self.number = [info["name"] for info in emulator().CELLS].index(cell)
        self.info = emulator().CELLS[self.number]
        gates = self.info["gates"] * hidden

        def draw(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(to)

        scale = hidden**-0.5
        self.x_gates = draw(batch, steps, gates)
        self.w_hh = draw(gates, hidden, scale=scale)
        self.w_context = draw(gates, value, scale=scale)
        self.b_ih, self.b_hh = (draw(gates, scale=scale) if bias else None for _ in range(2))
        self.w_query = draw(attention, hidden, scale=scale)
        self.b_query = draw(attention, to=torch.float32) if bias else None
        self.v = draw(attention, scale=2 * attention**-0.5, to=torch.float32)
        self.keys, self.values = draw(batch, source, attention), draw(batch, source, value)
        self.h0 = draw(batch, hidden, scale=0.5) if initial else None
        self.c0 = draw(batch, hidden) if initial and self.info["has_cell"] else None
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.mask = torch.rand(batch, source) < 0.5 if masked else None
        self.spec = Spec(history=history)
        self.history0 = self.w_conv = self.w_feature = self.fertility = None
        if history != "none":
            self.channels = 2 if history == "both" else 1
            self.w_conv = draw(filters, self.channels, window)
            self.w_feature = draw(attention, filters)
            if began:
                self.history0 = torch.rand(batch, self.channels, source, dtype=torch.float64).to(dtype)
            if fertile:
                self.fertility = (torch.rand(batch, source, dtype=torch.float64) + 0.5).to(dtype)

    def oracle(self) -> list[Tensor]:
        """output, contexts, weights, h_n, c_n (of a cell that has one)."""

        def wide(x: Tensor | None) -> Any:
            return None if x is None else x.double()

        gates = self.w_hh.shape[0]
        w_ih = torch.cat([torch.eye(gates, dtype=torch.float64), wide(self.w_context)], 1)
        zero = torch.zeros(self.batch, self.hidden, dtype=torch.float64)
        h = zero if self.h0 is None else wide(self.h0)
        c = zero if self.c0 is None else wide(self.c0)
        attend = torch.ones(self.batch, self.source, dtype=torch.bool)
        if self.lengths is not None:
            attend &= torch.arange(self.source) < self.lengths[:, None]
        if self.mask is not None:
            attend &= self.mask
        outputs, contexts, weights = [], [], []
        history = wide(self.history0)
        if self.w_conv is not None and history is None:
            history = torch.zeros(self.batch, self.channels, self.source, dtype=torch.float64)
        for t in range(self.steps):
            query = torch.nn.functional.linear(h, wide(self.w_query), wide(self.b_query))
            inner = query[:, None] + wide(self.keys)
            if history is not None:
                inner = inner + location_features(history, wide(self.w_conv)) @ wide(self.w_feature).t()
            scores = torch.tanh(inner) @ wide(self.v)
            weight = torch.softmax(scores.masked_fill(~attend, -torch.inf), -1).nan_to_num(0)
            if history is not None:
                history = extend_history(self.spec, history, weight, wide(self.fertility))
            context = (weight[:, None] @ wide(self.values)).squeeze(1)
            x = torch.cat([wide(self.x_gates[:, t]), context], 1)
            h, c = CELLS[self.cell](x, h, c, (w_ih, wide(self.w_hh), wide(self.b_ih), wide(self.b_hh)))  # type: ignore
            outputs.append(h)
            contexts.append(context)
            weights.append(weight)
        results = [torch.stack(x, 1) for x in (outputs, contexts, weights)] + [h]
        return [*results, c] if self.info["has_cell"] else results

    def run(self, seed: int = 0) -> list[Tensor]:
        m, e, b = Memory(), emulator(), self.batch
        e.set_seed(seed)
        names = (
            "x_gates",
            "w_hh",
            "w_context",
            "w_query",
            "b_query",
            "v",
            "keys",
            "values",
            "lengths",
            "mask",
            "h0",
            "c0",
        )
        sizes = ("batch", "steps", "source", "hidden", "attention", "value")
        gates = self.w_hh.shape[0]
        a: dict[str, Any] = {k: m.put(k, getattr(self, k)) for k in names} | {k: getattr(self, k) for k in sizes}
        a |= {"cell": self.number, "dtype": DTYPE_NUMBERS[self.dtype], "ld_context": self.value}
        a |= {"x_step": gates, "x_batch": gates * self.steps}
        if self.b_ih is not None:
            a["bias"] = m.address(m.empty("bias", self.info["slots"] * self.hidden))
            both = [m.put("b_ih", self.b_ih)], [m.put("b_hh", self.b_hh)]
            e.combine_bias(self.number, a["dtype"], self.hidden, *both, a["bias"])
        if self.w_conv is not None and self.w_feature is not None:
            filters, _, window = self.w_conv.shape
            taps = torch.nn.functional.pad(self.w_conv, (0, -window % 4))
            a |= {"w_conv": m.put("w_conv", taps), "w_feature": m.put("w_feature", self.w_feature.t().contiguous())}
            a |= {k: m.put(k, getattr(self, k)) for k in ("history0", "fertility")}
            a |= {"filters": filters, "channels": self.channels, "window": window}
            a |= {"knows_last": self.spec.history != "sum", "knows_sum": self.spec.knows_sum}
        shapes = {
            "output": (b, self.steps, self.hidden),
            "contexts": (b, self.steps, self.value),
            "weights": (b, self.steps, self.source),
            "hn": (b, self.hidden),
        }
        if self.info["has_cell"]:
            shapes["cn"] = (b, self.hidden)
        a |= {k: m.address(m.empty(k, *shape, dtype=self.dtype)) for k, shape in shapes.items()}
        e.decoder_forward(a, SHARED_LIMIT)
        return [m.get(k) for k in shapes]


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("cell", KINDS)
def test_every_decoder_kernel(cell: str, dtype: torch.dtype, size: dict[str, int]) -> None:
    decoder = Decoder(cell, dtype, 3, 3, 13, **size, lengths=[13, 4, 9])
    assert_close_to_float64(decoder.run(), decoder.oracle())


PLACES: dict[str, dict[str, Any]] = {
    "one": {"batch": 1, "steps": 1, "source": 1},
    "no_lengths": {},
    "mask": {"masked": True},
    "lengths_out_of_range": {"lengths": [0, -3, 99, 1, 12]},
    "mask_and_lengths": {"masked": True, "lengths": [11, 2, 1, 8, 12]},
    "no_bias": {"bias": False},
    "no_state": {"initial": False},
    "crowded": {"batch": 21},
    "long": {"source": 150, "batch": 2},
}


@pytest.mark.parametrize("place", PLACES)
def test_places(place: str) -> None:
    decoder = Decoder("lstm", torch.bfloat16, **{"batch": 5, "steps": 3, "source": 12} | SMALL | PLACES[place])
    assert_close_to_float64(decoder.run(), decoder.oracle())


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("cell", KINDS)
def test_every_kernel_with_a_history(cell: str, dtype: torch.dtype, size: dict[str, int]) -> None:
    decoder = Decoder(cell, dtype, 3, 3, 13, **size, lengths=[13, 4, 9], history="both")
    assert_close_to_float64(decoder.run(), decoder.oracle())


HISTORIES: dict[str, dict[str, Any]] = {
    "last": {"history": "last"},
    "sum": {"history": "sum", "filters": 1, "window": 1},
    "fertile": {"history": "sum", "filters": 1, "window": 1, "fertile": True},
    "both_fertile": {"history": "both", "fertile": True},
    "from_nothing": {"history": "both", "began": False},
    "one_key": {"history": "both", "source": 1},
    "one_step": {"history": "both", "steps": 1},
    "window_of_more_than_all_keys": {"history": "both", "window": 31},
    "many_filters": {"history": "last", "filters": 37, "window": 3},
    "mask": {"history": "both", "masked": True},
    "no_keys": {"history": "both", "lengths": [0, -3, 99, 1, 12]},
    "crowded": {"history": "both", "batch": 21},
    "long": {"history": "both", "source": 150, "batch": 1, "window": 31},
}


@pytest.mark.parametrize("place", HISTORIES)
def test_histories(place: str) -> None:
    decoder = Decoder("lstm", torch.bfloat16, **{"batch": 5, "steps": 4, "source": 12} | SMALL | HISTORIES[place])
    assert_close_to_float64(decoder.run(), decoder.oracle())


def test_a_history_matters() -> None:
    """Or the tests above could not fail."""
    decoder = Decoder("gru", torch.float16, 3, 3, 13, **SMALL, history="both")
    found = decoder.run()
    decoder.w_feature = -decoder.w_feature
    with pytest.raises(AssertionError):
        assert_close_to_float64(found, decoder.oracle())


@pytest.mark.parametrize("history", ["none", "both"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_threads(seed: int, history: str) -> None:
    decoder = Decoder("gru", torch.bfloat16, 2, 4, 20, **SMALL, lengths=[20, 7], history=history)
    assert_close_to_float64(decoder.run(seed), decoder.oracle())
