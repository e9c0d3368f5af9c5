"""The attention operators on a GPU, compiled: against float64, as autograd and torch.compile see them."""

from __future__ import annotations

import math

import pytest
import torch

from seqattn_kernels import backends, functional, ops, reference
from tests.compare import (
    TOLERANCE,
    assert_close_to_float64,
    assert_same_bits,
    difference,
    error_ratio,
    gradients,
    to_float64,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(ops.attention_cuda.why_not() is not None, reason="needs Triton"),
]
NAN, INF = float("nan"), float("inf")
ADDITIVE = ops.scores.score_number("additive")
# Odd sizes, and sizes whose rows are aligned: different code is compiled. One, few and many queries.
SHAPES = [(3, 1, 37, 17, 5), (2, 3, 70, 33, 40), (2, 37, 131, 65, 41), (2, 1, 256, 128, 64), (2, 64, 256, 128, 64)]
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(B, T, S, A, D, dtype=torch.float32, size=1.0):
    tensors = [
        torch.randn(B, T, A) * size,
        torch.randn(B, S, A) * size,
        torch.randn(B, S, D),
        torch.randn(A) / math.sqrt(A),
    ]
    return [t.to("cuda", dtype).requires_grad_() for t in tensors]


def masks_of(name, B, T, S):
    lengths = torch.randint(0, S + 1, (B,), device="cuda")
    lengths[0] = 0
    allowed = torch.rand(B, T, S, device="cuda") > 0.4
    allowed[:, :, S // 2] = False
    return {
        "none": (None, None),
        "lengths": (lengths, None),
        "[B, T, S]": (None, allowed),
        "added": (lengths, torch.randn(B, 1, S, device="cuda").masked_fill(~allowed[:, :1], -INF)),
    }[name]


def poison(tensors, lengths, mask):
    attend = reference.attention.attended(tensors[1], lengths, mask)
    if attend is not None:
        nobody = ~attend.any(1).expand(tensors[1].shape[:2])
        with torch.no_grad():
            tensors[1][nobody] = NAN
            tensors[2][nobody] = INF


def plain(query, keys, values, v, lengths=None, mask=None):
    return reference.attention.additive_attention(query, keys, values, v, lengths, mask)


def additive(query, keys, values, v, lengths=None, mask=None, **options):
    return ops.attention.additive(query, keys, None, values, v, lengths, mask, **options)


@pytest.mark.parametrize("mask", ["none", "lengths", "[B, T, S]", "added"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_against_float64(format, shape, mask):
    dtype = FORMATS[format]
    tensors, (lengths, attend) = inputs(*shape, dtype), masks_of(mask, *shape[:3])
    poison(tensors, lengths, attend)
    if attend is not None and attend.dtype != torch.bool:
        attend = attend.to(dtype)
    got = additive(*tensors, lengths, attend)
    wide = to_float64(tensors)
    expected = plain(*wide, lengths, to_float64(attend))
    assert_close_to_float64(got, expected, names=("context", "weights"))
    names = ("query", "keys", "values", "v")
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide), dtype, names=names)
    with torch.no_grad():
        context, none = additive(*tensors, lengths, attend, need_weights=False)
    assert none.numel() == 0
    assert difference(context, expected[0]) is None


@pytest.mark.parametrize("weighting", ["softmax", "sparsemax"])  # one operator; scores, weights and context apart
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [4, 70])
def test_what_some_queries_see_stays_with_them(T, format, weighting):
    S, queries, some = 80, T // 2, 33
    tensors = inputs(2, T, S, 64, 48, FORMATS[format])
    mask = torch.zeros(2, T, S, dtype=torch.bool, device="cuda")
    mask[:, :queries, :some] = mask[:, queries:, some:] = True

    def run(query, keys, values, v):
        context, weights = functional.additive_attention(query, keys, v, values, mask=mask, weighting=weighting)
        return context[:, queries:], weights[:, queries:]

    clean = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        tensors[1][:, 2] = tensors[2][:, 2] = NAN
    found, expected = run(*tensors), run(*clean)
    assert_close_to_float64(found, to_float64(expected))
    for ours, theirs, first in zip(
        gradients(found, tensors), gradients(expected, clean), (queries, some, some), strict=False
    ):
        assert difference(ours[:, first:], theirs[:, first:].double()) is None


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4]], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 0.3, 3.0, 9.0, 50.0, 1e4, 1e30])
def test_fp32_any_size_of_input(shape, size):
    tensors = inputs(*shape, size=size)
    wide, stock = to_float64(tensors), [t.detach().clone().requires_grad_() for t in tensors]
    assert_close_to_float64(additive(*tensors), plain(*wide), names=("context", "weights"))
    runs = [gradients(f(*x), x) for f, x in ((additive, tensors), (plain, stock), (plain, wide))]
    for name, ours, theirs, oracle in zip(("query", "keys", "values", "v"), *runs, strict=True):
        # Where cancellation leaves no digits to a tolerance: no further from float64 than the plain formula.
        error, stock_error = ((g.double() - oracle).abs().max().item() for g in (ours, theirs))
        size = oracle.abs().max().item()
        assert error <= 3 * stock_error + TOLERANCE[ours.dtype] * size + 4 * torch.finfo(ours.dtype).tiny, name


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize(("q", "k"), [(100.0, -95.0), (1e4, 1 - 1e4), (1e30, -1e30), (INF, -1e30), (30.0, -30.5)])
def test_fp32_sums_that_cancel(q, k, T):
    query, keys = torch.full((1, T, 48), q, device="cuda"), torch.full((1, 130, 48), k, device="cuda")
    v = torch.randn(48, device="cuda")
    scores = ops_scores("additive", query, keys, v)
    assert difference(scores, reference.attention.additive_scores(query, keys, v).double()) is None


