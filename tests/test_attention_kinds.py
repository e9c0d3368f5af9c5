"""Multi-head additive and cosine attention, pooling, scores of one's own, and what holds for every kind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from seqattn_kernels import functional, native, nn, ops, reference
from seqattn_kernels.functional import Weighting
from seqattn_kernels.reference.attention import SCORES
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, to_float64
from tests.test_attention import MASKS

pytestmark = pytest.mark.usefixtures("device")


needs_native = pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not built")
BACKENDS = [pytest.param("cpu", marks=[needs_native, pytest.mark.cpu]), "reference"]


def leaves(*shapes, dtype=torch.float32, size=1.0):
    return [(torch.randn(shape, dtype=dtype) * size).requires_grad_() for shape in shapes]


def check(function, formula, tensors, dtype=None):
    """Results and gradients of `function` of the tensors against `formula` of their float64 copies."""
    wide = to_float64(tensors)
    got, expected = function(*tensors), formula(*wide)
    assert_close_to_float64(got, expected, dtype)
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide), dtype)


def softmax_of(scores, values, lengths=None, mask=None):
    keep = reference.attention.attended(values, lengths, mask)
    weights = reference.normalizers.normalize("softmax", scores, lengths, mask)
    return weights @ reference.attention.without_unattended(values, keep), weights


# Heads, cosines, pooling


def each_head(query, keys, v, values, **masks):
    """Heads one by one, by slices."""
    heads, A = v.shape
    D = values.shape[2] // heads
    found = []
    for h in range(heads):
        part = slice(h * A, (h + 1) * A)
        scores = reference.attention.additive_scores(query[..., part], keys[..., part], v[h])
        found.append(softmax_of(scores, values[..., h * D : (h + 1) * D], **masks))
    contexts, weights = zip(*found, strict=True)
    return torch.cat(contexts, -1), torch.stack(weights, 1)


@pytest.mark.parametrize("masked", ["none", "lengths", "[B, T, S]", "added, -inf", "causal"])
@pytest.mark.parametrize("T", [1, 14])
@pytest.mark.parametrize("backend", BACKENDS)
def test_multi_head(masked, T, backend, threads):
    tensors, options = leaves((3, T, 21), (3, 20, 21), (3, 7), (3, 20, 6)), MASKS[masked](3, T, 20)
    check(
        lambda *t: functional.multi_head_additive_attention(*t, backend=backend, **options),
        lambda *t: each_head(*t, **to_float64(options)),
        tensors,
    )


@pytest.mark.cpu
def test_heads_of_very_different_weights():
    """Each head has a scale of its own: one must not cost another its digits."""
    tensors = leaves((2, 5, 21), (2, 20, 21), (3, 7), (2, 20, 6))
    with torch.no_grad():
        tensors[2].mul_(torch.tensor([[1e-6], [1.0], [30.0]]))
    scores = [
        ops.scores.scores("additive", *(functional.attention.fold_heads("x", t, 3) for t in tensors[:2]), tensors[2])
        if native.why_not() is None
        else None
    ]
    check(functional.multi_head_additive_attention, each_head, tensors)
    if scores[0] is not None:
        for h in range(3):
            part = slice(7 * h, 7 * h + 7)
            wide = to_float64([tensors[0][..., part], tensors[1][..., part], tensors[2][h]])
            got = scores[0].view(2, 3, 5, 20)[:, h]
            assert_close_to_float64(got, reference.attention.additive_scores(*wide))


def test_multi_head_steps_with_prepared_keys():
    module = nn.MultiHeadAdditiveAttention(6, 5, 8, heads=2)
    query, keys, values = torch.randn(3, 4, 6), torch.randn(3, 9, 5), torch.randn(3, 9, 6)
    lengths = torch.tensor([9, 0, 4])
    context, weights = module(query, keys, values, lengths=lengths)
    prepared = module.prepare_keys(keys)
    for t in range(4):
        step = module(query[:, t], prepared, values, lengths=lengths)
        assert_close_to_float64(step, [context[:, t].double(), weights[:, :, t].double()])
    order = torch.tensor([2, 0])
    again = module(query[order, 0], prepared.select(order), values[order], lengths=lengths[order])
    assert_close_to_float64(again, [context[order, 0].double(), weights[order, :, 0].double()])
    with pytest.raises(ValueError, match="keys: expected them prepared for N=2 heads"):
        module(query[:, 0], functional.prepare_keys(keys), values)


@pytest.mark.parametrize("scale", [1.0, 4.5, "a parameter", "per query"])
def test_cosine(scale):
    tensors, lengths = leaves((3, 4, 7), (3, 11, 7), (3, 11, 5)), torch.tensor([11, 0, 6])
    if isinstance(scale, str):
        tensors += leaves(() if scale == "a parameter" else (3, 4))

    def formula(query, keys, values, factor=scale):
        cosine = F.cosine_similarity(query.unsqueeze(2), keys.unsqueeze(1), dim=-1)
        factor = factor.unsqueeze(-1) if torch.is_tensor(factor) and factor.dim() else factor
        return softmax_of(cosine * factor, values, lengths)

    def ours(query, keys, values, factor=scale):
        return functional.cosine_attention(query, keys, values, scale=factor, lengths=lengths)

    check(ours, formula, tensors)


def test_cosine_of_nothing():
    query, keys = torch.zeros(1, 2, 4), torch.randn(1, 5, 4)
    keys[0, 1] = 0
    _, weights = functional.cosine_attention(query, keys)
    assert_close_to_float64(weights, torch.full((1, 2, 5), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("masked", ["none", "lengths", "[B, S]"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pooling(rows, masked, backend):
    R = () if rows is None else (rows,)
    tensors, options = leaves((3, 23, 6), (9, 6), (*R, 9), (9,)), MASKS[masked](3, 1, 23)

    def ours(input, weight, v, bias):
        return functional.pooling_attention(input, weight, v, bias=bias, backend=backend, **options)

    def formula(input, weight, v, bias):
        scores = (input @ weight.t() + bias).tanh() @ (v.unsqueeze(0) if rows is None else v).t()
        found = softmax_of(scores.transpose(1, 2), input, **options)
        return [t.squeeze(1) if rows is None else t for t in found]

    check(ours, formula, tensors)


def test_pooling_module():
    input, lengths = torch.randn(3, 7, 5), torch.tensor([7, 0, 3])
    for module in (nn.PoolingAttention(5, 4), nn.PoolingAttention(5, 4, rows=2, weighting="entmax15", bias=False)):
        pooled, weights = module(input, lengths=lengths)
        assert weights.shape == (3, *module.v.shape[:-1], 7)
        assert pooled.shape == (3, *module.v.shape[:-1], 5)
        assert (weights[1] == 0).all()
        pooled.sum().backward()
        assert all(p.grad is not None for p in module.parameters())


# Scores of one's own, registries


@pytest.fixture
def manhattan():
    functional.register_score("manhattan", lambda q, k, v: -((q.unsqueeze(2) - k.unsqueeze(1)).abs() @ v))
    yield "manhattan"
    del SCORES["manhattan"]


def test_a_score_of_ones_own(manhattan):
    tensors, lengths = leaves((3, 4, 7), (3, 11, 7), (3, 11, 5), (7,)), torch.tensor([11, 0, 6])
    check(
        lambda q, k, values, v: functional.score_attention(manhattan, q, k, values, v, lengths=lengths),
        lambda q, k, values, v: softmax_of(-((q[:, :, None] - k[:, None]).abs() * v).sum(-1), values, lengths),
        tensors,
    )
    _, weights = functional.score_attention(manhattan, *tensors, weighting="sparsemax")
    assert (weights == 0).any()
    position = torch.full((3, 4), 5.0)
    functional.local_attention(tensors[0], tensors[1], position, 2.0, score=manhattan, v=tensors[3])
    with pytest.raises(ValueError, match="name: expected one that is not taken, got 'manhattan'"):
        functional.register_score("manhattan", lambda q, k, v: q)
    if native.why_not() is None and tensors[0].device.type == "cpu":
        with pytest.raises(RuntimeError, match="backend 'cpu' can't serve: it has no kernel of the score 'manhattan'"):
            functional.score_attention(manhattan, *tensors, backend="cpu")


def test_scores_by_name():
    query, keys, values, v = leaves((3, 4, 7), (3, 11, 7), (3, 11, 5), (7,))
    lengths = torch.tensor([11, 0, 6])
    got = functional.score_attention("additive", query, keys, values, v, lengths=lengths)
    assert_same_bits(got, functional.additive_attention(query, keys, v, values, lengths=lengths))
    got = functional.score_attention("dot", query, keys, values, lengths=lengths)
    assert_same_bits(got, functional.dot_attention(query, keys, values, lengths=lengths))
    ones = functional.score_attention("additive", query, keys, values, lengths=lengths)
    assert_close_to_float64(
        ones, to_float64(functional.additive_attention(query, keys, torch.ones(7), values, lengths=lengths))
    )
    with pytest.raises(ValueError, match=r"score: expected one of \['additive', 'dot'\], got 'dott'"):
        functional.score_attention("dott", query, keys)


# Matrix products, which a CPU has from torch.
PRODUCTS = {"dot"}


@pytest.mark.cpu
@needs_native
def test_registries_name_the_same_scores():
    assert set(native.extension.scores()) == set(SCORES) - PRODUCTS
    assert set(ops.scores.native_kinds("cpu")) == set(native.extension.scores())


def test_triton_table_names_the_same_scores():
    pytest.importorskip("triton")
    table = pytest.importorskip("seqattn_kernels.kernels.scores")
    assert set(table.SCORES) == set(SCORES) == set(ops.scores.native_kinds("cuda"))


# Every kind


@pytest.mark.parametrize("kind", ["multi-head", "location", "pooling", "local", "monotonic"])
def test_compile(kind):
    torch.use_deterministic_algorithms(False)
    lengths, keys = torch.tensor([9, 0, 4]), torch.randn(3, 9, 5)
    query = torch.randn(3, 4, 6, requires_grad=True)
    if kind == "multi-head":
        module = nn.MultiHeadAdditiveAttention(6, 5, 8, heads=2)
        call = lambda q: module(q, keys, torch.cat([keys, keys], -1), lengths=lengths)  # noqa: E731
    elif kind == "location":
        module = nn.LocationSensitiveAttention(6, 5, 8, filters=3, kernel_size=3)
        history = torch.rand(3, 2, 9)
        call = lambda q: module(q[:, 0], keys, history, lengths=lengths)  # noqa: E731
    elif kind == "pooling":
        module = nn.PoolingAttention(6, 8, weighting="entmax15")
        call = lambda q: module(q, lengths=torch.tensor([4, 0, 2]))  # noqa: E731
    elif kind == "local":
        module = nn.LocalAttention(6, 5, 2.0, 3)
        call = lambda q: module(q, keys, lengths=lengths)  # noqa: E731
    else:
        module = nn.MonotonicAttention(6, 5, 8, noise=0.0)
        call = lambda q: module(q, keys, lengths=lengths)  # noqa: E731
    parameters = [query, *module.parameters()]
    expected = call(query)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(query)
    assert_close_to_float64(got, to_float64(expected))
    assert_close_to_float64(gradients(got, parameters), to_float64(gradients(expected, parameters)))


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["additive", "multi-head", "pooling", "location", "feature", "sparsemax"])
def test_vmap(kind):
    """A batch of problems at once: values and gradients, by a loop over the operators."""
    many = [torch.randn(3, *shape) for shape in ((2, 4, 6), (2, 9, 6), (2, 9, 5))]

    def call(query, keys, values):
        if kind == "additive":
            return functional.additive_attention(query, keys, torch.ones(6), values)[0]
        if kind == "multi-head":
            return functional.multi_head_additive_attention(query, keys, torch.ones(1, 6), values)[0]
        if kind == "pooling":
            return functional.pooling_attention(keys, torch.ones(4, 6), torch.ones(4), values)[0] * query.sum()
        if kind == "location":
            history, conv, weight = torch.ones(2, 1, 9), torch.ones(3, 1, 3), torch.ones(6, 3)
            return functional.location_attention(query[:, 0], keys, torch.ones(6), history, conv, weight, values)[0]
        if kind == "feature":
            return functional.feature_attention(keys, torch.eye(6))[0] * query.sum()
        return functional.sparsemax(query @ keys.transpose(1, 2)) @ values

    def gradient(query, keys, values):
        return torch.func.grad(lambda *t: call(*t).square().sum(), (0, 1, 2))(query, keys, values)

    one_by_one = [torch.stack(parts) for parts in zip(*(gradient(*t) for t in zip(*many, strict=True)), strict=True)]
    assert_close_to_float64(torch.func.vmap(call)(*many), torch.stack([call(*t) for t in zip(*many, strict=True)]))
    assert_close_to_float64(list(torch.func.vmap(gradient)(*many)), one_by_one)


@pytest.mark.parametrize("kind", ["additive", "multi-head", "location", "pooling", "cosine", "coverage", "monotonic"])
def test_autocast(kind):
    """Under autocast linear layers give bfloat16 and the rest may be float32: results as near as bfloat16 is.

    Backward is meant to run outside, but may run inside as well.
    """
    query, keys = torch.randn(3, 6, requires_grad=True), torch.randn(3, 9, 5, requires_grad=True)
    if kind == "additive":
        module, rest = nn.AdditiveAttention(6, 5, 8), ()
    elif kind == "multi-head":
        module, rest = nn.MultiHeadAdditiveAttention(6, 5, 8, heads=1), ()
    elif kind == "location":
        module, rest = nn.LocationSensitiveAttention(6, 5, 8, filters=3, kernel_size=3), (torch.rand(3, 2, 9) / 9,)
    elif kind == "coverage":
        module, rest = nn.CoverageAttention(6, 5, 8), (torch.rand(3, 9),)
    elif kind == "monotonic":
        module, rest = nn.MonotonicAttention(6, 5, 8, initial_bias=0.0, noise=0.0), ()
    elif kind == "cosine":
        module, rest = nn.CosineAttention(), ()
        query = query.detach()[:, :5].requires_grad_()
    else:
        module, rest = nn.PoolingAttention(6, 8), ()
    lengths = torch.tensor([9, 0, 4])

    def call(module, query, keys, *rest):
        if kind == "pooling":
            return module(query.unsqueeze(1).expand(3, 9, 6), lengths=lengths)[1]
        return module(query, keys, *rest, lengths=lengths)[1]

    with torch.autocast(query.device.type, torch.bfloat16):
        got = call(module, query, keys, *rest)
        inside = torch.autograd.grad(got.float().square().sum(), query, retain_graph=True)
    outside = torch.autograd.grad(got.float().square().sum(), query, retain_graph=True)
    assert_close_to_float64(inside, to_float64(outside), torch.bfloat16)
    wide = call(copy.deepcopy(module).double(), *to_float64([query, keys, *rest]))
    assert_close_to_float64(got, wide, torch.bfloat16)


MODULES = {
    "multi-head": lambda: nn.MultiHeadAdditiveAttention(6, 5, 8, heads=4),
    "cosine": lambda: nn.CosineAttention(2.0, learned=True),
    "location": lambda: nn.LocationSensitiveAttention(6, 5, 8),
    "coverage": lambda: nn.CoverageAttention(6, 5, 8),
    "local": lambda: nn.LocalAttention(6, 5, 2.0, weighting=Weighting(temperature=2.0)),
    "monotonic": lambda: nn.MonotonicAttention(6, 5, 8),
    "pooling": lambda: nn.PoolingAttention(6, 5, weighting="sparsemax"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_copy_pickle_and_print(name):
    module = MODULES[name]()
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_bits(dict(again.state_dict()), dict(module.state_dict()))
        assert str(again) == str(module)
    module.load_state_dict(MODULES[name]().state_dict(), strict=True)


q, k, v, w = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(4), torch.zeros(2, 5, 6)
history, conv, u = torch.zeros(2, 1, 5), torch.zeros(3, 1, 3), torch.zeros(4, 3)
BAD = {
    "width of heads": (
        lambda: functional.multi_head_additive_attention(q, k, torch.zeros(3, 2)),
        r"query: expected a last dimension N \* A = 6 \(from v\), got \[2, 3, 4\]",
    ),
    "values of heads": (
        lambda: functional.multi_head_additive_attention(q, k, torch.zeros(4, 1), w),
        r"values: expected a last dimension that N=4 heads divide, got \[2, 5, 6\]",
    ),
    "heads of a module": (lambda: nn.MultiHeadAdditiveAttention(4, 4, 6, 4), "heads: expected a number that divides"),
    "scale of cosines": (
        lambda: functional.cosine_attention(q, k, scale=torch.zeros(2, 5)),
        r"scale: expected a shape that broadcasts to \[2, 3\] \(from query\), got \[2, 5\]",
    ),
    "history": (
        lambda: functional.location_attention(q[:, 0], k, v, history[..., :4], conv, u),
        r"history: expected \[B, C, S\] with B=2, C=1, S=5, got \[2, 1, 4\]",
    ),
    "history of queries": (
        lambda: functional.location_attention(q, k, v, history, conv, u),
        r"history: expected \[B, T, C, S\], got \[2, 1, 5\]",
    ),
    "even convolution": (
        lambda: functional.location_attention(q[:, 0], k, v, history, conv[..., :2], u),
        r"conv_weight: expected \[F, C, W\] with W odd, got \[3, 1, 2\]",
    ),
    "feature_weight": (
        lambda: functional.location_attention(q[:, 0], k, v, history, conv, u.t()),
        r"feature_weight: expected \[A, F\] with A=4, F=3, got \[3, 4\]",
    ),
    "coverage": (
        lambda: functional.coverage_attention(q[:, 0], k, v, torch.zeros(2, 4), v),
        r"coverage: expected \[B, S, F\] with B=2, S=5, F=1, got \[2, 4, 1\]",
    ),
    "coverage of steps": (
        lambda: functional.coverage_attention(q, k, v, torch.zeros(2, 5), v),
        r"query: expected \[B, A\], got \[2, 3, 4\]",
    ),
    "weight of pooling": (
        lambda: functional.pooling_attention(k, torch.zeros(7, 3), torch.zeros(7)),
        r"weight: expected \[A, K\] with K=4, got \[7, 3\]",
    ),
    "v of pooling": (
        lambda: functional.pooling_attention(k, torch.zeros(7, 4), v),
        r"v: expected \[A\] with A=7, got \[4\]",
    ),
    "position": (
        lambda: functional.local_attention(q, k, torch.zeros(2), 1.0),
        r"position: expected \[2, 3\] \(from query\), got \[2\]",
    ),
    "window": (lambda: functional.local_attention(q, k, torch.zeros(2, 3), 0), "window: expected a positive number"),
    "mode": (lambda: functional.monotonic_attention(q, k, v, mode="soft"), "mode: expected 'expected' or 'hard'"),
    "previous": (
        lambda: functional.monotonic_attention(q, k, v, previous=torch.zeros(2, 4)),
        r"previous: expected \[B, S\] with B=2, S=5 \(from keys\), got \[2, 4\]",
    ),
    "kernel_size": (lambda: nn.LocationSensitiveAttention(1, 1, 1, kernel_size=4), "kernel_size: expected an odd"),
    "lengths": (
        lambda: functional.pooling_attention(k, torch.zeros(7, 4), torch.zeros(7), lengths=torch.tensor([5, 6])),
        r"lengths: expected values in \[0, 5\] .* got 6 at \[1\]",
    ),
}


@pytest.mark.cpu
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.cpu
def test_wrong_types():
    with pytest.raises(TypeError, match=r"mask: expected torch.bool, got torch.float32"):
        functional.monotonic_attention(q, k, v, mask=torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"position: expected a floating dtype, got torch.int64"):
        functional.local_attention(q, k, torch.zeros(2, 3, dtype=torch.long), 1.0)
    with pytest.raises(TypeError, match=r"history: expected torch.float32 \(from query\), got torch.float64"):
        functional.location_attention(q[:, 0], k, v, history.double(), conv, u)
