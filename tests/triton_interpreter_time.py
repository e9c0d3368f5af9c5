"""Tests of the Triton kernels over time, for the interpreter: features, pooling, monotonic alignment. See
test_triton_kernels.py, which runs them."""

from __future__ import annotations

import pytest
import torch

from seqattn_kernels import kernels, reference
from seqattn_kernels.kernels import alignment, features
from seqattn_kernels.kernels.launch import EVERYTHING, Masks
from tests.compare import assert_close_to_float64, assert_same_bits
from tests.triton_interpreter import INF, NAN, masks_of, quiet

__all__ = ["quiet"]  # a fixture

# Whole, and split over programs: tiles are 16 x 64.
FEATURES = [(3, 37, 5), (2, 1, 1), (1, 70, 66)]


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("mask", ["none", "lengths", "[B, S]", "[B, 1, S]"])
@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_features_over_time(shape, mask, reduce):
    inner, input = torch.randn(shape) * 2, torch.randn(shape)
    inner.view(-1)[0] = 1e4
    inner.view(-1)[-1] = -1e4
    lengths, allowed = masks_of(mask, shape[0], 1, shape[1])
    keep = reference.attention.attended(input, lengths, allowed)
    keep = None if keep is None else keep.transpose(1, 2)
    wide = [t.double().requires_grad_() for t in (inner, input)]
    expected = reference.attention.feature_weighted(*wide, keep, reduce)
    if keep is not None:
        for t in (inner, input):
            t.masked_fill_(~keep, NAN)
    masks = Masks.of(lengths, allowed)
    found = features.weighted_fwd(inner, input, masks, reduce)
    assert_close_to_float64(found, expected, names=("result", "weights"))
    directions = [torch.randn(t.shape) for t in expected]
    for some in ((True, True), (True, False), (False, True)):
        given = [d if there else None for d, there in zip(directions, some, strict=True)]
        gradients = features.weighted_bwd(inner, input, found[1], *given, masks, reduce)
        outputs = [e for e, there in zip(expected, some, strict=True) if there]
        wanted = torch.autograd.grad(
            outputs, wide, [d.double() for d in given if d is not None], retain_graph=True, materialize_grads=True
        )
        assert_close_to_float64(gradients, wanted, names=("inner", "input"))


def test_features_over_time_in_halves_and_of_any_size():
    inner, input = torch.randn(2, 19, 6).bfloat16(), torch.randn(2, 19, 6).bfloat16()
    wide = [t.double().requires_grad_() for t in (inner, input)]
    expected = reference.attention.feature_weighted(*wide)
    found = features.weighted_fwd(inner, input, EVERYTHING, False)
    assert_close_to_float64(found, expected)
    direction = torch.randn(2, 19, 6).bfloat16()
    gradients = features.weighted_bwd(inner, input, found[1], direction, None, EVERYTHING, False)
    wanted = torch.autograd.grad(expected[0], wide, direction.double())
    assert_close_to_float64(gradients, wanted)
    for value in (NAN, INF, -INF, 1e30, 1e-30):
        inner, input = torch.randn(1, 7, 3), torch.randn(1, 7, 3)
        inner[0, 2, 1] = value
        wide = inner.double().requires_grad_()
        expected = reference.attention.feature_weighted(wide, input.double())
        found = features.weighted_fwd(inner, input, EVERYTHING, False)
        assert_close_to_float64(found, expected)
        d_inner, _ = features.weighted_bwd(inner, input, found[1], input, None, EVERYTHING, False)
        assert_close_to_float64(d_inner, torch.autograd.grad(expected[0], wide, input.double())[0])


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("mask", ["none", "lengths", "[B, S]"])
def test_features_with_their_linear_layer(mask, reduce):
    input, weight, bias = torch.randn(2, 19, 6), torch.randn(6, 6), torch.randn(6)
    lengths, allowed = masks_of(mask, 2, 1, 19)
    keep = reference.attention.attended(input, lengths, allowed)
    keep = None if keep is None else keep.transpose(1, 2)
    wide = [t.double().requires_grad_() for t in (input, weight, bias)]
    expected = reference.attention.feature_attention(*wide, keep, reduce)
    if keep is not None:
        input.masked_fill_(~keep, NAN)
    *found, tangents = kernels.feature_fwd(input, weight, bias, lengths, allowed, reduce, True)
    assert_close_to_float64(found, expected)
    assert kernels.feature_fwd(input, weight, bias, lengths, allowed, reduce, False)[2].numel() == 0
    directions = [torch.randn(t.shape) for t in expected]
    wanted = torch.autograd.grad(expected, wide, [d.double() for d in directions])
    saved = (input, weight, bias, found[1], tangents, *directions, lengths, allowed, reduce)
    assert_close_to_float64(kernels.feature_bwd(*saved, True), wanted, names=("input", "weight", "bias"))
    without, d_weight, none = kernels.feature_bwd(input, weight, None, *saved[3:], False)
    assert without.numel() == none.numel() == 0
    assert_close_to_float64(d_weight, wanted[1])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_features_of_nothing(shape):
    x, weight, bias = torch.zeros(shape), torch.zeros(shape[2], shape[2]), torch.zeros(shape[2])
    for reduce in (False, True):
        result, weights, kept = kernels.feature_fwd(x, weight, None, None, None, reduce, True)
        assert result.shape == ((shape[0], shape[2]) if reduce else shape)
        assert result.eq(0).all()
        assert weights.shape == shape
        found = kernels.feature_bwd(x, weight, bias, weights, kept, result, None, None, None, reduce, True)
        assert [g.shape for g in found] == [x.shape, weight.shape, bias.shape]