def ops_scores(kind, query, keys, v=None, features=None, feature_weight=None, lengths=None):
    number = ops.scores.score_number(kind)
    return torch.ops.seqattn.scores_fwd(number, query, keys, v, features, feature_weight, lengths)


def weights_of(kind, scores):
    return torch.ops.seqattn.normalize_fwd(ops.scores.normalizer_number(kind), scores, None, None, 1.0, 1.0, -INF, True)


def test_fp32_scores_are_near_those_of_eager():
    for size in (0.3, 1.0, 4.0, 12.0):
        query, keys, _, v = (t.detach() for t in inputs(2, 100, 200, 512, 1, size=size))
        exact = reference.attention.additive_scores(*(t.double() for t in (query, keys, v)))
        stock = reference.attention.additive_scores(query, keys, v)
        ratio = error_ratio(ops_scores("additive", query, keys, v), stock, exact)
        assert ratio.largest <= 4, (size, ratio)


@pytest.mark.parametrize("T", [1, 3, 20])
@pytest.mark.parametrize("per_step", [False, True])
def test_fp32_features(T, per_step):
    B, S, A, F = 2, 40, 48, 3
    features = torch.randn(B, T, S, F) if per_step else torch.randn(B, S, F)
    given = [torch.randn(B, T, A), torch.randn(B, S, A), torch.randn(A), features, torch.randn(F, A)]
    given = [t.cuda() for t in given]
    query, keys, v, f, u = wide = [t.double().requires_grad_() for t in given]
    inner = query.unsqueeze(2) + keys.unsqueeze(1) + (f if per_step else f.unsqueeze(1)) @ u
    expected = inner.tanh() @ v
    assert_close_to_float64(ops_scores("additive", *given), expected)
    direction = torch.randn_like(expected)
    found = torch.ops.seqattn.scores_bwd(ADDITIVE, direction.float(), *given, None)
    wanted = torch.autograd.grad(expected, wide, direction.float().double())
    assert_close_to_float64(found, wanted, names=("query", "keys", "v", "features", "feature_weight"))


@pytest.mark.parametrize("S", [3, 64, 1000, 20000])
@pytest.mark.parametrize("kind", ["softmax", "sparsemax", "entmax15", "sigmoid"])
def test_fp32_weights(kind, S):
    scores = torch.randn(2, 5, S, device="cuda") * 3
    weights = weights_of(kind, scores)
    z = scores.double()
    if kind == "softmax":
        expected = z.softmax(-1)
    elif kind == "sigmoid":
        expected = z.sigmoid()
    else:
        power = 1 if kind == "sparsemax" else 2
        z = z / power
        low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
        for _ in range(100):
            tau = (low + high) / 2
            above = ((z - tau).clamp(min=0) ** power).sum(-1, keepdim=True) > 1
            low, high = torch.where(above, tau, low), torch.where(above, high, tau)
        expected = (z - low).clamp(min=0) ** power
    assert_close_to_float64(weights, expected)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3]], ids=str)
