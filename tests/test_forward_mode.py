"""Derivatives carried forward with the values: kernels have none, so the reference serves and nothing is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from seqattn_kernels import backends, functional, nn
from seqattn_kernels.nn import AttentionDecoder
from tests.cases import KINDS as CELLS
from tests.test_containment import KINDS as SCORES
from tests.test_containment import Kind

STEP = 1e-6


def tangents(compute: Callable[..., Any], inputs: list[Tensor], directions: list[Tensor]) -> list[Tensor | None]:
    with forward_ad.dual_level():
        found = compute(*map(forward_ad.make_dual, inputs, directions))
        found = found if isinstance(found, tuple) else (found,)
        return [forward_ad.unpack_dual(t).tangent for t in found]


def assert_tangents(compute: Callable[..., Any], *inputs: Tensor) -> None:
    """Against central differences, taken of what the kernels compute."""
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in inputs]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            end = compute(*(t + sign * STEP * d for t, d in zip(inputs, directions, strict=True)))
        ends.append(end if isinstance(end, tuple) else (end,))
    found = tangents(compute, list(inputs), directions)
    for got, up, down in zip(found, *ends, strict=True):
        assert got is not None
        torch.testing.assert_close(got, (up - down) / (2 * STEP), rtol=1e-6, atol=1e-8)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_recurrence(kind: str, gradients: bool) -> None:
    stock = CELLS[kind].module
    module = getattr(nn, stock.__name__)(3, 4, **dict(CELLS[kind].options)).double().requires_grad_(gradients)
    assert_tangents(lambda x: module(x)[0], *drawn((5, 2, 3)))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name: str, gradients: bool) -> None:
    cell = getattr(nn, name)(3, 4).double().requires_grad_(gradients)
    assert_tangents(lambda x: cell(x), *drawn((2, 3)))


@pytest.mark.parametrize("name", SCORES)
def test_attention(name: str) -> None:
    kind: Kind = SCORES[name]
    steps = kind.steps[0] if kind.steps else 3
    query, keys, values, *parameters = drawn((2, steps, 6), (2, 7, 6), (2, 7, 4), *kind.parameters)
    if kind.beside:
        beside = {"B": 2, "T": steps, "S": 7}
        parameters.insert(0, torch.rand([beside[letter] for letter in kind.beside], dtype=torch.float64))
    lengths = torch.tensor([7, 4])

    def compute(*tensors: Tensor) -> Tensor:
        return kind.attend(*tensors[:3], list(tensors[3:]), lengths=lengths)[0]

    assert_tangents(compute, query, keys, values, *parameters)


@pytest.mark.parametrize("name", ["masked_softmax", "sparsemax", "entmax15"])
def test_weights(name: str) -> None:
    normalize = getattr(functional, name)
    assert_tangents(lambda scores: normalize(scores, lengths=torch.tensor([7, 4])), *drawn((2, 3, 7)))


def test_decoder() -> None:
    decoder = AttentionDecoder(3, 4, 5, attention_size=6).double().requires_grad_(False)
    assert_tangents(lambda x, keys: decoder(x, keys)[0], *drawn((2, 3, 3), (2, 7, 5)))


def test_a_step_from_a_state_that_was_packed_before() -> None:
    decoder = AttentionDecoder(3, 4, 5, attention_size=6).double()
    x, keys = drawn((2, 3), (2, 7, 5))
    with torch.no_grad():
        state = decoder.begin(keys)
        assert_tangents(lambda x: decoder.step(x, state)[0], x)


def test_a_kernel_asked_for_by_name_says_why() -> None:
    query, keys = drawn((2, 3, 4), (2, 5, 4))
    native = backends.choose(backends.ATTENTION, backends.AttentionRequest(query.device, query.dtype))
    if native == "reference":
        pytest.skip("no kernels here")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        functional.additive_attention(query, keys, keys[0, 0], backend=native)
