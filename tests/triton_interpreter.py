"""Tests of the Triton kernels for the interpreter: every kernel and branch, at small odd sizes. See
test_triton_kernels.py, which runs them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from seqattn_kernels import kernels, reference
from seqattn_kernels.kernels import attention, rows, score_backward, score_forward, step, tiles
from seqattn_kernels.kernels.exponentials import bits_of, form_of
from seqattn_kernels.kernels.launch import Masks
from seqattn_kernels.kernels.scores import SCORES, register
from seqattn_kernels.ops import attention_cuda
from tests.compare import TOLERANCE, assert_close_to_float64, assert_same_bits, difference, to_float64

NAN, INF = float("nan"), float("inf")
ADDITIVE = SCORES["additive"]
NAMES = ("context", "weights")
GRADIENTS = ("query", "keys", "values", "v")
# Kernel tiles are 32 x 128 forward and 16 x 128 backward: sizes below, at and above an edge.
SHAPES = [(2, 5, 7, 9, 3), (1, 33, 130, 17, 5), (1, 32, 128, 16, 4), (1, 6, 1, 1, 1), (1, 17, 3, 129, 2)]
STEPS = [(3, 1, 37, 17, 5), (2, 1, 1, 1, 1), (1, 4, 70, 33, 40), (2, 3, 5, 4, 130)]
SPLIT_STEPS = [(2, 1, 300, 17, 130), (1, 2, 700, 5, 3)]  # whose keys are split over programs, and joined


@pytest.fixture(autouse=True)
def quiet():
    """Infinities and NaN are meant; NumPy warns of them."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def inputs(B, T, S, A, D, dtype=torch.float32, size=1.0):
    return [
        (torch.randn(B, T, A) * size).to(dtype),
        (torch.randn(B, S, A) * size).to(dtype),
        torch.randn(B, S, D).to(dtype),
        (torch.randn(A) / math.sqrt(A)).to(dtype),
    ]


def masks_of(name, B, T, S):
    lengths = torch.randint(0, S + 1, (B,))
    lengths[0] = 0
    allowed = torch.rand(B, T, S) > 0.4
    allowed[:, :, S // 2] = False
    added = torch.randn(B, 1, S).masked_fill(~allowed[:, :1], -INF)
    one = allowed[:, 0].clone()
    one[0] = False
    return {
        "none": (None, None),
        "lengths": (lengths, None),
        "[B, S]": (None, one),
        "[B, 1, S]": (lengths, one.unsqueeze(1)),
        "[B, T, S]": (None, allowed),
        "added": (lengths, added),
        "added [B, T, S]": (None, torch.randn(B, T, S).masked_fill(~allowed, -INF)),
    }[name]


def poison(tensors, lengths, mask):
    """NaN where no query attends."""
    _, keys, values, _ = tensors
    attend = reference.attention.attended(keys, lengths, mask)
    if attend is not None:
        nobody = ~attend.any(1).expand(keys.shape[:2])
        keys[nobody] = NAN
        values[nobody] = INF


def attend_and_back(tensors, lengths, mask, d_context, d_weights):
    query, keys, values, v = tensors
    single = query.dim() == 2
    context, weights = kernels.additive_fwd(query, keys, None, values, v, lengths, mask, True)
    found = kernels.additive_bwd(query, keys, values, v, weights, d_context, d_weights, lengths, mask, True)
    again, none = kernels.additive_fwd(query, keys, None, values, v, lengths, mask, False)
    assert none.numel() == 0
    assert_same_bits(again, context)
    assert single == (context.dim() == 2)
    return (context, weights), found


def assert_right(tensors, lengths=None, mask=None, dtype=None):
    wide = [t.requires_grad_() for t in to_float64(tensors)]
    expected = reference.attention.additive_attention(*wide, lengths, to_float64(mask))
    directions = [torch.randn(t.shape).to(tensors[0].dtype) for t in expected]
    found, gradients = attend_and_back(tensors, lengths, mask, *directions)
    assert_close_to_float64(found, expected, dtype, names=NAMES)
    wanted = torch.autograd.grad(expected, wide, [d.double() for d in directions])
    assert_close_to_float64(gradients, wanted, dtype, names=GRADIENTS)


@pytest.mark.parametrize("mask", ["none", "lengths", "[B, S]", "[B, 1, S]", "[B, T, S]", "added", "added [B, T, S]"])
@pytest.mark.parametrize("shape", [SHAPES[0], STEPS[0], STEPS[2], SPLIT_STEPS[0]], ids=str)
def test_masks(shape, mask):
    tensors, (lengths, attend) = inputs(*shape), masks_of(mask, *shape[:3])
    poison(tensors, lengths, attend)
    assert_right(tensors, lengths, attend)


@pytest.mark.parametrize("shape", SHAPES + STEPS + SPLIT_STEPS, ids=str)
def test_shapes(shape):
    assert_right(inputs(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], STEPS[0]], ids=str)
