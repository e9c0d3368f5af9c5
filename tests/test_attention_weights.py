"""From scores to weights: masked_softmax, sparsemax, entmax15, and the options every kind of attention shares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from seqattn_kernels import functional, native, ops, reference
from seqattn_kernels.functional import Weighting
from seqattn_kernels.reference.normalizers import NORMALIZERS
from tests.cases import DTYPES
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, to_float64
from tests.test_attention import INF, MASKS, NAN, inputs

pytestmark = pytest.mark.usefixtures("device")


BACKENDS = [
    pytest.param("cpu", marks=[pytest.mark.cpu, pytest.mark.skipif(native.why_not() is not None, reason="not built")]),
    "reference",
]
FUNCTIONS = {
    "softmax": functional.masked_softmax,
    "sparsemax": functional.sparsemax,
    "entmax15": functional.entmax15,
}
SHAPES = [(1, 1, 1), (2, 3, 5), (2, 4, 16), (3, 2, 33), (2, 3, 257)]


def by_bisection(z, power):
    """max((alpha - 1) z - tau, 0) ** power with tau so that it sums to 1; power = 1 / (alpha - 1)."""
    z = z.double() / power
    low = z.amax(-1, keepdim=True) - 1
    high = low + 1
    for _ in range(200):
        tau = (low + high) / 2
        over = (z - tau).clamp(min=0).pow(power).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    return (z - low).clamp(min=0).pow(power)


def plain(kind, scores):
    if kind == "sigmoid":
        return 1 / (1 + (-scores.double()).exp())
    if kind == "softmax":
        return scores.double().softmax(-1)
    return by_bisection(scores, {"sparsemax": 1, "entmax15": 2}[kind])


def weigh(kind, scores, backend=None, **options):
    """Any normalizer over scores [B, T, S]."""
    if kind in FUNCTIONS:
        return FUNCTIONS[kind](scores, backend=backend, **options)
    from seqattn_kernels.functional.weighting import _normalized

    masks = [options.pop(name, None) for name in ("lengths", "mask")]
    return _normalized(Weighting(kind, **options), scores, *masks, "attend", False, backend)


def hidden(scores, lengths=None, mask=None):
    """Which keys are hidden, by a loop over them."""
    B, T, S = scores.shape
    result = torch.zeros(B, T, S, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            for s in range(S):
                row = None if mask is None else mask[b] if mask.dim() == 2 else mask[b, t if mask.shape[1] > 1 else 0]
                off = row is not None and (not row[s] if mask.dtype == torch.bool else row[s].item() == -INF)
                result[b, t, s] = off or (lengths is not None and s >= lengths[b])
    return result


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(kind, shape, size, backend, threads):
    scores = torch.randn(shape) * size
    assert_close_to_float64(weigh(kind, scores, backend), plain(kind, scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_dtypes(kind, dtype):
    scores = torch.randn(2, 3, 21).to(dtype).requires_grad_()
    wide = to_float64([scores])
    got, expected = FUNCTIONS[kind](scores), reference.normalizers.normalize(kind, wide[0])
    assert got.dtype == dtype
    assert_close_to_float64(got, plain(kind, scores.detach()))
    assert_close_to_float64(gradients(got, [scores]), gradients(expected, wide))


@pytest.mark.parametrize("S", [23, 37, 128, 150])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(kind, masked, backend, S, threads):
    """Rows of up to 128 keys stay in registers, by as many vectors as they need."""
    B, T = 3, 4
    scores, options = torch.randn(B, T, S), MASKS[masked](B, T, S)
    off = hidden(scores, **options)
    scores[off] = NAN  # whatever stands there
    got = weigh(kind, scores, backend, **options)
    mask = options.get("mask")
    added = torch.zeros(()) if mask is None or mask.dtype == torch.bool else mask if mask.dim() == 3 else mask[:, None]
    for b in range(B):
        for t in range(T):
            keep = ~off[b, t]
            expected = torch.zeros(S, dtype=torch.float64)
            if keep.any():
                expected[keep] = plain(kind, (scores + added)[b, t, keep])
            assert_close_to_float64(got[b, t], expected)


@pytest.mark.parametrize("empty_rows", ["zeros", "eager"])
@pytest.mark.parametrize("fill", [-INF, -1e9, -3.0])
@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_mask_fill_temperature_in_this_order(kind, fill, empty_rows, backend):
    scores = torch.randn(3, 2, 19)
    mask = torch.rand(3, 2, 19) < 0.5
    mask[1, 1] = False
    options = {"scale": 0.7, "temperature": 1.7, "fill": fill, "empty_rows": empty_rows}
    got = weigh(kind, scores, backend, mask=mask, **options)
    z = torch.where(mask, scores.double() * 0.7, fill) / 1.7
    expected = plain(kind, z)
    if kind in ("sparsemax", "entmax15") and fill == -INF:
        expected[1, 1] = NAN
    if empty_rows == "zeros":
        expected[1, 1] = 0
    assert_close_to_float64(got, expected)
    added = torch.randn(3, 2, 19)
    got = weigh(kind, scores, backend, mask=added, **options)
    assert_close_to_float64(got, plain(kind, (scores.double() * 0.7 + added) / 1.7))


@pytest.mark.parametrize("masked", ["none", "lengths", "[B, T, S]", "added, -inf", "both"])
@pytest.mark.parametrize("fill", [-INF, -2.0])
@pytest.mark.parametrize("kind", NORMALIZERS)
def test_gradients(kind, fill, masked):
    scores, options = torch.randn(3, 4, 21, requires_grad=True), MASKS[masked](3, 4, 21)
    if "mask" in options and options["mask"].dtype != torch.bool:
        options["mask"].requires_grad_()
    given = {"scale": 0.7, "temperature": 1.7, "fill": fill}
    got = weigh(kind, scores, **options, **given)
    wide, wide_options = to_float64(scores), to_float64(options)
    expected = reference.normalizers.normalize(kind, wide, **wide_options, **given)
    leaves, wide_leaves = [scores], [wide]
    if "mask" in options and options["mask"].requires_grad:
        leaves.append(options["mask"])
        wide_leaves.append(wide_options["mask"])
    assert_close_to_float64(got, expected)
    found = gradients(got, leaves)
    assert_close_to_float64(found, gradients(expected, wide_leaves))
    assert (found[0][hidden(scores.detach(), **options)] == 0).all()


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 5), (2, 3, 5)], ids=str)
def test_gradient_of_an_added_mask(shape):
    scores, mask = torch.randn(2, 3, 5, requires_grad=True), torch.randn(shape, requires_grad=True)
    wide = to_float64([scores, mask])
    got = functional.masked_softmax(scores, mask=mask)
    expected = reference.normalizers.normalize("softmax", wide[0], mask=wide[1])
    assert_close_to_float64(gradients(got, [scores, mask]), gradients(expected, wide))


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_gradcheck_twice(kind):
    scores = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([6, 4])

    def function(s, m):
        return weigh(kind, s, lengths=lengths, mask=m, scale=1.3, temperature=0.8)

    assert torch.autograd.gradcheck(function, [scores, mask])
    assert torch.autograd.gradgradcheck(function, [scores, mask])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_scores(kind, value, backend):
    scores = torch.randn(2, 2, 21)
    scores[0, 1, 3] = value
    expected = reference.normalizers.normalize(kind, scores.double())
    assert expected[0, 1].isnan().any() == (value != -INF and (kind != "sigmoid" or value != INF))
    assert_close_to_float64(weigh(kind, scores, backend), expected)
    scores[0, 1] = -INF
    expected = reference.normalizers.normalize(kind, scores.double())
    assert_close_to_float64(weigh(kind, scores, backend), expected)


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scores(kind, size, backend):
    scores = torch.randn(2, 3, 21) * size
    expected = plain("sigmoid", scores) if kind == "sigmoid" else torch.nn.functional.one_hot(scores.argmax(-1), 21)
    got = weigh(kind, scores, backend)
    assert got.isfinite().all()
    if size > 1e3:
        assert_close_to_float64(got, expected.double())


@pytest.mark.parametrize("kind", ["sparsemax", "entmax15"])
def test_ties_share(kind):
    got = FUNCTIONS[kind](torch.tensor([[1.0, 1.0, 1.0, -5.0], [2.0, 2.0, 0.0, 0.0]]))
    assert_close_to_float64(got[0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0], dtype=torch.float64))
    assert (got[1, 2:] == got[1, 2]).all()
    assert_close_to_float64(got.sum(-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(kind, shape, backend):
    scores = torch.randn(shape, requires_grad=True)
    got = weigh(kind, scores, backend, lengths=torch.full(shape[:1], shape[2]))
    assert got.shape == shape
    assert gradients(got, [scores])[0].shape == shape


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_shapes_and_heads(kind):
    function, scores = FUNCTIONS[kind], torch.randn(3, 2, 4, 9)
    lengths, mask = torch.tensor([9, 0, 4]), torch.rand(3, 4, 9) < 0.7
    got = function(scores, lengths=lengths, mask=mask)
    for head in range(2):
        assert_same_bits(got[:, head], function(scores[:, head], lengths=lengths, mask=mask))
    assert_same_bits(function(scores[:, 0, 0], lengths=lengths), function(scores[:, 0, :1], lengths=lengths)[:, 0])
    strided = scores[:, 0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(function(strided, mask=mask), function(scores[:, 0], mask=mask))


def test_forms_of_masks_agree():
    scores, S = torch.randn(3, 4, 10), 10
    lengths = torch.tensor([10, 0, 5])
    expected = functional.masked_softmax(scores, lengths=lengths)
    keep = torch.arange(S) < lengths[:, None]
    for options in (
        {"lengths": torch.tensor([1.0, 0.0, 0.5])},
        {"lengths": torch.tensor([1.0, 0.04, 0.54], dtype=torch.bfloat16)},
        {"mask": keep},
        {"mask": ~keep, "mask_polarity": "ignore"},
        {"mask": torch.where(keep, 0.0, -INF)},
        {"mask": torch.where(keep, 0.0, -INF), "mask_polarity": "ignore"},  # polarity is of boolean masks
        {"mask": keep[:, None].expand(3, 4, S)},
    ):
        assert_same_bits(functional.masked_softmax(scores, **options), expected)
    causal = functional.masked_softmax(scores, causal=True, lengths=lengths)
    triangle = torch.ones(4, S, dtype=torch.bool).tril()
    assert_same_bits(causal, functional.masked_softmax(scores, mask=keep[:, None] & triangle))
    added = torch.randn(3, S)
    got = functional.masked_softmax(scores, causal=True, mask=added)
    assert_same_bits(got, functional.masked_softmax(scores, mask=torch.where(triangle, added[:, None], -INF)))
    assert_same_bits(
        functional.masked_softmax(scores, lengths=torch.tensor([0.25, 0.26, 0.35])).bool().sum(-1)[:, 0],
        torch.tensor([2, 3, 4]),
    )  # 2.5, 2.6 and 3.5 keys: halves to even, as torch.round


def test_runs_agree_bit_for_bit_on_any_number_of_threads():
    scores, lengths = torch.randn(9, 20, 300), torch.randint(0, 301, (9,))
    for kind in NORMALIZERS:
        runs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = scores.clone().requires_grad_()
            got = weigh(kind, leaf, lengths=lengths)
            runs.append([got, *gradients(got, [leaf])])
        assert_same_bits(runs[0], runs[1])


# The options in attention


def composed(query, keys, values, v, weighting, lengths=None, mask=None):
    """Attention by its parts, in plain torch."""
    keep = reference.attention.attended(keys, lengths, mask)
    scores = reference.attention.additive_scores(query, reference.attention.without_unattended(keys, keep), v)
    weights = reference.normalizers.normalize(
        weighting.normalizer,
        scores,
        lengths,
        mask,
        weighting.scale,
        weighting.temperature,
        weighting.fill,
        weighting.empty_rows == "zeros",
    )
    return weights @ reference.attention.without_unattended(values, keep), weights


@pytest.mark.parametrize("masked", ["none", "lengths", "[B, T, S]", "added, -inf", "both"])
@pytest.mark.parametrize(
    "weighting",
    [
        Weighting(temperature=2.5),
        Weighting(scale=0.3, temperature=1.5),
        Weighting("sparsemax", scale=4.0),
        Weighting("entmax15", scale=3.0),
        Weighting("sigmoid", temperature=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_additive_attention(weighting, masked, backend):
    tensors, options = inputs((3, 4, 21, 10, 6)), MASKS[masked](3, 4, 21)
    query, keys, values, v = tensors
    got = functional.additive_attention(query, keys, v, values, weighting=weighting, backend=backend, **options)
    wide = to_float64(tensors)
    expected = composed(*wide, weighting, **to_float64(options))
    assert_close_to_float64(got, expected)
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide))


def test_gradient_of_an_added_mask_in_attention():
    tensors = inputs((2, 3, 9, 8, 4))
    query, keys, values, v = tensors
    mask = torch.randn(2, 9, requires_grad=True)
    got = functional.additive_attention(query, keys, v, values, mask=mask)
    wide = to_float64([*tensors, mask])
    expected = reference.attention.additive_attention(wide[0], wide[1], wide[2], wide[3], mask=wide[4])
    assert_close_to_float64(gradients(got, [*tensors, mask]), gradients(expected, wide))


@pytest.mark.parametrize("fill", [-INF, -1e9])
def test_empty_rows_as_in_eager(fill):
    query, keys, values, v = inputs((2, 3, 9, 8, 4), requires_grad=False)
    weighting = Weighting(fill=fill, empty_rows="eager")
    context, weights = functional.additive_attention(
        query, keys, v, values, lengths=torch.tensor([9, 0]), weighting=weighting
    )
    if fill == -INF:
        assert weights[1].isnan().all()
        assert context[1].isnan().all()
    else:
        assert_close_to_float64(weights[1], torch.full((3, 9), 1 / 9, dtype=torch.float64))
        assert_close_to_float64(context[1], values[1].double().mean(0).expand(3, 4))
    assert weights[0].isfinite().all()


def test_nothing_leaks_with_a_finite_fill():
    query, keys, values, v = inputs((2, 3, 9, 8, 4))
    lengths, weighting = torch.tensor([9, 5]), Weighting(fill=-1e9)
    expected = functional.additive_attention(query, keys, v, values, lengths=lengths, weighting=weighting)
    with torch.no_grad():
        keys[1, 5:] = NAN
        values[1, 5:] = INF
    got = functional.additive_attention(query, keys, v, values, lengths=lengths, weighting=weighting)
    assert_same_bits(got, expected)
    assert all(g.isfinite().all() for g in gradients(got, [query, keys, values, v]))


@pytest.mark.parametrize("score_bias", [0.5, torch.tensor(-0.5)])
def test_score_bias(score_bias):
    tensors = inputs((2, 3, 9, 8, 4))
    query, keys, values, v = tensors
    bias = score_bias.requires_grad_() if isinstance(score_bias, torch.Tensor) else score_bias
    got = functional.additive_attention(query, keys, v, values, score_bias=bias)
    assert_same_bits(got, functional.additive_attention(query, keys, v, values))
    if isinstance(bias, torch.Tensor):
        assert gradients(got, [bias])[0] == 0
    _, weights = functional.additive_attention(query, keys, v, values, score_bias=bias, weighting="sigmoid")
    wide = to_float64(tensors)
    scores = reference.attention.additive_scores(wide[0], wide[1], wide[3])
    assert_close_to_float64(weights, (scores.detach() + torch.as_tensor(score_bias).item()).sigmoid())


def test_dropout():
    query, keys, values, v = inputs((4, 8, 60, 8, 4))
    weighting = Weighting(dropout=0.4)
    torch.manual_seed(7)
    context, weights = functional.additive_attention(query, keys, v, values, weighting=weighting)
    torch.manual_seed(7)
    again, _ = functional.additive_attention(query, keys, v, values, weighting=weighting, need_weights=False)
    assert_same_bits(context, again)
    other, _ = functional.additive_attention(query, keys, v, values, weighting=weighting)
    assert (context != other).any()
    assert_close_to_float64(weights, functional.additive_attention(query, keys, v, values)[1].double())
    torch.manual_seed(7)
    kept = torch.nn.functional.dropout(torch.ones_like(weights), 0.4)
    assert_close_to_float64(context, (weights * kept).double() @ values.double())
    assert 0.5 < (kept != 0).float().mean() < 0.7
    found = gradients(context, [query, keys, values, v])
    wide = to_float64([query, keys, values, v])
    _, plain_weights = reference.attention.additive_attention(*wide)
    assert_close_to_float64(found, gradients((plain_weights * kept.double()) @ wide[2], wide))


def test_modules_drop_in_training_alone():
    from seqattn_kernels.nn import AdditiveAttention

    module = AdditiveAttention(4, 5, 6, weighting=Weighting(dropout=0.5))
    query, keys = torch.randn(2, 3, 4), torch.randn(2, 9, 5)
    assert (module(query, keys)[0] != module(query, keys)[0]).any()
    module.eval()
    assert_same_bits(module(query, keys), module(query, keys))
    assert "dropout=0.5" in str(module)


# Operators and bad input


@pytest.mark.cpu
@pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not built")
@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("masked", ["none", "lengths", "[B, T, S]", "added"])
def test_opcheck(kind, masked):
    torch.use_deterministic_algorithms(False)
    scores, options = torch.randn(3, 4, 17), MASKS[masked](3, 4, 17)
    masks = options.get("lengths"), options.get("mask")
    if masks[0] is not None:
        masks = masks[0].long(), masks[1]
    seqattn = torch.ops.seqattn
    torch.library.opcheck(
        seqattn.normalize_fwd.default, (ops.scores.normalizer_number(kind), scores, *masks, 0.5, 2.0, -INF, True)
    )
    weights = seqattn.normalize_fwd(ops.scores.normalizer_number(kind), scores, *masks, 0.5, 2.0, -INF, True)
    torch.library.opcheck(
        seqattn.normalize_bwd.default,
        (ops.scores.normalizer_number(kind), torch.randn(3, 4, 17), weights, *masks, 0.25),
    )


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_rows_without_a_dimension_of_time(kind):
    scores, lengths = torch.randn(3, 19, requires_grad=True), torch.tensor([19, 0, 4])
    got = FUNCTIONS[kind](scores, lengths=lengths)
    expected = FUNCTIONS[kind](scores.unsqueeze(1), lengths=lengths).squeeze(1)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(got, [scores]), gradients(expected, [scores]))
    wide = scores.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s: FUNCTIONS[kind](s, lengths=lengths), [wide])


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_compile(kind):
    torch.use_deterministic_algorithms(False)
    scores, lengths = torch.randn(3, 4, 9, requires_grad=True), torch.tensor([9, 0, 4])

    def function(s):
        return FUNCTIONS[kind](s, lengths=lengths, temperature=2.0)

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(scores)
    assert_close_to_float64(got, function(scores).double())
    assert_close_to_float64(gradients(got, [scores]), gradients(function(scores), [scores]))


@pytest.mark.cpu
@pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not built")
def test_operators_check_their_arguments():
    seqattn, scores = torch.ops.seqattn, torch.zeros(2, 3, 5)
    with pytest.raises(RuntimeError, match=r"kind: expected a number in \[0, 4\), got 4"):
        seqattn.normalize_fwd(4, scores, None, None, 1.0, 1.0, -INF, True)
    with pytest.raises(RuntimeError, match=r"scores: expected \[B, S\] or \[B, T, S\], got \[2\]"):
        seqattn.normalize_fwd(0, scores[:, 0, 0], None, None, 1.0, 1.0, -INF, True)
    with pytest.raises(RuntimeError, match=r"mask: expected shape \[2, 5\], got \[2, 4\]"):
        seqattn.normalize_fwd(0, scores, None, torch.ones(2, 4) > 0, 1.0, 1.0, -INF, True)
    with pytest.raises((RuntimeError, ValueError), match=r"lengths: expected values in \[0, 5\]"):
        seqattn.normalize_fwd(0, scores, torch.tensor([5, 6]), None, 1.0, 1.0, -INF, True)
    with pytest.raises(RuntimeError, match=r"d_weights: expected shape \[2, 3, 5\]"):
        seqattn.normalize_bwd(0, scores[..., :4], scores, None, None, 1.0)


@pytest.mark.cpu
def test_bad_input():
    scores = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"scores: expected \[B, S\], \[B, T, S\] or \[B, N, T, S\], got \[5\]"):
        functional.masked_softmax(scores[0, 0])
    with pytest.raises(TypeError, match=r"scores: expected a floating dtype, got torch.int64"):
        functional.masked_softmax(scores.long())
    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 5\] .* got 9 at \[1\]"):
        functional.sparsemax(scores, lengths=torch.tensor([5, 9]))
    with pytest.raises(ValueError, match=r"lengths: expected fractions in \[0, 1\].* got 1.5 at \[0\]"):
        functional.entmax15(scores, lengths=torch.tensor([1.5, 0.5]))
    with pytest.raises(ValueError, match=r"mask: expected \[B, S\], .* got \[2, 2, 5\]"):
        functional.masked_softmax(scores, mask=torch.ones(2, 2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask: expected torch.bool or a floating dtype, got torch.int64"):
        functional.masked_softmax(scores, mask=torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="causal: expected a query"):
        functional.masked_softmax(scores[0], causal=True)
    for name, value, message in (
        ("temperature", 0.0, "a positive number, got 0.0"),
        ("fill", INF, "a finite number or -inf, got inf"),
        ("empty_rows", "ones", "'zeros' or 'eager', got 'ones'"),
        ("dropout", 1.5, r"a number in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected {message}"):
            replace(Weighting(), **{name: value})
    assert math.isinf(Weighting().fill)