def test_fp32_the_same_bits_every_time(shape):
    tensors = inputs(*shape)
    runs = []
    for _ in range(3):
        got = additive(*tensors)
        runs.append((got, gradients(got, tensors)))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def test_fp32_heads():
    query, keys, values, _ = inputs(6, 20, 33, 16, 8)
    v = torch.randn(3, 16, device="cuda", requires_grad=True)
    tensors = [query, keys, values, v]
    wide = to_float64(tensors)
    inner = (wide[0].unsqueeze(2) + wide[1].unsqueeze(1)).tanh()
    weights = (inner * wide[3].repeat(2, 1)[:, None, None]).sum(-1).softmax(-1)
    expected = weights @ wide[2], weights
    got = additive(*tensors)
    assert_close_to_float64(got, expected)
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide))


def test_fp32_bad_input():
    query, keys, values, v = inputs(2, 5, 7, 4, 3)
    with pytest.raises(ValueError, match=r"keys: expected \[B, S, A\] with B=2, A=4"):
        additive(query, keys[..., :2], values, v)
    with pytest.raises(ValueError, match=r"lengths: expected device cuda"):
        additive(query, keys, values, v, torch.tensor([1, 2], device="cpu"))
    with pytest.raises(ValueError, match="keys: expected a tensor on the CPU, got cuda"):
        ops.attention.pack_keys(keys)
    with pytest.raises(TypeError, match=r"query: expected one of .*, got torch.float64"):
        additive(*(t.double() for t in (query, keys, values, v)))


def test_fp32_compiled_whole():
    tensors = inputs(2, 20, 64, 32, 16)

    @torch.compile(fullgraph=True)
    def run(query, keys, values, v, lengths):
        context, weights = additive(query * 2, keys, values, v, lengths)
        return context.sin(), weights

    lengths = torch.tensor([64, 5], device="cuda")
    got = run(*tensors, lengths)
    context, weights = additive(tensors[0] * 2, *tensors[1:], lengths)
    expected = context.sin(), weights
    assert_close_to_float64(got, to_float64(expected))
    assert_close_to_float64(gradients(got, tensors), to_float64(gradients(expected, tensors)))


