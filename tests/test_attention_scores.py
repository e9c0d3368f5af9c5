from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from seqattn_kernels import functional, native, reference
from seqattn_kernels.nn import AdditiveAttention, ConcatAttention, DotAttention, FeatureAttention, GeneralAttention
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, oracle_of, to_float64
from tests.test_attention import INF, MASKS, NAMES, NAN, k, q, v

pytestmark = pytest.mark.usefixtures("device")


def tutorial(kind, query, keys, values, parameters):
    if kind == "dot":
        scores = query @ keys.transpose(1, 2)
    elif kind == "scaled dot":
        scores = query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])
    elif kind == "general":
        scores = reference.attention.general_scores(query, keys, *parameters)
    else:
        scores = reference.attention.concat_scores(query, keys, *parameters)
    return scores


def other(kind, query, keys, values, parameters, **options):
    if kind == "dot":
        return functional.dot_attention(query, keys, values, **options)
    if kind == "scaled dot":
        return functional.dot_attention(query, keys, values, scale=True, **options)
    if kind == "general":
        return functional.general_attention(query, keys, parameters[0], values, **options)
    weight, v, bias = parameters
    return functional.concat_attention(query, keys, weight, v, values, bias=bias, **options)


def parameters_of(kind, Q, K, A=11):
    shapes = {"general": [(Q, K)], "concat": [(A, Q + K), (A,), (A,)]}.get(kind, [])
    return [(torch.randn(s) / 3).requires_grad_() for s in shapes]


@pytest.mark.parametrize("T", [1, 4, 20])
@pytest.mark.parametrize("masked", ["none", "lengths", "[B, T, S]", "added, -inf"])
@pytest.mark.parametrize("kind", ["dot", "scaled dot", "general", "concat"])
def test_other_scores(kind, masked, T):
    B, S, K = 3, 17, 6
    Q = K if "dot" in kind else 5
    query, keys = torch.randn(B, T, Q, requires_grad=True), torch.randn(B, S, K, requires_grad=True)
    values = torch.randn(B, S, 7, requires_grad=True)
    parameters, options = parameters_of(kind, Q, K), MASKS[masked](B, T, S)
    tensors = [query, keys, values, *parameters]
    wide, wide_options = to_float64(tensors), to_float64(options)
    keep = reference.attention.attended(keys, options.get("lengths"), options.get("mask"))
    scores = tutorial(kind, *wide[:3], wide[3:])
    weights = reference.attention.masked_softmax(scores, keep, wide_options.get("mask"))
    expected = weights @ wide[2], weights
    got = other(kind, query, keys, values, parameters, **options)
    assert_close_to_float64(got, expected, names=NAMES)
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide))
    without = other(kind, query, keys, values, parameters, need_weights=False, **options)
    assert without[1] is None
    assert_close_to_float64(without[0], expected[0])
    if T == 1 and masked != "[B, T, S]" and masked != "added, -inf":
        single = other(kind, query.squeeze(1), keys, values, parameters, **options)
        assert_close_to_float64(single, [t.squeeze(1) for t in expected], names=NAMES)