def test_features_bad_input():
    x, w = torch.zeros(2, 3, 4), torch.zeros(4, 4)
    for error, message, arguments in (
        (ValueError, r"input: expected \[B, S, D\], got \[3, 4\]", (x[0], w, None, None, None)),
        (
            ValueError,
            r"weight: expected \[D, D\] with D=4 \(from input\), got \[4, 3\]",
            (x, w[:, 1:], None, None, None),
        ),
        (TypeError, r"weight: expected torch.float32 \(from input\)", (x, w.bfloat16(), None, None, None)),
        (TypeError, r"input: expected one of .*, got torch.float64", (x.double(), w, None, None, None)),
        (ValueError, r"bias: expected \[D\] with D=4 \(from input\), got \[3\]", (x, w, w[0, 1:], None, None)),
        (TypeError, "mask: expected torch.bool, got torch.float32", (x, w, None, None, torch.zeros(2, 3))),
        (ValueError, r"lengths: expected \[B\] with B=2", (x, w, None, torch.zeros(3, dtype=torch.int64), None)),
    ):
        with pytest.raises(error, match=message):
            kernels.feature_fwd(*arguments, True, True)
    with pytest.raises(ValueError, match=r"d_result: expected \[2, 4\], got \[2, 3, 4\]"):
        kernels.feature_bwd(x, w, None, x, x, x, None, None, None, True, True)


# Pooling


@pytest.mark.parametrize("shape", [(2, 37, 33, 3), (1, 1, 1, 1), (1, 33, 5, 35)], ids=str)
def test_pooling(shape):
    B, S, A, R = shape
    inner, v = torch.randn(B, S, A) * 2, torch.randn(R, A)
    inner.view(-1)[0], inner.view(-1)[-1] = 1e4, -1e30
    wide = [t.double().requires_grad_() for t in (inner, v)]
    expected = (wide[0].tanh() @ wide[1].t()).transpose(1, 2)
    assert_close_to_float64(kernels.pool_fwd(inner, v), expected)
    direction = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, wide, direction.double())
    assert_close_to_float64(kernels.pool_bwd(direction, inner, v), wanted, names=("inner", "v"))


def test_pooling_in_halves():
    # float16 alone: the interpreter multiplies matrices of bfloat16 by their bits.
    inner, v, direction = (t.half() for t in (torch.randn(2, 40, 20), torch.randn(3, 20), torch.randn(2, 3, 40)))
    wide = [t.double().requires_grad_() for t in (inner, v)]
    expected = (wide[0].tanh() @ wide[1].t()).transpose(1, 2)
    assert_close_to_float64(kernels.pool_fwd(inner, v), expected)
    found = kernels.pool_bwd(direction, inner, v)
    assert_close_to_float64(found, torch.autograd.grad(expected, wide, direction.double()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)], ids=str)
def test_pooling_of_nothing(shape):
    B, S, A, R = shape
    inner, v = torch.ones(B, S, A), torch.ones(R, A)
    scores = kernels.pool_fwd(inner, v)
    assert scores.shape == (B, R, S)
    assert scores.eq(0).all()
    assert all(g.eq(0).all() for g in kernels.pool_bwd(scores, inner, v))