def test_fp32_operator_checks():
    tensors = [t.detach() for t in inputs(2, 20, 64, 32, 16)]
    query, keys, values, v = tensors
    torch.library.opcheck(
        torch.ops.seqattn.additive_fwd.default, (query, keys, None, values, v, None, None, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def _problem(T):
    B, S, A, D = 2, 40, 48, 20
    shape = (B, T) if T else (B,)
    tensors = {
        "query": torch.randn(*shape, A),
        "keys": torch.randn(B, S, A),
        "values": torch.randn(B, S, D),
        "v": torch.randn(A) / 7,
        "heads": torch.randn(4, A // 4) / 4,
        "square": torch.randn(A, A) / 7,
        "wide": torch.randn(A, 2 * A) / 7,
        "bias": torch.randn(A),
        "history": torch.rand(B, S),
        "conv": torch.randn(5, 1, 7) / 3,
        "features": torch.randn(A, 5),
    }
    return {name: t.cuda().requires_grad_() for name, t in tensors.items()}


F = functional
LENGTHS = torch.tensor([40, 13], device="cpu")
MASK = torch.rand(2, 1, 40, generator=torch.Generator().manual_seed(1)) > 0.3
# What a call is made of: every kind of attention, mask and weighting that a GPU serves.
CALLS = {
    "additive": lambda t: F.additive_attention(t["query"], t["keys"], t["v"], t["values"], lengths=LENGTHS),
    "bias": lambda t: F.additive_attention(t["query"], t["keys"], t["v"], bias=t["bias"], mask=MASK.cuda()),
    "prepared": lambda t: F.additive_attention(t["query"], F.prepare_keys(t["keys"]), t["v"], t["values"]),
    "heads": lambda t: F.multi_head_additive_attention(t["query"], t["keys"], t["heads"], lengths=LENGTHS),
    "temperature": lambda t: F.additive_attention(
        t["query"], t["keys"], t["v"], lengths=LENGTHS, weighting=F.Weighting(temperature=0.5, scale=2.0)
    ),
    "sparsemax": lambda t: F.additive_attention(t["query"], t["keys"], t["v"], lengths=LENGTHS, weighting="sparsemax"),
    "entmax15": lambda t: F.additive_attention(t["query"], t["keys"], t["v"], mask=MASK.cuda(), weighting="entmax15"),
    "filled": lambda t: F.additive_attention(
        t["query"], t["keys"], t["v"], lengths=LENGTHS, weighting=F.Weighting(fill=-5.0)
    ),
    "sigmoid": lambda t: F.additive_attention(t["query"], t["keys"], t["v"], weighting="sigmoid"),
    "concat": lambda t: F.concat_attention(t["query"], t["keys"], t["wide"], t["v"], bias=t["bias"]),
    "dot": lambda t: F.dot_attention(t["query"], t["keys"], t["values"], lengths=LENGTHS),
    "general": lambda t: F.general_attention(t["query"], t["keys"], t["square"], lengths=LENGTHS),
    "cosine": lambda t: F.cosine_attention(t["query"], t["keys"]),
    "location": lambda t: F.location_attention(
        t["query"], t["keys"], t["v"], t["history"], t["conv"], t["features"], lengths=LENGTHS
    ),
    "coverage": lambda t: F.coverage_attention(t["query"], t["keys"], t["v"], t["history"], t["bias"]),
    "pooling": lambda t: F.pooling_attention(t["keys"], t["square"], t["v"], lengths=LENGTHS),
    "pooling rows": lambda t: F.pooling_attention(t["keys"], t["square"], t["heads"].repeat(1, 4), lengths=LENGTHS),
    "monotonic": lambda t: F.monotonic_attention(t["query"], t["keys"], t["v"], score_bias=-1.0, lengths=LENGTHS),
    "monotonic hard": lambda t: F.monotonic_attention(t["query"], t["keys"], t["v"], mode="hard", mask=MASK.cuda()),
    "feature reduced": lambda t: F.feature_attention(
        t["keys"], t["square"], t["bias"], mask=MASK[:, 0].cuda(), reduce=True
    ),
    "feature": lambda t: F.feature_attention(t["keys"], t["square"], t["bias"], lengths=LENGTHS),
}


@pytest.mark.parametrize("T", [0, 20])
@pytest.mark.parametrize("name", CALLS)
def test_fp32_functions(name, T):
    if T and name in ("location", "coverage", "pooling", "pooling rows", "feature", "feature reduced"):
        pytest.skip("one query at a time")
    tensors = _problem(T)
    wide = to_float64(tensors)
    got, expected = CALLS[name](tensors), CALLS[name](wide)
    assert_close_to_float64(got, expected)
    total = sum(e.sum() for e in expected)
    parts = torch.autograd.grad(total, list(wide.values()), allow_unused=True, retain_graph=True)
    used = [n for n, part in zip(wide, parts, strict=True) if part is not None]
    found, wanted = (gradients(r, [t[n] for n in used]) for r, t in ((got, tensors), (expected, wide)))
    assert_close_to_float64(found, wanted, names=used)


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_functions_compute_halves_as_they_are(format):
    dtype = FORMATS[format]
    tensors = {name: t.detach().to(dtype) for name, t in _problem(20).items()}
    context, weights = CALLS["additive"](tensors)
    assert context.dtype == weights.dtype == dtype
    assert_close_to_float64((context, weights), CALLS["additive"](to_float64(tensors)), dtype)


def test_backends():
    request = backends.AttentionRequest(torch.device("cuda"), torch.bfloat16)
    assert backends.choose(backends.ATTENTION, request) == "triton"
    request.dtype = torch.float64
    assert backends.choose(backends.ATTENTION, request) == "reference"


@pytest.mark.slow
def test_fp32_more_than_two_billion_scores():
    B, T, S, A = 1, 50_000, 50_000, 4
    query, keys, _, v = (t.detach() for t in inputs(B, T, S, A, 1))
    scores = ops_scores("additive", query, keys, v)
    for t in (0, 42_949, 42_950, T - 1):  # around 2^31 elements
        exact = reference.attention.additive_scores(query[:, t : t + 1].double(), keys.double(), v.double())
        assert difference(scores[:, t : t + 1], exact) is None
    weights = weights_of("softmax", scores)
    assert difference(weights[:, -1].sum(-1), torch.ones(1, dtype=torch.float64)) is None
    found = torch.ops.seqattn.scores_bwd(ADDITIVE, weights, query, keys, v, None, None, None)
    one = query[:, -1:].double().requires_grad_()
    (wanted,) = torch.autograd.grad(
        reference.attention.additive_scores(one, keys.double(), v.double()), one, weights[:, -1:].double()
    )
    assert difference(found[0][:, -1:], wanted) is None