@pytest.mark.parametrize("kind", ["dot", "general", "concat"])
def test_nothing_leaks_in_other_scores(kind):
    query, keys = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 9, 6)
    parameters, lengths = parameters_of(kind, 6, 6), torch.tensor([4, 0])
    keys[0, 4:] = NAN
    keys[1] = INF
    keys.requires_grad_()
    context, weights = other(kind, query, keys, keys, parameters, lengths=lengths)
    assert context.isfinite().all()
    assert weights.isfinite().all()
    found = torch.autograd.grad(context.sum() + weights.square().sum(), [query, *parameters])
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("kind", ["dot", "general", "concat"])
@pytest.mark.cpu
@pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not built")
def test_a_key_only_neighbours_attend_to_does_not_leak(kind):
    """NaN at a key that one query may not attend to stays out of its context and of the gradients through it."""
    query, keys, values = torch.randn(1, 3, 6), torch.randn(1, 9, 6), torch.randn(1, 9, 4)
    parameters = parameters_of(kind, 6, 6)
    mask = torch.ones(1, 3, 9, dtype=torch.bool)
    mask[0, 1, 7] = False
    expected, _ = other(kind, query[:, 1:2], keys, values, parameters, mask=mask[:, 1:2])
    values[0, 7] = NAN
    query.requires_grad_()
    context, _ = other(kind, query, keys, values, parameters, mask=mask)
    assert_close_to_float64(context[:, 1:2], to_float64(expected))
    assert context[0, [0, 2]].isnan().all()
    found = torch.autograd.grad(context[0, 1].sum(), query)[0]
    assert found[0, 1].isfinite().all()


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"lengths": torch.tensor([7, 0, 3])}, {"mask": torch.tensor([[True] * 3 + [False] * 4] * 3)}]
)
def test_feature_attention(options, reduce):
    tensors = [torch.randn(3, 7, 5), torch.randn(5, 5), torch.randn(5)]
    for t in tensors:
        t.requires_grad_()
    options = {name: value.to(tensors[0].device) for name, value in options.items()}
    h, weight, bias = wide = to_float64(tensors)
    scores = torch.tanh(nn.functional.linear(h, weight, bias))
    expected = torch.zeros_like(h), torch.zeros_like(h)
    weights = []
    for b in range(3):
        n = 7 if not options else int(options["lengths"][b]) if "lengths" in options else 3
        weights.append(torch.cat([scores[b, :n].softmax(0), torch.zeros(7 - n, 5, dtype=torch.float64)]))
    expected = torch.stack(weights) * h, torch.stack(weights)
    if reduce:
        expected = expected[0].sum(1), expected[1]
    got = functional.feature_attention(*tensors, reduce=reduce, **options)
    assert_close_to_float64(got, expected)
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide))


def feature_formula(input, weight, bias, lengths=None, reduce=False):
    scores = torch.tanh(nn.functional.linear(input, weight, bias))
    S = input.shape[1]
    kept = [S] * len(input) if lengths is None else lengths.tolist()
    rows = [nn.functional.pad(scores[b, :n].softmax(0), (0, 0, 0, S - n)) for b, n in enumerate(kept)]
    weights = torch.stack(rows)
    return (weights * input).sum(1) if reduce else weights * input, weights


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 16), (3, 5, 63), (2, 70, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_feature_attention_sizes(shape, reduce, dtype, threads):
    B, S, D = shape
    tensors = [torch.randn(s, dtype=dtype).requires_grad_() for s in ((B, S, D), (D, D), (D,))]
    lengths = torch.randint(0, S + 1, (B,))
    wide = to_float64(tensors)
    got = functional.feature_attention(*tensors, lengths=lengths, reduce=reduce)
    expected = feature_formula(*wide, lengths, reduce)
    assert_close_to_float64(got, expected)
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide))
    for part in (0, 1):
        found = gradients(functional.feature_attention(*tensors, reduce=reduce)[part], tensors)
        assert_close_to_float64(found, gradients(feature_formula(*wide, None, reduce)[part], wide))


def test_nothing_leaks_in_feature_attention():
    tensors = [torch.randn(s).requires_grad_() for s in ((3, 9, 5), (5, 5), (5,))]
    lengths = torch.tensor([9, 0, 4])
    expected = functional.feature_attention(*tensors, lengths=lengths)
    expected_gradients = gradients(expected, tensors)
    with torch.no_grad():
        tensors[0][1] = NAN
        tensors[0][2, 4:] = INF
    got = functional.feature_attention(*tensors, lengths=lengths)
    assert_same_bits(got, expected)
    assert_close_to_float64(gradients(got, tensors), to_float64(expected_gradients))
    with torch.no_grad():
        assert_same_bits(functional.feature_attention(*tensors, lengths=lengths), got)