def test_halves(shape, dtype):
    assert_right(inputs(*shape, dtype), torch.tensor([shape[2] - 1] * shape[0]))


@triton.jit
def form_kernel(out, q_size, k_size, top):
    tl.store(out, form_of(q_size, k_size, 4 * bits_of(top)))


def form(q, k):
    out = torch.empty(1, dtype=torch.int32)
    form_kernel[(1,)](out, q.abs().max().item(), k.abs().max().item(), (q.max() + k.max()).item())
    return int(out)


# The form each size takes: direct below 1/32, merged, bounded, direct past 32.
@pytest.mark.parametrize(
    ("size", "expected"), [(1e-3, 2), (0.5, 0), (2.0, 0), (9.0, 1), (60.0, 2), (1e4, 2), (1e30, 2)]
)
def test_any_size(size, expected):
    tensors = inputs(1, 33, 40, 18, 3)
    for t in tensors[:2]:
        t.clamp_(-2, 2).view(-1)[0] = 2
        t.mul_(size)
    assert form(*tensors[:2]) == expected
    wide, stock = ([t.requires_grad_() for t in group] for group in (to_float64(tensors), [t.clone() for t in tensors]))
    expected_results = reference.attention.additive_attention(*wide)
    directions = [torch.randn(t.shape) for t in expected_results]
    found, ours = attend_and_back(tensors, None, None, *directions)
    assert_close_to_float64(found, expected_results, names=NAMES)
    oracle = torch.autograd.grad(expected_results, wide, [d.double() for d in directions])
    theirs = torch.autograd.grad(reference.attention.additive_attention(*stock), stock, directions)
    for name, mine, other, exact in zip(GRADIENTS, ours, theirs, oracle, strict=True):
        # Where cancellation leaves no digits to a tolerance: no further from float64 than the plain formula.
        error, stock_error = ((g.double() - exact).abs().max().item() for g in (mine, other))
        assert error <= 3 * stock_error + TOLERANCE[mine.dtype] * exact.abs().max().item() + 1e-37, name


def test_forms_meet_in_one_call():
    tensors = inputs(2, 40, 140, 5, 3)
    for t in tensors[:2]:
        t[0, :20] *= 1e-3
        t[0, 32:] *= 9
        t[1, 30:] *= 100
    assert_right(tensors)


@pytest.mark.parametrize(
    ("q", "k"), [(100.0, -95.0), (1e4, 1 - 1e4), (1e30, -1e30), (INF, -1e30), (-INF, 3.0), (30.0, -30.5)]
)
@pytest.mark.parametrize("T", [1, 5])
def test_sums_that_cancel(q, k, T):
    query, keys = torch.full((1, T, 6), q), torch.full((1, 9, 6), k)
    v = torch.randn(6)
    scores = kernels.scores_fwd("additive", query, keys, v)
    expected = reference.attention.additive_scores(query, keys, v)
    assert difference(scores, expected.double()) is None


