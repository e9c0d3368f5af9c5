"""Location-sensitive and coverage attention and the operator of scores, against plain formulas in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from seqattn_kernels import functional, nn, ops, reference
from tests.cases import DTYPES
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, to_float64
from tests.test_attention import INF, MASKS, NAN
from tests.test_attention_kinds import BACKENDS, check, leaves, needs_native, softmax_of

pytestmark = pytest.mark.usefixtures("device")


def location_scores(query, keys, v, history, conv_weight, feature_weight, bias=None):
    """The convolution as a sum over its taps, for one query: history [B, C, S]."""
    S = history.shape[2]
    taps = conv_weight.shape[2]
    padded = F.pad(history, (taps // 2, taps // 2))
    features = sum(padded[:, :, w : w + S].transpose(1, 2) @ conv_weight[:, :, w].t() for w in range(taps))  # [B, S, F]
    inner = query.unsqueeze(1) + keys + features @ feature_weight.t()
    return ((inner if bias is None else inner + bias).tanh() @ v).unsqueeze(1)


def location_inputs(B=3, S=21, A=19, D=6, filters=5, channels=2, taps=7, dtype=torch.float32):
    tensors = leaves(
        (B, A), (B, S, A), (A,), (B, channels, S), (filters, channels, taps), (A, filters), (B, S, D), (A,), dtype=dtype
    )
    with torch.no_grad():
        tensors[3].copy_(tensors[3].softmax(-1))
        tensors[2].div_(math.sqrt(A))
    return tensors


def location(query, keys, v, history, conv_weight, feature_weight, values, bias, **options):
    return functional.location_attention(
        query, keys, v, history, conv_weight, feature_weight, values, bias=bias, **options
    )


@pytest.mark.parametrize("masked", ["none", "lengths", "[B, S]", "added", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_location_attention(masked, backend, threads):
    options = MASKS[masked](3, 1, 21)
    if options.get("mask") is not None and options["mask"].dim() == 3:
        options["mask"] = options["mask"][:, 0]

    def formula(query, keys, v, history, conv_weight, feature_weight, values, bias):
        scores = location_scores(query, keys, v, history, conv_weight, feature_weight, bias)
        return [t.squeeze(1) for t in softmax_of(scores, values, **to_float64(options))]

    check(lambda *t: location(*t, backend=backend, **options), formula, location_inputs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_location_attention_in(dtype):
    def formula(*t):
        return [x.squeeze(1) for x in softmax_of(location_scores(*t[:6], t[7]), t[6])]

    check(location, formula, location_inputs(dtype=dtype), dtype)


@pytest.mark.parametrize("A", [1, 16, 63, 130])
@pytest.mark.parametrize("S", [1, 8, 9, 63])
def test_location_attention_of_odd_sizes(S, A):
    def formula(*t):
        return [x.squeeze(1) for x in softmax_of(location_scores(*t[:6], t[7]), t[6])]

    check(location, formula, location_inputs(S=S, A=A, channels=1, taps=3))


def test_location_attention_of_many_queries():
    """Each query with a history of its own is each query by itself."""
    _, keys, v, _, conv_weight, feature_weight, values, bias = location_inputs()
    queries, histories = leaves((3, 4, 19), (3, 4, 2, 21))
    tensors = [queries, keys, v, histories, conv_weight, feature_weight, values, bias]
    lengths = torch.tensor([21, 0, 13])
    got = location(*tensors, lengths=lengths)
    steps = [
        location(queries[:, t], keys, v, histories[:, t], conv_weight, feature_weight, values, bias, lengths=lengths)
        for t in range(4)
    ]
    expected = [torch.stack(parts, 1) for parts in zip(*steps, strict=True)]
    assert_close_to_float64(got, to_float64(expected))
    wide = to_float64(tensors)
    oracle = [
        softmax_of(location_scores(wide[0][:, t], *wide[1:3], wide[3][:, t], *wide[4:6], wide[7]), wide[6], lengths)
        for t in range(4)
    ]
    expected = [torch.cat(parts, 1) for parts in zip(*oracle, strict=True)]
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide))


@pytest.mark.parametrize("history_gradient", [True, False])
def test_location_attention_step_after_step(history_gradient):
    """Three decoder steps through the module, weights feeding the history, against plain torch in float64."""
    module = nn.LocationSensitiveAttention(4, 5, 6, filters=3, kernel_size=5, history_gradient=history_gradient)
    queries, keys = leaves((2, 3, 4), (2, 9, 5))
    lengths = torch.tensor([9, 4])

    def run(module, queries, keys, plain):
        history, out = module.initial(keys), []
        prepared = module.prepare_keys(keys)
        for t in range(3):
            if plain:
                seen = history if history_gradient else history.detach()
                scores = location_scores(
                    module.query_proj(queries[:, t]),
                    module.key_proj(keys),
                    module.v,
                    seen,
                    module.conv.weight,
                    module.feature_proj.weight,
                )
                context, weights = (x.squeeze(1) for x in softmax_of(scores, keys, lengths))
            else:
                context, weights = module(queries[:, t], prepared, history, keys, lengths=lengths)
            history = module.next_history(history, weights)
            out += [context, weights]
        return out

    wide_module, wide = copy.deepcopy(module).double(), to_float64([queries, keys])
    got, expected = run(module, queries, keys, False), run(wide_module, *wide, True)
    assert_close_to_float64(got, expected)
    found = gradients(got, [queries, keys, *module.parameters()])
    assert_close_to_float64(found, gradients(expected, [*wide, *wide_module.parameters()]))


def test_location_keys_past_the_length_may_be_anything():
    tensors = location_inputs()
    lengths = torch.tensor([21, 0, 13])
    expected = location(*tensors, lengths=lengths)
    expected_gradients = gradients(expected, tensors)
    with torch.no_grad():
        for b, n in enumerate(lengths):
            tensors[1][b, n:] = NAN
            tensors[6][b, n:] = INF
    got = location(*tensors, lengths=lengths)
    assert_same_bits(got, expected)
    assert_close_to_float64(gradients(got, tensors), to_float64(expected_gradients))


@pytest.mark.parametrize("size", [1e-30, 1e-4, 50.0, 1e4, 1e30])
def test_location_attention_of_any_size(size):
    """Arguments of tanh far out, and far in: what saturates has no gradient, and what is tiny keeps its digits."""
    for scaled in ((0, 1), (0,), (1,)):
        tensors = location_inputs()
        with torch.no_grad():
            for i in scaled:
                tensors[i].mul_(size)

        def formula(*t):
            return [x.squeeze(1) for x in softmax_of(location_scores(*t[:6], t[7]), t[6])]

        wide = to_float64(tensors)
        got = location(*tensors)
        assert_close_to_float64(got, formula(*wide))
        assert all(g.isfinite().all() for g in gradients(got, tensors))


def test_location_export():
    torch.use_deterministic_algorithms(False)
    module = nn.LocationSensitiveAttention(4, 5, 6, filters=3, kernel_size=5).eval()
    keys = torch.randn(2, 9, 5)
    arguments = torch.randn(2, 4), keys, module.initial(keys)
    with torch.no_grad():
        program = torch.export.export(module, arguments)
        assert_close_to_float64(program.module()(*arguments), to_float64(module(*arguments)))


def test_location_gradcheck_twice():
    tensors = location_inputs(B=2, S=5, A=3, D=2, filters=2, taps=3, dtype=torch.float64)
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda *t: location(*t, lengths=lengths), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: location(*t, lengths=lengths), tensors)


@pytest.mark.parametrize("filters", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_coverage_attention(filters, backend):
    F_ = () if filters is None else (filters,)
    tensors = leaves((3, 11), (3, 17, 11), (11,), (3, 17, *F_), (11, *F_), (3, 17, 4))
    lengths = torch.tensor([17, 0, 5])

    def formula(query, keys, v, coverage, weight, values):
        term = coverage[..., None] * weight if filters is None else coverage @ weight.t()
        scores = ((query.unsqueeze(1) + keys + term).tanh() @ v).unsqueeze(1)
        return [t.squeeze(1) for t in softmax_of(scores, values, lengths)]

    check(lambda *t: functional.coverage_attention(*t, lengths=lengths, backend=backend), formula, tensors)


def test_coverage_module_and_loss():
    module = nn.CoverageAttention(4, 5, 6, most_fertile=3.0)
    queries, keys = torch.randn(2, 3, 4), torch.randn(2, 9, 5)
    coverage, fertility = module.initial(keys), module.fertility(keys)
    assert ((fertility > 0) & (fertility < 3)).all()
    assert_close_to_float64(fertility, 3 * (keys.double() @ module.fertility_weight.double()).sigmoid())
    prepared, total, loss = module.prepare_keys(keys), torch.zeros(2, 9), []
    for t in range(3):
        context, weights = module(queries[:, t], prepared, coverage, keys)
        assert_close_to_float64(context, weights.double().unsqueeze(1).matmul(keys.double()).squeeze(1))
        loss.append(functional.coverage_loss(weights, coverage))
        coverage, total = module.next_coverage(coverage, weights, fertility), total + weights / fertility
    assert (loss[0] == 0).all()
    assert (loss[1] > 0).all()
    assert_close_to_float64(coverage, total.double())
    sum(x.sum() for x in loss).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert (nn.CoverageAttention(4, 5, 6).fertility(keys) == 1).all()


# The operator of scores


def score_arguments(features, dtype=torch.float32, T=4):
    """query, keys, v, features, feature_weight of the operator."""
    shapes = {"none": None, "[B, S, F]": (3, 17, 5), "[B, T, S, F]": (3, T, 17, 5)}
    tensors = leaves((3, T, 9), (3, 17, 9), (9,), dtype=dtype)
    if features == "none":
        return [*tensors, None, None]
    return tensors + leaves(shapes[features], (5, 9), dtype=dtype)


@pytest.mark.cpu
@needs_native
@pytest.mark.parametrize("T", [1, 4, 14])
@pytest.mark.parametrize("features", ["none", "[B, S, F]", "[B, T, S, F]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_operator(features, dtype, T, threads):
    arguments, lengths = score_arguments(features, dtype, T), torch.tensor([17, 0, 5])
    got = ops.scores.scores("additive", *arguments, lengths)
    wide = to_float64([t for t in arguments if t is not None])
    expected = reference.attention.additive_scores(*wide)
    expected = expected * (torch.arange(17) < lengths[:, None])[:, None]
    assert_close_to_float64(got, expected)
    given = [t for t in arguments if t is not None]
    assert_close_to_float64(gradients(got, given), gradients(expected, wide))


@pytest.mark.cpu
@needs_native
@pytest.mark.parametrize("features", ["none", "[B, S, F]"])
def test_scores_without_a_gradient_contribute_none(features):
    arguments = score_arguments(features)
    with torch.no_grad():
        arguments[1][1, 3] = NAN
        arguments[0][2, 1] = NAN
    given = [t for t in arguments if t is not None]
    d_scores = torch.randn(3, 4, 17)
    d_scores[1, :, 3] = 0
    d_scores[2, 1] = 0
    found = torch.ops.seqattn.scores_bwd(0, d_scores, *[None if t is None else t.detach() for t in arguments], None)
    assert all(t.isfinite().all() for t in found)
    clean = [t.detach().nan_to_num(0.3).double().requires_grad_() for t in given]
    expected = torch.autograd.grad(reference.attention.additive_scores(*clean), clean, d_scores.double())
    assert_close_to_float64([t for t in found if t.numel()], expected)


@pytest.mark.cpu
@needs_native
@pytest.mark.parametrize("features", ["none", "[B, S, F]", "[B, T, S, F]"])
def test_scores_opcheck_and_second_derivative(features):
    torch.use_deterministic_algorithms(False)
    arguments, lengths = score_arguments(features), torch.tensor([17, 0, 5])
    plain = [None if t is None else t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.seqattn.scores_fwd.default, (0, *plain, lengths))
    backward = torch.ops.seqattn.scores_bwd.default
    torch.library.opcheck(backward, (0, torch.randn(3, 4, 17), *plain, None))
    small = [None if t is None else t[:1, ..., :3].detach().double() for t in score_arguments("none", T=2)[:2]]
    tensors = [t[:, :3].clone().requires_grad_() for t in small] + leaves((3,), dtype=torch.float64)
    lengths = torch.tensor([2])
    assert torch.autograd.gradgradcheck(lambda *t: ops.scores.scores("additive", *t, lengths=lengths), tensors)


@pytest.mark.cpu
@needs_native
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)], ids=str)
@pytest.mark.parametrize("featured", [False, True])
def test_scores_of_empty_sizes(shape, featured):
    B, T, S, A = shape
    tensors = leaves((B, T, A), (B, S, A), (A,)) + (leaves((B, T, S, 2), (2, A)) if featured else [])
    got = ops.scores.scores("additive", *tensors)
    assert got.shape == (B, T, S)
    wide = to_float64(tensors)
    assert_close_to_float64(got, reference.attention.additive_scores(*wide))
    found = gradients(got, tensors)
    assert_close_to_float64(found, gradients(reference.attention.additive_scores(*wide), wide))


@pytest.mark.cpu
@needs_native
def test_scores_operator_checks_its_arguments():
    fwd = torch.ops.seqattn.scores_fwd
    q, k, v = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(4)
    f, u = torch.zeros(2, 5, 6), torch.zeros(6, 4)
    for arguments, message in (
        ((1, q, k, v, None, None, None), "kind: expected a number of the registry of scores, got 1"),
        ((0, q[:, 0], k, v, None, None, None), r"query: expected \[B, T, A\], got \[2, 4\]"),
        ((0, q, k[..., :3], v, None, None, None), r"keys: expected shape \[2, \*, 4\]"),
        ((0, q, k, torch.zeros(3, 4), None, None, None), r"v: expected \[A\] or \[H, A\] with H dividing B=2"),
        ((0, q, k, v[:2], None, None, None), r"v: expected shape \[4\]"),
        ((0, q, k, v, f, None, None), "features: expected them with feature_weight, or neither"),
        ((0, q, k, v, f[:, :4], u, None), r"features: expected shape \[2, 5, 6\]"),
        ((0, q, k, v, f, u[:, :3], None), r"feature_weight: expected shape \[\*, 4\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(*arguments)


@needs_native
@pytest.mark.cpu
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 0, 4])], ids=["all", "lengths"])
@pytest.mark.parametrize("T", [None, 3])
def test_location_operator_in_torch_machinery(T, lengths):
    torch.use_deterministic_algorithms(False)
    steps = () if T is None else (T,)
    shapes = [(3, *steps, 7), (3, 9, 7), (7,), (3, *steps, 2, 9), (5, 2, 3), (7, 5)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.library.opcheck(torch.ops.seqattn.location_fwd.default, (*(t.detach() for t in tensors), lengths))
    assert torch.autograd.gradcheck(lambda *t: ops.location.scores(*t, lengths), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: ops.location.scores(*t, lengths), tensors)
    with pytest.raises(RuntimeError, match=r"conv_weight: expected \[F, C, W\] with W odd, got \[5, 2, 2\]"):
        torch.ops.seqattn.location_fwd(*tensors[:4], tensors[4][..., :2], tensors[5], lengths)
    with pytest.raises(RuntimeError, match="history: expected shape"):
        torch.ops.seqattn.location_fwd(*tensors[:3], tensors[3][..., 0, :], *tensors[4:], lengths)
