"""Every case that is measured: operator, shape, mode, contestants, and the bars it is held to.

Adding a case is adding a line here; the runner, `pytest benchmarks` and the report take it from the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch


class Mode(str, Enum):
    """What one timed call does."""

    FORWARD = "forward"  # without gradients
    TRAINING = "forward+backward"  # gradients of input and parameters
    STEPS = "steps"  # cells: LOOP_STEPS calls in a Python loop, without gradients
    STEPS_TRAINING = "steps+backward"  # the same loop, then one backward through it

    @property
    def has_gradients(self) -> bool:
        return self in (Mode.TRAINING, Mode.STEPS_TRAINING)


LOOP_STEPS = 20
STOCK = "torch_eager"
STOCK_AGAIN = "torch_eager again"  # the other half of the A/A pair
BY_NAME = ("ours_cuda",)  # our kernels where the measured thresholds choose torch
FMA_LIMIT = "fma limit"  # what a bar on the share of the machine's limit is against

GATES: Mapping[str, int] = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# S1 to S6
SHAPES: tuple[dict[str, int], ...] = (
    {"B": 1, "T": 100, "I": 128, "H": 128},
    {"B": 1, "T": 100, "I": 512, "H": 512},
    {"B": 8, "T": 100, "I": 256, "H": 256},
    {"B": 16, "T": 100, "I": 256, "H": 256},
    {"B": 32, "T": 100, "I": 512, "H": 512},
    {"B": 64, "T": 50, "I": 1024, "H": 1024},
)


@dataclass(frozen=True)
class Bar:
    """``contestant`` takes at most 1/``at_least`` of the time of ``against``, or reaches that share of FMA_LIMIT."""

    contestant: str
    at_least: float
    against: str = STOCK
    threads: int = 2


@dataclass(frozen=True)
class Case:
    """One measurement. ``shape`` names its sizes; ``contestants`` are run beside stock torch, which always is."""

    suite: str
    operator: str
    shape: Mapping[str, int] = field(hash=False)
    mode: Mode
    contestants: tuple[str, ...]
    bars: tuple[Bar, ...] = ()
    dtype: torch.dtype = torch.float32
    label: str = ""
    device: str = "cpu"
    tf32: bool = False  # on a GPU, float32 products may round their factors to 10 bits, as torch's own RNNs do

    @property
    def name(self) -> str:
        sizes = ",".join(f"{key}{size}" for key, size in self.shape.items())
        name = f"{self.suite}/{self.operator}/{self.mode.value}/{sizes}"
        if self.suite == "scaling":
            name += f"/over {self.label}"
        return name if self.device == "cpu" else f"{name}/{self.precision}"

    @property
    def precision(self) -> str:
        """What products are computed in: the dtype's name, or tf32."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def tolerance(self) -> torch.dtype:
        """The dtype whose tolerance holds: tf32 has as many digits as float16."""
        return torch.float16 if self.tf32 else self.dtype

    @property
    def kind(self) -> str:
        """The cell of a recurrent operator, the score of an attention."""
        return self.operator.removesuffix("_cell").removesuffix("_attention")

    @property
    def active_steps(self) -> int:
        """Rows times steps of a recurrent case that carry data."""
        if self.suite == "lengths":
            return sum(ragged_lengths(self.shape["B"], self.shape["T"]))
        return self.shape["B"] * self.shape.get("T", LOOP_STEPS)

    @property
    def flops(self) -> float | None:
        """Operations of the matrix products of one call; None where they don't bound it (attention)."""
        gates = GATES.get(self.kind)
        if gates is None:
            return None
        forward = 2.0 * self.active_steps * gates * self.shape["H"] * (self.shape["I"] + self.shape["H"])
        return 3 * forward if self.mode.has_gradients else forward


def ragged_lengths(batch: int, longest: int) -> list[int]:
    """Lengths spread evenly from 1 to ``longest``, unsorted: their mean is half of it."""
    spread = [1 + round(row * (longest - 1) / max(1, batch - 1)) for row in range(batch)]
    spread[-1] = longest
    generator = torch.Generator().manual_seed(0)
    return [spread[i] for i in torch.randperm(batch, generator=generator).tolist()]


def _bars(contestant: str, figures: tuple[float, ...] | None, index: int) -> tuple[Bar, ...]:
    return (Bar(contestant, figures[index]),) if figures else ()


