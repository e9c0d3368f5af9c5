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


def work(case: Case) -> Work:
    """Of one call; a backward reads the inputs again and writes gradients, and has twice the products of a forward."""
    shape, trained = case.shape, case.mode.has_gradients
    element = torch.empty((), dtype=case.dtype).element_size()
    if case.operator.endswith("_attention"):
        batch, steps, source, width = (shape[key] for key in "BTSA")
        # query, keys, values, context; the weights
        moved = batch * (2 * steps + 2 * source) * width + batch * steps * source
        products = 2.0 * batch * steps * source * width * (2 if case.operator == "dot_attention" else 1)
        elements = batch * steps * source * width if case.operator == "additive_attention" else 0
        if trained:
            return Work(2.0 * moved * element, 3 * products, 2.0 * elements)
        return Work(float(moved * element), products, float(elements))
    if case.operator.endswith("_decoder"):
        batch, steps, source, hidden = (shape[key] for key in "BTSH")
        # input, output, keys, values, weights of the attention; those of cell and query, which stay on the chip
        gates, rows = GATES[case.operator.removesuffix("_decoder")], batch * steps
        parameters = hidden * hidden * (3 * gates + 1)
        moved = 2 * rows * hidden + 2 * batch * source * hidden + rows * source + parameters
        products = 2.0 * rows * (parameters + source * hidden)
        elements = rows * source * hidden
        if trained:
            return Work(2.0 * moved * element, 3 * products, 2.0 * elements)
        return Work(float(moved * element), products, float(elements))
    gates, rows = GATES[case.kind], case.active_steps
    weights = gates * shape["H"] * (shape["I"] + shape["H"])
    states = 2 if case.suite == "cell_states" else 1
    moved = rows * (shape["I"] + states * shape["H"]) + weights * (LOOP_STEPS if "T" not in shape else 1)
    return Work(float(moved * element * (2 if trained else 1)), case.flops or 0.0, 0.0)