@pytest.mark.cpu
def test_feature_attention_twice_and_in_torch_machinery():
    torch.use_deterministic_algorithms(False)
    tensors = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 4, 3), (3, 3), (3,))]
    lengths = torch.tensor([4, 2])
    assert torch.autograd.gradgradcheck(lambda *t: functional.feature_attention(*t, lengths=lengths), tensors)
    inputs = torch.randn(2, 9, 5), torch.randn(5, 5), torch.randn(5)
    if native.why_not() is None:
        for reduce in (False, True):
            arguments = (*inputs, lengths, None, reduce, True)
            torch.library.opcheck(torch.ops.seqattn.feature_fwd.default, arguments)
            result, weights, tangents = torch.ops.seqattn.feature_fwd(*arguments)
            arguments = (*inputs, weights, tangents, torch.randn_like(result), None, lengths, None, reduce, True)
            torch.library.opcheck(torch.ops.seqattn.feature_bwd.default, arguments)
    module, input = FeatureAttention(5), torch.randn(2, 9, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(input, lengths=lengths)
    assert_close_to_float64(compiled, to_float64(module(input, lengths=lengths)))


# Modules


def modules():
    return [
        (AdditiveAttention(6, 5, 7), 6, 5),
        (AdditiveAttention(6, 5, 7, bias=False), 6, 5),
        (ConcatAttention(6, 5, 7), 6, 5),
        (ConcatAttention(6, 5, 7, bias=False), 6, 5),
        (DotAttention(), 5, 5),
        (DotAttention(scale=True), 5, 5),
        (GeneralAttention(6, 5), 6, 5),
    ]


@pytest.mark.parametrize("index", range(7))
def test_modules(index):
    module, Q, K = modules()[index]
    query, keys = torch.randn(3, 4, Q, requires_grad=True), torch.randn(3, 9, K)
    context, weights = module(query, keys, lengths=torch.tensor([9, 0, 4]))
    assert context.shape == (3, 4, K)
    assert weights.shape == (3, 4, 9)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_bits(again(query, keys)[0], module(query, keys)[0])
    wide = copy.deepcopy(module).double()
    assert_close_to_float64(module(query, keys), wide(query.double(), keys.double()))
    context.sum().backward()
    assert all(p.grad is not None for p in (query, *module.parameters()))
    assert str(module)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_modules_with_prepared_keys(index):
    module, Q, K = modules()[index]
    query, keys = torch.randn(3, Q), torch.randn(3, 9, K)
    prepared = module.prepare_keys(keys)
    assert_close_to_float64(module(query, prepared, keys), module(query, keys))
    with pytest.raises(ValueError, match=r"values: expected .* with prepared keys, got None"):
        module(query, prepared)


def test_feature_module():
    module = FeatureAttention(6, reduce=True)
    context, weights = module(torch.randn(2, 5, 6))
    assert context.shape == (2, 6)
    assert weights.shape == (2, 5, 6)
    assert set(module.state_dict()) == {"linear.weight", "linear.bias"}


def test_under_autocast():
    module = AdditiveAttention(6, 5, 7)
    query, keys = torch.randn(3, 4, 6), torch.randn(3, 9, 5)
    with torch.autocast(query.device.type, torch.bfloat16):
        context, weights = module(query, keys)
    assert_close_to_float64(weights, oracle_of(module.double(), query, keys)[1], torch.bfloat16)
    assert context.dtype == torch.bfloat16


@pytest.mark.cpu
def test_bad_input_of_other_scores():
    with pytest.raises(ValueError, match=r"weight: expected \[A, Q \+ K\] with Q=4"):
        functional.concat_attention(q, k, torch.zeros(3, 7), v[:3])
    with pytest.raises(ValueError, match=r"weight: expected \[Q, K\] with Q=4"):
        functional.general_attention(q, k, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"keys: expected \[B, S, A\] with B=2, A=4"):
        functional.dot_attention(q, k[..., :2])
    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 5\]"):
        functional.dot_attention(q, k, lengths=torch.tensor([9, 1]))
    with pytest.raises(ValueError, match=r"weight: expected \[D, D\] with D=4"):
        functional.feature_attention(k, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"input: expected \[B, S, D\], got \[4\]"):
        functional.feature_attention(v, torch.zeros(4, 4))
    with pytest.raises(TypeError, match=r"mask: expected torch.bool"):
        functional.feature_attention(k, torch.zeros(4, 4), mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"keys: expected \[B, S, A\], got \[5, 4\]"):
        functional.prepare_keys(k[0])