def test_pooling_bad_input():
    inner, v = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    for error, message, arguments in (
        (ValueError, r"inner: expected \[B, S, A\], got \[3, 4\]", (inner[0], v)),
        (ValueError, r"v: expected \[R, A\] with A=4 \(from inner\), got \[4, 5\]", (inner, v.t())),
        (TypeError, r"v: expected torch.float32 \(from inner\)", (inner, v.bfloat16())),
    ):
        with pytest.raises(error, match=message):
            kernels.pool_fwd(*arguments)
    with pytest.raises(ValueError, match=r"d_scores: expected .* the shape of the scores"):
        kernels.pool_bwd(inner, inner, v)


# Monotonic alignment


def walked(choose, previous):
    """The recurrence, a key at a time."""
    rows = []
    for t in range(choose.shape[1]):
        passes, row = torch.zeros_like(previous[:, 0]), []
        for s in range(choose.shape[2]):
            q = passes + previous[:, s]
            row.append(choose[:, t, s] * q)
            passes = (1 - choose[:, t, s]) * q
        previous = torch.stack(row, 1)
        rows.append(previous)
    return torch.stack(rows, 1)


def align_and_back(choose, previous):
    weights = kernels.monotonic_fwd(choose, previous)
    wide = [t.double().requires_grad_() for t in (choose, previous)]
    expected = walked(*wide)
    assert_close_to_float64(weights, expected)
    direction = torch.randn(choose.shape)
    found = kernels.monotonic_bwd(choose, previous, weights, direction)
    wanted = torch.autograd.grad(expected, wide, direction.double())
    assert_close_to_float64(found, wanted, names=("choose", "previous"))
    return weights


@pytest.mark.parametrize("block", [32, alignment.LARGEST_BLOCK])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 4, 33), (1, 3, 70), (3, 5, 64)], ids=str)
def test_monotonic(shape, block, monkeypatch):
    monkeypatch.setattr(alignment, "LARGEST_BLOCK", block)
    choose = torch.rand(shape)
    align_and_back(choose, torch.rand(shape[0], shape[2]).softmax(-1))
    align_and_back((choose > 0.6).float(), torch.eye(shape[2])[:1].repeat(shape[0], 1))
    align_and_back(choose.masked_fill(torch.rand(shape) > 0.5, 0), torch.rand(shape[0], shape[2]))


@pytest.mark.parametrize("value", [1 - 1e-6, 1e-6, 0.5])
def test_monotonic_where_products_vanish(value):
    """A quotient of products of 1 - p, as in the paper's formula, would be 0 / 0."""
    start = torch.zeros(1, 200)
    start[:, 0] = 1
    weights = align_and_back(torch.full((1, 3, 200), value), start)
    assert weights.sum(-1).le(1 + 1e-6).all()


def test_hard_monotonic_is_exact():
    choose = (torch.rand(2, 6, 40) > 0.7).float()
    start = torch.zeros(2, 40)
    start[:, 0] = 1
    assert_same_bits(kernels.monotonic_fwd(choose, start), walked(choose, start))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_monotonic_of_nothing(shape):
    choose, previous = torch.zeros(shape), torch.zeros(shape[0], shape[2])
    weights = kernels.monotonic_fwd(choose, previous)
    assert weights.shape == shape
    d_choose, d_previous = kernels.monotonic_bwd(choose, previous, weights, weights)
    assert d_choose.shape == shape
    assert d_previous.shape == previous.shape
    assert d_previous.eq(0).all()


def test_monotonic_bad_input():
    choose, previous = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    for error, message, arguments in (
        (ValueError, r"choose: expected \[B, T, S\], got \[3, 4\]", (choose[0], previous)),
        (
            ValueError,
            r"previous: expected \[B, S\] with B=2, S=4 .*, got \[4, 2\]",
            (choose, previous.t()),
        ),
        (TypeError, "choose: expected torch.float32, got torch.float64", (choose.double(), previous)),
        (TypeError, r"previous: expected torch.float32 \(from choose\)", (choose, previous.bfloat16())),
    ):
        with pytest.raises(error, match=message):
            kernels.monotonic_fwd(*arguments)
    with pytest.raises(ValueError, match="d_weights: expected the shape of choose"):
        kernels.monotonic_bwd(choose, previous, choose, choose[:1])