_FORWARD_FROZEN = {
    "gru": (9, 3.5, 2.8, 2.2, 1.55, 1.5),
    "lstm": (2, 1.45, 1.2, 1.15, 1.05, 1),
    "rnn_tanh": (3, 3, 2, 2, 1.4, 1.4),
}
_FORWARD = {"gru": (7, 3, 2.3, 2, 1.5, 1.45)}
_TRAINING = {"gru": (18, 3.5, 3, 2.1, 1.45, 1.35), "lstm": (2, 1.4, 1.1, 1, 1, 1)}
_BF16 = {"gru": 3.0, "lstm": 1.85}


def _recurrent() -> Iterator[Case]:
    nowhere_slower = (1.0,) * len(SHAPES)
    for kind in ("gru", "lstm", "rnn_tanh"):
        for index, shape in enumerate(SHAPES):
            forward = _bars("ours_frozen", _FORWARD_FROZEN[kind], index)
            forward += _bars("ours", _FORWARD.get(kind, nowhere_slower), index)
            if index >= 2:
                forward += (Bar("ours_frozen", 0.9, against=FMA_LIMIT),)
            label = f"S{index + 1}"
            yield Case("recurrent", kind, shape, Mode.FORWARD, ("ours_frozen", "ours"), forward, label=label)
            training = _bars("ours", _TRAINING.get(kind, nowhere_slower), index)
            yield Case("recurrent", kind, shape, Mode.TRAINING, ("ours",), training, label=label)
    for mode in (Mode.FORWARD, Mode.TRAINING):
        yield Case("recurrent", "rnn_relu", SHAPES[3], mode, ("ours",), (Bar("ours", 1.0),), label="S4")


def _lengths() -> Iterator[Case]:
    for kind in ("gru", "lstm", "rnn_tanh"):
        for hidden in (256, 512):
            shape = {"B": 32, "T": 100, "I": hidden, "H": hidden}
            names = ("ours_frozen", "ours_lengths", "ours")
            at_least = 1.0 if kind == "rnn_tanh" else 1.8
            bars = (Bar("ours_frozen", at_least), Bar("ours_lengths", at_least), Bar("ours", 1.0))
            yield Case("lengths", kind, shape, Mode.FORWARD, names, bars)
            yield Case("lengths", kind, shape, Mode.TRAINING, ("ours",), (Bar("ours", 1.0),))


def _cells() -> Iterator[Case]:
    # shape, frozen, not frozen, training
    table = (
        ({"B": 1, "I": 128, "H": 128}, 2.5, 2.5, 2.5),
        ({"B": 16, "I": 256, "H": 256}, 2.2, 1.7, 1.0),
        ({"B": 64, "I": 512, "H": 512}, 1.35, 1.0, 1.0),
    )
    for kind in ("gru", "lstm", "rnn_tanh"):
        for shape, frozen, plain, training in table:
            bars = (Bar("ours_frozen", frozen), Bar("ours", plain))
            yield Case("cells", f"{kind}_cell", shape, Mode.STEPS, ("ours_frozen", "ours"), bars)
            yield Case("cells", f"{kind}_cell", shape, Mode.STEPS_TRAINING, ("ours",), (Bar("ours", training),))


def _bf16() -> Iterator[Case]:
    for kind, at_least in _BF16.items():
        for index, shape in enumerate(SHAPES):
            bars = (Bar("ours_bf16", at_least),)
            yield Case("bf16", kind, shape, Mode.FORWARD, ("ours_bf16",), bars, label=f"S{index + 1}")


def _attention() -> Iterator[Case]:
    # B, T, S, A (values are as wide), forward, forward+backward; the first is one decoder step on prepared keys
    table = (
        ((32, 1, 100, 256), 35.0, 1.0),
        ((16, 50, 50, 256), 60.0, 35.0),
        ((8, 128, 512, 256), 60.0, 35.0),
        ((4, 512, 512, 512), 60.0, 35.0),
    )
    for sizes, forward, training in table:
        shape = dict(zip("BTSA", sizes, strict=True))
        peers = ("ours", "torch_compile")
        for mode, at_least, compiled in ((Mode.FORWARD, forward, 10.0), (Mode.TRAINING, training, 8.0)):
            bars = [Bar("ours", at_least)]
            if shape["T"] > 1:
                bars.append(Bar("ours", compiled, against="torch_compile"))
            yield Case("attention", "additive_attention", shape, mode, peers, tuple(bars))
    shape = dict(zip("BTSA", (16, 50, 50, 256), strict=True))
    for operator in ("dot_attention", "general_attention", "concat_attention", "feature_attention"):
        for mode in (Mode.FORWARD, Mode.TRAINING):
            yield Case("attention", operator, shape, mode, ("ours",), ())