@pytest.mark.parametrize("place", ["query", "keys", "v"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("T", [1, 7])
def test_not_finite_spreads_as_in_eager(T, value, place):
    query, keys, _, v = inputs(1, T, 9, 6, 1)
    {"query": query, "keys": keys, "v": v}[place].view(-1)[3] = value
    scores = kernels.scores_fwd("additive", query, keys, v)
    assert difference(scores, reference.attention.additive_scores(query, keys, v).double()) is None


@pytest.mark.parametrize(
    "v", [[0.0] * 6, [1.0, 0, 0, 0, 0, 1e-12], [1e-30] * 6, [1e20, 1e20, -1, 0, 3, 1], [1e-40] * 6]
)
@pytest.mark.parametrize("T", [1, 7])
def test_any_size_of_v(v, T):
    query, keys, _, _ = inputs(1, T, 9, 6, 1)
    v = torch.tensor(v)
    scores = kernels.scores_fwd("additive", query, keys, v)
    expected = reference.attention.additive_scores(query.double(), keys.double(), v.double())
    error = (scores - expected).abs().max()
    assert error <= 1e-6 * v.abs().max() + 1e-44


@pytest.mark.parametrize("tile", tiles.FORWARD_TILES, ids=str)
def test_forward_tiles(tile):
    query, keys, _, v = inputs(1, 33, 140, 21, 1)
    scores = score_forward.scores_fwd(ADDITIVE, query, keys, v, tile=tile)
    wide = [t.double() for t in (query, keys, v)]
    assert_close_to_float64(scores, reference.attention.additive_scores(*wide))


@pytest.mark.parametrize("tile", tiles.BACKWARD_TILES, ids=str)
def test_backward_tiles(tile):
    query, keys, _, v = inputs(1, 19, 9, 130, 1)
    wide = [t.double().requires_grad_() for t in (query, keys, v)]
    scores = reference.attention.additive_scores(*wide)
    direction = torch.randn(scores.shape)
    found = score_backward.scores_bwd(ADDITIVE, direction, query, keys, v, tile=tile)
    assert_close_to_float64(found, torch.autograd.grad(scores, wide, direction.double()))
    assert_same_bits(score_backward.scores_bwd(ADDITIVE, direction, query, keys, v, tile=tile), found)


@pytest.mark.parametrize("T", [1, 5])
def test_gradient_of_context_alone_and_of_weights_alone(T):
    query, keys, values, v = tensors = inputs(2, T, 11, 6, 3)
    wide = [t.double().requires_grad_() for t in tensors]
    expected = reference.attention.additive_attention(*wide)
    _, weights = kernels.additive_fwd(query, keys, None, values, v, None, None, True)
    for i in (0, 1):
        direction = torch.randn(expected[i].shape)
        given = (direction, None) if i == 0 else (None, direction)
        found = kernels.additive_bwd(query, keys, values, v, weights, *given, None, None, i == 0)
        wanted = torch.autograd.grad(expected[i], wide, direction.double(), allow_unused=True, retain_graph=True)
        for place, ours, theirs in zip(GRADIENTS, found, wanted, strict=True):
            if place == "values" and i == 1:
                assert ours.numel() == 0
            else:
                assert_close_to_float64(ours, theirs, names=place)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("T", [4, 7])
def test_what_some_queries_see_stays_with_them(T, value, added):
    """The first queries see the first keys, of which one is not finite; the others see the others."""
    S, queries, some = 11, T // 2, 5
    tensors = inputs(2, T, S, 6, 3)
    mask = torch.zeros(2, T, S, dtype=torch.bool)
    mask[:, :queries, :some] = mask[:, queries:, some:] = True
    wide = [t.requires_grad_() for t in to_float64(tensors)]
    expected = reference.attention.additive_attention(*wide, None, mask)
    directions = [torch.randn(t.shape) for t in expected]
    wanted = torch.autograd.grad(expected, wide, [d.double() for d in directions])
    tensors[1][:, 2] = tensors[2][:, 2] = value
    given = torch.zeros(2, T, S).masked_fill(~mask, -INF) if added else mask
    found, gradients = attend_and_back(tensors, None, given, *directions)
    assert_close_to_float64([t[:, queries:] for t in found], [t[:, queries:] for t in expected], names=NAMES)
    sound = [(gradients[0], wanted[0], queries), *((gradients[i], wanted[i], some) for i in (1, 2))]
    for name, (ours, theirs, first) in zip(GRADIENTS, sound, strict=False):
        assert_close_to_float64(ours[:, first:], theirs[:, first:], names=[name])
    assert not found[0][:, :queries].isfinite().any()
    assert (found[1][~mask] == 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 17, 9, 130), (1, 1, 1, 1), (2, 3, 0, 4), (0, 3, 5, 4)], ids=str)
