"""How much a case has to do, whoever does it: values moved, operations of products, elements of scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import GATES, LOOP_STEPS, Case

# Of one element of an additive score: an addition, tanh, a product and its sum.
OPERATIONS_OF_ELEMENT = 4


@dataclass(frozen=True)
class Work:
    size: float  # bytes, each input read once and each result written once
    products: float  # floating-point operations of products
    elements: float  # B * T * S * A of additive scores

    @property
    def operations(self) -> float:
        return self.products + OPERATIONS_OF_ELEMENT * self.elements


def work(case: Case) -> Work | None:
    """Of one call; a backward reads the inputs again and writes gradients, and has twice the products of a forward.

    None for whole models, which nobody has counted.
    """
    element = torch.empty((), dtype=case.dtype).element_size()
    if case.suite == "models":
        return None
    if case.suite == "attention_kinds":
        moved, products, elements = _kind(case)
    elif case.operator.endswith("_attention"):
        moved, products, elements = _attention(case)
    elif case.operator.endswith("_decoder"):
        moved, products, elements = _decoder(case)
    elif case.kind in GATES:
        rows, (inputs, hidden) = case.active_steps, (case.shape["I"], case.shape["H"])
        weights = GATES[case.kind] * hidden * (inputs + hidden)
        states = 2 if case.suite == "cell_states" else 1
        moved = rows * (inputs + states * hidden) + weights * (LOOP_STEPS if "T" not in case.shape else 1)
        products, elements = 2.0 * rows * weights, 0.0
    else:
        return None
    if case.mode.has_gradients:
        moved, products, elements = 2 * moved, 3 * products, 2 * elements
    return Work(moved * element, products, elements)


def _attention(case: Case) -> tuple[float, float, float]:
    batch, steps, source, width = (case.shape[key] for key in "BTSA")
    # query, keys, values, context; the weights
    moved = batch * (2 * steps + 2 * source) * width + batch * steps * source
    products = 2.0 * batch * steps * source * width * (2 if case.operator == "dot_attention" else 1)
    return moved, products, batch * steps * source * width if case.operator == "additive_attention" else 0


def _decoder(case: Case) -> tuple[float, float, float]:
    batch, steps, source, hidden = (case.shape[key] for key in "BTSH")
    # input, output, keys, values, weights of the attention; those of cell and query, which stay on the chip
    gates, rows = GATES[case.operator.removesuffix("_decoder")], batch * steps
    parameters = hidden * hidden * (3 * gates + 1)
    moved = 2 * rows * hidden + 2 * batch * source * hidden + rows * source + parameters
    return moved, 2.0 * rows * (parameters + source * hidden), rows * source * hidden


def _kind(case: Case) -> tuple[float, float, float]:
    from benchmarks.attention_kinds import FILTERS, TAPS

    batch, source = case.shape["B"], case.shape["S"]
    if case.operator.endswith("_weights"):
        return 2 * batch * case.shape["T"] * source, 0.0, 0.0
    width, rows = case.shape["A"], batch * source
    if case.operator == "location_attention":
        # keys and values four times as wide, two histories; the convolution, its projection, the context
        products = 2.0 * rows * (2 * FILTERS * TAPS + FILTERS * width + 4 * width)
        return rows * (5 * width + 3), products, rows * width
    # the states, read once, and what comes of them: weighted states and weights, or one context and weights
    results = 2 * rows * width if case.operator == "feature_attention" else batch * width + rows
    return rows * width + width * width + results, 2.0 * rows * width * width, rows * width