def _attention_kinds() -> Iterator[Case]:
    # operator, sizes, forward; the first is a step of tacotron2
    table: tuple[tuple[str, dict[str, int], float], ...] = (
        ("location_attention", {"B": 32, "S": 200, "A": 128}, 5.0),
        ("feature_attention", {"B": 32, "S": 100, "A": 64}, 3.0),
        ("feature_attention", {"B": 64, "S": 200, "A": 128}, 3.0),
        ("pooling_attention", {"B": 32, "S": 100, "A": 64}, 3.0),
        ("pooling_attention", {"B": 64, "S": 200, "A": 128}, 3.0),
        ("softmax_weights", {"B": 32, "T": 50, "S": 50}, 2.0),
        ("softmax_weights", {"B": 16, "T": 100, "S": 400}, 2.0),
        ("sparsemax_weights", {"B": 32, "T": 50, "S": 50}, 3.0),
        ("sparsemax_weights", {"B": 16, "T": 100, "S": 400}, 3.0),
        ("entmax15_weights", {"B": 32, "T": 50, "S": 50}, 3.0),
        ("entmax15_weights", {"B": 16, "T": 100, "S": 400}, 3.0),
    )
    for operator, shape, at_least in table:
        yield Case("attention_kinds", operator, shape, Mode.FORWARD, ("ours",), (Bar("ours", at_least),))
        yield Case("attention_kinds", operator, shape, Mode.TRAINING, ("ours",), (Bar("ours", 1.0),))


def _peers() -> Iterator[Case]:
    engines = ("onnxruntime", "openvino")
    bars = tuple(Bar("ours_frozen", 1.0, against=engine) for engine in engines)
    for kind in ("rnn_tanh", "gru", "lstm"):
        for index in (0, 1, 3, 4, 5):
            names = ("ours_frozen", *engines, "torch_compile")
            yield Case("peers", kind, SHAPES[index], Mode.FORWARD, names, bars, label=f"S{index + 1}")


# operator: B, T, H
MODELS: Mapping[str, tuple[int, int, int]] = {
    "tagger": (32, 50, 256),
    "translator": (32, 30, 256),
    "recognizer": (8, 200, 320),
    "synthesizer": (16, 100, 256),
    "forecaster": (64, 168, 128),
}


def _models() -> Iterator[Case]:
    for operator, sizes in MODELS.items():
        shape = dict(zip("BTH", sizes, strict=True))
        yield Case("models", operator, shape, Mode.FORWARD, ("ours", "ours_frozen"), (Bar("ours", 1.0),))
        yield Case("models", operator, shape, Mode.TRAINING, ("ours",), (Bar("ours", 1.0),))


def _decoder() -> Iterator[Case]:
    for operator in ("gru_decoder", "lstm_decoder"):
        for sizes in ((32, 30, 30, 256), (1, 30, 30, 256)):
            shape = dict(zip("BTSH", sizes, strict=True))
            for mode in (Mode.FORWARD, Mode.TRAINING):
                yield Case("decoder", operator, shape, mode, ("ours",), (Bar("ours", 1.0),))
    # B, T, S, H, forward, forward+backward
    table = ((1, 50, 50, 256, 10.0, 4.0), (32, 50, 50, 256, 4.5, 3.0), (64, 50, 100, 512, 4.5, 3.0))
    for batch, steps, source, hidden, forward, training in table:
        shape = {"B": batch, "T": steps, "S": source, "H": hidden}
        yield Case("decoder", "gru_decoder", shape, Mode.FORWARD, ("ours",), (Bar("ours", forward),))
        yield Case("decoder", "gru_decoder", shape, Mode.TRAINING, ("ours",), (Bar("ours", training),))
    # Running freely: Tacotron 2 at its published sizes, weights packed anew for each call; a beam search.
    shape = {"B": 1, "T": 100, "S": 100, "H": 1024}
    yield Case("decoder", "tacotron2_decoder", shape, Mode.FORWARD, ("ours",), (Bar("ours", 3.0),))
    shape = {"B": 8, "K": 5, "T": 50, "S": 50, "H": 256, "V": 1000}
    yield Case("decoder", "beam_decoder", shape, Mode.FORWARD, ("ours",), (Bar("ours", 5.0),))


def _curve(suite_shape: Mapping[str, int], over: str, sizes: Iterable[int]) -> Iterator[dict[str, int]]:
    """The shape with one size after the other; the input is as wide as the hidden state."""
    for size in sizes:
        shape = {**suite_shape, over: size}
        yield {**shape, "I": shape["H"]} if "I" in shape else shape