def test_values_without_weight_may_be_anything(shape):
    B, T, S, D = shape
    weights, values = torch.rand(B, S, T).transpose(1, 2), torch.randn(B, S, D)
    weights = weights * (torch.rand(B, T, S) > 0.5)
    values.view(-1)[::3] = NAN
    values.view(-1)[1::7] = INF
    terms = weights.double().unsqueeze(-1) * values.double().unsqueeze(1)
    expected = terms.masked_fill((weights == 0).unsqueeze(-1), 0).sum(2)
    assert_close_to_float64(kernels.context_fwd(weights, values), expected)
    halves = kernels.context_fwd(weights.bfloat16(), values.bfloat16())
    assert halves.dtype == torch.bfloat16
    assert_same_bits(halves.isfinite(), expected.isfinite())


def test_autocast_does_not_reach_into_operators():
    weights, values = torch.rand(1, 6, 5), torch.randn(1, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_cuda._implementation("context_fwd")(weights, values)
    assert_same_bits(found, torch.bmm(weights, values))


@pytest.mark.parametrize("T", [1, 5])
def test_heads_folded_into_the_batch(T):
    H = 3
    query, keys, values, _ = inputs(2 * H, T, 5, 6, 4)
    v = torch.randn(H, 6)
    context, weights = kernels.additive_fwd(query, keys, None, values, v, None, None, True)
    directions = torch.randn(context.shape), torch.randn(weights.shape)
    found = kernels.additive_bwd(query, keys, values, v, weights, *directions, None, None, True)
    d_v = torch.zeros_like(v)
    for b in range(2 * H):
        alone = slice(b, b + 1)
        one = [query[alone], keys[alone], values[alone], v[b % H]]
        results, gradients = attend_and_back(one, None, None, *(d[alone] for d in directions))
        assert_close_to_float64((context[alone], weights[alone]), to_float64(results))
        assert_close_to_float64([g[alone] for g in found[:3]], to_float64(list(gradients[:3])))
        d_v[b % H] += gradients[3]
    assert_close_to_float64(found[3], d_v.double())


def scores_and_back(kind, tensors, lengths=None):
    scores = kernels.scores_fwd(kind, *tensors, lengths)
    direction = torch.randn(scores.shape)
    return scores, direction, kernels.scores_bwd(kind, direction, *tensors, lengths)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("T", [1, 4, 6])
@pytest.mark.parametrize("widest", [step.STEP_WIDTH, 4])
def test_features(widest, T, per_step, monkeypatch):
    monkeypatch.setattr(step, "STEP_WIDTH", widest)
    B, S, A, F = 2, 11, 6, 3
    features = torch.randn(B, T, S, F) if per_step else torch.randn(B, S, F)
    tensors = [torch.randn(B, T, A), torch.randn(B, S, A), torch.randn(A), features, torch.randn(F, A)]
    lengths = torch.tensor([S, 4])
    query, keys, v, f, u = wide = [t.double().requires_grad_() for t in tensors]
    inner = query.unsqueeze(2) + keys.unsqueeze(1) + (f if per_step else f.unsqueeze(1)) @ u
    keep = (torch.arange(S) < lengths.unsqueeze(1)).unsqueeze(1)
    expected = (inner.tanh() @ v).masked_fill(~keep, 0)
    for t in tensors[1], tensors[3]:
        t[1, ..., 4:, :] = NAN
    scores, direction, found = scores_and_back("additive", tensors, lengths)
    assert_close_to_float64(scores, expected)
    names = ("query", "keys", "v", "features", "feature_weight")
    assert_close_to_float64(found, torch.autograd.grad(expected, wide, direction.double()), names=names)


@triton.jit
def distance(q, k):
    return tl.abs(q - k)


@triton.jit
def distance_gradient(q, k):
    sign = tl.where(q > k, 1.0, -1.0)
    return sign, -sign


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("T", [1, 5])
def test_a_score_of_ones_own(T, with_v):
    if "distance" not in SCORES:
        register("distance", (distance, distance_gradient))
    with pytest.raises(ValueError, match="name: expected one that is not taken, got 'distance'"):
        register("distance", (distance, distance_gradient))
    query, keys, _, v = inputs(2, T, 13, 7, 1)
    tensors = [query, keys, v if with_v else None, None, None]
    wide = [t.double().requires_grad_() for t in (query, keys, v)]
    terms = (wide[0].unsqueeze(2) - wide[1].unsqueeze(1)).abs()
    expected = terms @ wide[2] if with_v else terms.sum(-1)
    scores, direction, found = scores_and_back("distance", tensors)
    assert_close_to_float64(scores, expected)
    wide = wide if with_v else wide[:2]
    assert_close_to_float64(found[: len(wide)], torch.autograd.grad(expected, wide, direction.double()))


@pytest.mark.parametrize("T", [1, 5])
def test_dot_and_additive_without_v(T):
    query, keys, _, _ = inputs(2, T, 13, 7, 1)
    wide = [t.double().requires_grad_() for t in (query, keys)]
    for kind in ("dot", "additive"):
        if kind == "dot":
            expected = wide[0] @ wide[1].transpose(1, 2)
        else:
            expected = (wide[0].unsqueeze(2) + wide[1].unsqueeze(1)).tanh().sum(-1)
        scores, direction, found = scores_and_back(kind, [query, keys, None, None, None])
        assert_close_to_float64(scores, expected)
        assert_close_to_float64(found[:2], torch.autograd.grad(expected, wide, direction.double()))
        assert all(t.numel() == 0 for t in found[2:])


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_a_gradient_of_zero_hides_a_nan(kind, T):
    query, keys, _, v = inputs(2, T, 9, 6, 1)
    keys[0, 3] = NAN
    keys[1, 4:] = INF
    direction = torch.randn(2, T, 9)
    direction[0, :, 3] = 0
    direction[1, :, 4:] = 0
    weight = v if kind == "additive" else None
    found = kernels.scores_bwd(kind, direction, query, keys, weight)
    assert all(g.isfinite().all() for g in found)
    assert (found[1][0, 3] == 0).all()
    query[0, 0] = NAN
    direction[0, 0] = 0
    if T > 1:
        direction[1, :, 4] = 1.0
        direction[1, 2:, 4] = 0  # hidden from some queries alone
        keys[1, 4] = NAN
    d_query, d_keys, *_ = kernels.scores_bwd(kind, direction, query, keys, weight)
    assert d_query[0].isfinite().all()
    assert d_query[1, 2:].isfinite().all()
    assert d_keys[0].isfinite().all()
    assert d_keys[1, :4].isfinite().all()


# Weights


def bisected(z, power):
    """max(z - tau, 0) ** power with sum 1, in float64."""
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(200):
        tau = (low + high) / 2
        above = ((z - tau).clamp(min=0) ** power).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    return (z - low).clamp(min=0) ** power


ORACLES = {
    "softmax": lambda z: z.softmax(-1),
    "sparsemax": lambda z: bisected(z, 1),
    "entmax15": lambda z: bisected(z / 2, 2),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("size", [1e-3, 1.0, 5.0])
@pytest.mark.parametrize("S", [1, 3, 64, 257])
@pytest.mark.parametrize("kind", ORACLES)
def test_weights(kind, S, size):
    scores = torch.randn(2, 3, S) * size
    weights = kernels.normalize_fwd(kind, scores)
    assert_close_to_float64(weights, ORACLES[kind](scores.double()))
    # Only the Jacobian is tested here: it depends on the weights alone.
    direction = torch.randn(weights.shape)
    w, d = weights.double(), direction.double()
    share = {"softmax": w, "sparsemax": (w > 0).double(), "entmax15": w.sqrt(), "sigmoid": w * (1 - w)}[kind]
    wanted = share * d if kind == "sigmoid" else share * (d - (share * d).sum(-1, True) / share.sum(-1, True))
    assert_close_to_float64(kernels.normalize_bwd(kind, direction, weights), wanted)


@pytest.mark.parametrize("kind", ["sparsemax", "entmax15"])
def test_jacobian_of_sparse_weights_against_differences(kind):
    scores = torch.randn(1, 1, 9, dtype=torch.float64)
    direction = torch.randn(1, 1, 9, dtype=torch.float64)
    step = 1e-6
    moved = [
        (ORACLES[kind](scores + step * e) - ORACLES[kind](scores - step * e)).mul(direction).sum() / (2 * step)
        for e in torch.eye(9, dtype=torch.float64)
    ]
    weights = kernels.normalize_fwd(kind, scores.float())
    found = kernels.normalize_bwd(kind, direction.float(), weights)
    torch.testing.assert_close(found.view(-1).double(), torch.stack(moved), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero_empty", [True, False])
@pytest.mark.parametrize("fill", [-INF, -2.0])
@pytest.mark.parametrize("mask", ["lengths", "[B, S]", "[B, T, S]", "added", "added [B, T, S]"])
@pytest.mark.parametrize("kind", ORACLES)
def test_masked_weights(kind, mask, fill, zero_empty):
    B, T, S = 2, 3, 11
    scores = torch.randn(B, T, S)
    lengths, attend = masks_of(mask, B, T, S)
    floating = attend is not None and attend.dtype != torch.bool
    hidden = torch.zeros(B, T, S, dtype=torch.bool)
    if lengths is not None:
        hidden |= (torch.arange(S) >= lengths.unsqueeze(1)).unsqueeze(1)
    wide = None if attend is None else (attend.unsqueeze(1) if attend.dim() == 2 else attend).expand(B, T, S)
    if wide is not None and not floating:
        hidden |= ~wide
    barred = (wide == -INF) if floating else torch.zeros_like(hidden)
    z = scores.double() * 1.5 + (wide.double() if floating else 0)
    z = z.masked_fill(barred, -INF).masked_fill(hidden, fill) / 0.7
    expected = ORACLES[kind](z)
    if kind != "sigmoid":
        empty = (z == -INF).all(-1, keepdim=True)
        expected = expected.masked_fill(empty, NAN)
    unattended = hidden | barred
    if zero_empty:
        expected = expected.masked_fill(unattended if fill == -INF else unattended.all(-1, keepdim=True), 0)
    scores[unattended] = NAN
    weights = kernels.normalize_fwd(kind, scores, lengths, attend, 1.5, 0.7, fill, zero_empty)
    assert_close_to_float64(weights, expected)
    direction = torch.randn(B, T, S)
    found = kernels.normalize_bwd(kind, direction, weights, lengths, attend, 2.0)
    assert (found[unattended] == 0).all()
    w, d = expected, direction.double()
    share = {"softmax": w, "sparsemax": (w > 0).double(), "entmax15": w.sqrt(), "sigmoid": w * (1 - w)}[kind]
    wanted = share * d
    if kind != "sigmoid":
        wanted = share * (d - (share * d).sum(-1, True) / share.sum(-1, True).clamp(min=1e-30))
    sound = ~w.isnan().any(-1)
    assert_close_to_float64(found[sound], (2 * wanted).masked_fill(unattended, 0)[sound])


@pytest.mark.parametrize("kind", ["softmax", "sparsemax", "entmax15"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_spoils_its_row(kind, value):
    scores = torch.randn(1, 2, 9)
    scores[0, 1, 4] = value
    weights = kernels.normalize_fwd(kind, scores)
    assert weights[0, 1].isnan().any()
    assert weights[0, 0].isfinite().all()


@pytest.mark.parametrize("kind", ["sparsemax", "entmax15"])
def test_ties_and_far_values_end_the_search(kind):
    scores = torch.stack(
        [torch.zeros(50), torch.arange(50.0) / 50, -torch.arange(50.0) * 1e30, torch.full((50,), 3e38)]
    )
    weights = kernels.normalize_fwd(kind, scores.unsqueeze(0))
    assert difference(weights.sum(-1), torch.ones(1, 4, dtype=torch.float64)) is None


# Sizes of zero, bad input


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5, 2), (2, 0, 4, 5, 2), (2, 3, 0, 5, 2), (2, 1, 0, 5, 2), (2, 6, 4, 5, 0)], ids=str
)
def test_nothing_to_do(shape):
    query, keys, values, v = inputs(*shape)
    context, weights = kernels.additive_fwd(query, keys, None, values, v, None, None, True)
    assert context.shape == (*shape[:2], shape[4])
    assert weights.shape == shape[:3]
    assert context.eq(0).all()
    found = kernels.additive_bwd(query, keys, values, v, weights, context, weights, None, None, True)
    for ours, given in zip(found, (query, keys, values, v), strict=True):
        assert ours.shape == given.shape
        assert ours.isfinite().all()


def test_lengths_out_of_range_are_held_in_it():
    tensors = inputs(2, 5, 7, 4, 3)
    given = kernels.additive_fwd(*tensors[:2], None, *tensors[2:], torch.tensor([-3, 99]), None, True)
    held = kernels.additive_fwd(*tensors[:2], None, *tensors[2:], torch.tensor([0, 7]), None, True)
    assert_same_bits(given, held)


def test_bad_input():
    query, keys, values, v = inputs(2, 5, 7, 4, 3)

    def call(query=query, keys=keys, values=values, v=v, packed=None, lengths=None, mask=None):
        return kernels.additive_fwd(query, keys, packed, values, v, lengths, mask, True)

    cases = [
        (ValueError, r"query: expected \[B, A\] or \[B, T, A\], got \[2\]", {"query": query[:, 0, 0]}),
        (ValueError, r"keys: expected \[B, S, A\] with B=2, A=4 \(from query\), got \[1, 7, 4\]", {"keys": keys[:1]}),
        (
            ValueError,
            r"values: expected \[B, S, D\] with B=2, S=7 \(from keys\), got \[2, 6, 3\]",
            {"values": values[:, 1:]},
        ),
        (ValueError, r"v: expected \[A\] or \[H, A\] with A=4, H dividing B=2 \(from query\), got \[3\]", {"v": v[1:]}),
        (ValueError, r"packed: expected None", {"packed": keys}),
        (ValueError, r"lengths: expected \[B\] with B=2, got \[3\]", {"lengths": torch.zeros(3, dtype=torch.int64)}),
        (TypeError, r"lengths: expected torch.int64, got torch.float32", {"lengths": torch.zeros(2)}),
        (
            ValueError,
            r"mask: expected \[B, S\], .* with B=2, T=5, S=7, got \[2, 6\]",
            {"mask": torch.ones(2, 6).bool()},
        ),
        (TypeError, r"mask: expected torch.bool or a floating dtype", {"mask": torch.ones(2, 7).int()}),
        (TypeError, r"query: expected one of .*, got torch.float64", {"query": query.double()}),
        (TypeError, r"keys: expected torch.float32 \(from query\), got torch.bfloat16", {"keys": keys.bfloat16()}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            call(**arguments)
    with pytest.raises(ValueError, match=r"kind: expected one of .*'additive'.*, got 'none'"):
        kernels.scores_fwd("none", query, keys)
    with pytest.raises(ValueError, match="keys: expected a tensor on the CPU, got"):
        kernels.additive_pack(keys)
    with pytest.raises(ValueError, match="feature_weight: expected it together with features"):
        kernels.scores_fwd("additive", query, keys, v, torch.zeros(2, 7, 3))
    with pytest.raises(ValueError, match=r"kind: expected one of .*'softmax'.*, got 'none'"):
        kernels.normalize_fwd("none", torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match=f"at most {rows.ROW_LIMIT}"):
        kernels.normalize_fwd("softmax", torch.zeros(1, 1, rows.ROW_LIMIT + 1))


def test_long_rows_take_tiles_of_a_few_queries_too():
    shape = (1, attention.FEW + 1, 300, 20, 3)
    assert_right(inputs(*shape), *masks_of("[B, T, S]", *shape[:3]))
    assert Masks.of(None, None).used() is None