def _scaling() -> Iterator[Case]:
    layer, attention = {"B": 8, "T": 100, "I": 256, "H": 256}, {"B": 8, "T": 32, "S": 128, "A": 256}
    for kind in ("gru", "lstm"):
        for over, sizes in (("T", (25, 50, 100, 200, 400, 800)), ("B", (1, 2, 4, 8, 16, 32, 64)),
                            ("H", (64, 128, 256, 512, 1024)), ("threads", (0,))):  # fmt: skip
            for shape in _curve(layer, over, sizes) if over != "threads" else [layer]:
                yield Case("scaling", kind, shape, Mode.FORWARD, ("ours",), label=over)
    for shape in _curve(attention, "S", (32, 64, 128, 256, 512, 1024)):
        yield Case("scaling", "additive_attention", shape, Mode.FORWARD, ("ours",), label="S")


SUITES: Mapping[str, tuple[Case, ...]] = {
    "recurrent": tuple(_recurrent()),
    "lengths": tuple(_lengths()),
    "cells": tuple(_cells()),
    "bf16": tuple(_bf16()),
    "attention": tuple(_attention()),
    "attention_kinds": tuple(_attention_kinds()),
    "peers": tuple(_peers()),
    "decoder": tuple(_decoder()),
    "models": tuple(_models()),
    "scaling": tuple(_scaling()),
}


# What is looked at every day, in under a minute: the case of each operator that would show most.
DAILY: frozenset[str] = frozenset(
    case.name
    for suite in ("recurrent", "lengths", "cells", "attention")
    for case in SUITES[suite]
    if (suite == "recurrent" and case.label in ("S1", "S4") and case.kind != "rnn_relu")
    or (suite == "lengths" and case.shape["H"] == 256 and case.kind != "rnn_tanh")
    or (suite == "cells" and case.shape["B"] == 16 and case.kind != "rnn_tanh")
    or (suite == "attention" and case.operator == "additive_attention" and case.shape["S"] <= 100)
)

# Cases of one GPU. The most telling come first: a run that has little time gets as far as it can.
CUDA_RECURRENT: tuple[dict[str, int], ...] = tuple(
    {"B": batch, "T": steps, "I": hidden, "H": hidden}
    for batch, steps, hidden in (
        (16, 1024, 512),
        (1, 1024, 256),
        (16, 1024, 768),
        (64, 512, 512),
        (64, 256, 1024),
        (7, 333, 200),
    )
)
# The largest hidden size whose weights one cluster of thread blocks holds with room for the rest, in 16 bits.
CLUSTER_HIDDEN = 512
BOTH_MODES = (Mode.FORWARD, Mode.TRAINING)


def _on_gpu(
    suite: str, operator: str, shape: Mapping[str, int], mode: Mode, names: tuple[str, ...], bars: tuple[Bar, ...],
    dtype: torch.dtype = torch.bfloat16, tf32: bool = False,
) -> Case:  # fmt: skip
    return Case(suite, operator, shape, mode, names, bars, dtype, device="cuda", tf32=tf32)


def _cuda_recurrent() -> Iterator[Case]:
    precisions = ((torch.bfloat16, False), (torch.float32, True))
    every = [(shape, *precision) for shape in CUDA_RECURRENT for precision in precisions]
    every += [(CUDA_RECURRENT[index], torch.float16, False) for index in (0, 2)]
    for shape, dtype, tf32 in every:
        at_least = 1.5 if not tf32 and shape["H"] <= CLUSTER_HIDDEN else 1.0
        # cuDNN as called, and its own time on the device: many of its launches wait for the host.
        bars = (Bar("ours", at_least), Bar("ours_graph", 1.0, against="torch_graph"))
        for kind in ("lstm", "gru"):
            for mode in BOTH_MODES:
                names: tuple[str, ...] = ("ours", "ours_graph", "torch_graph", "ours_cuda")
                if mode is Mode.FORWARD:
                    names += ("haste",) if tf32 else ("flashrnn",)
                yield _on_gpu("recurrent", kind, shape, mode, names, bars, dtype, tf32)


def _cuda_lengths() -> Iterator[Case]:
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True)):
        for kind in ("lstm", "gru"):
            for batch, steps, hidden in ((16, 1024, 512), (64, 512, 512)):
                shape = {"B": batch, "T": steps, "I": hidden, "H": hidden}
                for mode in BOTH_MODES:
                    names = ("ours_lengths", "ours", "torch_pack")
                    bars = (Bar("ours_lengths", 3.0), Bar("ours", 1.0))
                    yield _on_gpu("lengths", kind, shape, mode, names, bars, dtype, tf32)


def _cuda_cell_states() -> Iterator[Case]:
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True)):
        for batch, steps, hidden in ((16, 256, 512), (64, 256, 512)):
            shape = {"B": batch, "T": steps, "I": hidden, "H": hidden}
            bars = (Bar("ours", 20.0),)
            yield _on_gpu("cell_states", "lstm", shape, Mode.TRAINING, ("ours", "torch_graph"), bars, dtype, tf32)


def _cuda_cells() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("lstm", "gru"):
            for batch, hidden in ((1, 128), (64, 512)):
                for mode in (Mode.STEPS, Mode.STEPS_TRAINING):
                    names = ("ours", "ours_graph", "torch_graph")
                    shape = {"B": batch, "I": hidden, "H": hidden}
                    yield _on_gpu("cells", f"{kind}_cell", shape, mode, names, (Bar("ours", 1.0),), dtype)


def _cuda_additive() -> Iterator[Case]:
    names = ("ours", "ours_graph", "torch_compile", "torch_compile_graph", "torch_graph")
    # B, T, S, A (values are as wide); those of one query are steps of a decoder.
    for sizes in ((64, 512, 512, 512), (32, 1, 100, 256), (32, 128, 1024, 256), (256, 1, 512, 512)):
        shape = dict(zip("BTSA", sizes, strict=True))
        for dtype in (torch.bfloat16, torch.float32):
            for mode in BOTH_MODES:
                bars = (Bar("ours", 1.0, against="torch_compile"), Bar("ours", 1.0))
                yield _on_gpu("additive", "additive_attention", shape, mode, names, bars, dtype)


def _cuda_dot() -> Iterator[Case]:
    for sizes in ((64, 512, 512, 64), (256, 1, 512, 512), (32, 128, 1024, 256)):
        shape = dict(zip("BTSA", sizes, strict=True))
        for dtype in (torch.bfloat16, torch.float32):
            for mode in BOTH_MODES:
                names = ("ours_context", "torch_sdpa", "ours")
                bars = (Bar("ours_context", 1.0, against="torch_sdpa"), Bar("ours", 1.0))
                yield _on_gpu("dot", "dot_attention", shape, mode, names, bars, dtype)


def _cuda_decoder() -> Iterator[Case]:
    for sizes in ((64, 100, 100, 512), (1, 100, 100, 512), (16, 50, 50, 256)):
        shape = dict(zip("BTSH", sizes, strict=True))
        for operator in ("gru_decoder", "lstm_decoder"):
            for mode in BOTH_MODES:
                names = ("ours", "ours_graph", "torch_graph")
                bars = (Bar("ours", 1.0), Bar("ours_graph", 1.0, against="torch_graph"))
                yield _on_gpu("decoder", operator, shape, mode, names, bars)


def _cuda_models() -> Iterator[Case]:
    for operator, sizes in MODELS.items():
        shape = dict(zip("BTH", sizes, strict=True))
        for mode in BOTH_MODES:
            names, bars = ("ours", "torch_graph", "ours_graph"), (Bar("ours", 1.0),)
            yield _on_gpu("models", operator, shape, mode, names, bars, torch.float32, tf32=True)


def _cuda_scaling() -> Iterator[Case]:
    layer, attention = {"B": 16, "T": 256, "I": 512, "H": 512}, {"B": 16, "T": 64, "S": 512, "A": 256}
    curves = (
        ("lstm", layer, "T", (64, 256, 1024, 4096)),
        ("lstm", layer, "B", (1, 4, 16, 64, 256)),
        ("lstm", layer, "H", (128, 256, 512, 768, 1024)),
        ("additive_attention", attention, "S", (128, 512, 2048)),
        ("additive_attention", attention, "T", (1, 16, 256)),
    )
    for operator, shape, over, sizes in curves:
        for each in _curve(shape, over, sizes):
            for mode in BOTH_MODES if over == "T" else (Mode.FORWARD,):
                yield replace(_on_gpu("scaling", operator, each, mode, ("ours",), ()), label=over)


CUDA_SUITES: Mapping[str, tuple[Case, ...]] = {
    "recurrent": tuple(_cuda_recurrent()),
    "lengths": tuple(_cuda_lengths()),
    "cell_states": tuple(_cuda_cell_states()),
    "additive": tuple(_cuda_additive()),
    "dot": tuple(_cuda_dot()),
    "cells": tuple(_cuda_cells()),
    "decoder": tuple(_cuda_decoder()),
    "models": tuple(_cuda_models()),
    "scaling": tuple(_cuda_scaling()),
}


def is_ours(name: str) -> bool:
    """Whether a contestant is what a user of the package gets."""
    return name.startswith("ours") and name not in BY_NAME


def find(pattern: str = "") -> list[Case]:
    """Every case whose name contains ``pattern``."""
    return [case for cases in SUITES.values() for case in cases if pattern in case.name]
