"""The operators over a linear layer, self-attentive pooling and attention for each feature: every size, any garbage."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seqattn_kernels import functional, native, ops, reference
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, to_float64

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not built"),
]
NAN, INF = float("nan"), float("inf")


def formula(input, weight, v, bias=None, values=None, lengths=None, mask=None):
    inner = F.linear(input, weight, bias)
    scores = (inner.tanh() @ (v.unsqueeze(0) if v.dim() == 1 else v).t()).transpose(1, 2)
    keep = reference.attention.attended(input, lengths, mask)
    weights = reference.normalizers.normalize("softmax", scores, lengths, mask)
    pooled = weights @ reference.attention.without_unattended(input if values is None else values, keep)
    return (pooled.squeeze(1), weights.squeeze(1)) if v.dim() == 1 else (pooled, weights)


def problem(B, S, K, A, rows, dtype, values=None):
    """Parameters are as small as layers start with: weights of nearly one key lose their gradient's digits anywhere."""
    shapes = [(A, K), (A,) if rows is None else (rows, A), (A,)]
    input, *rest = [(B, S, K)] if values is None else [(B, S, K), (B, S, values)]
    parameters = [torch.randn(shape, dtype=dtype) / max(shape[-1], 1) ** 0.5 for shape in shapes]
    tensors = [torch.randn(input, dtype=dtype), *parameters, *(torch.randn(shape, dtype=dtype) for shape in rest)]
    return [t.requires_grad_() for t in tensors]


def call(function, tensors, **masks):
    input, weight, v, bias, *values = tensors
    return function(input, weight, v, bias=bias, values=values[0] if values else None, **masks)


# Blocks of 60 rows, panels of up to 64 columns, groups of blocks: each met short of, at and past its end.
SIZES = [(1, 1, 1, 1), (2, 63, 5, 257), (3, 60, 64, 16), (70, 3, 20, 17), (1, 257, 130, 63), (5, 121, 33, 100)]


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sizes(size, rows, dtype, threads):
    B, S, K, A = size
    tensors = problem(B, S, K, A, rows, dtype, values=None if rows is None else 7)
    lengths = torch.randint(0, S + 1, (B,))
    wide = to_float64(tensors)
    got = call(functional.pooling_attention, tensors, lengths=lengths)
    expected = call(formula, wide, lengths=lengths)
    assert_close_to_float64(got, expected)
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide))
    for part in (0, 1):
        found = gradients(call(functional.pooling_attention, tensors, lengths=lengths)[part], tensors)
        assert_close_to_float64(found, gradients(call(formula, wide, lengths=lengths)[part], wide))


@pytest.mark.parametrize("kind", ["pooling", "feature"])
def test_number_of_threads_changes_no_bit(kind, fixed_threads):
    tensors = problem(9, 130, 70, 70, None, torch.float32)
    lengths = torch.randint(0, 131, (9,))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        if kind == "pooling":
            got = call(functional.pooling_attention, tensors, lengths=lengths)
            found.append([*got, *gradients(got, tensors)])
        else:
            got = functional.feature_attention(tensors[0], tensors[1], tensors[3], lengths=lengths)
            found.append([*got, *gradients(got, [tensors[0], tensors[1], tensors[3]])])
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("masks", ["lengths", "boolean", "added"])
@pytest.mark.parametrize("rows", [None, 2])
def test_nothing_leaks(rows, masks):
    """What nobody attends to, NaN included, changes no result and no gradient; a row without keys is zero."""
    tensors = problem(3, 9, 5, 6, rows, torch.float32, values=4)
    attend = torch.rand(3, 9) < 0.6
    attend[1] = False
    lengths = torch.tensor([9, 0, 4])
    options = {
        "lengths": {"lengths": lengths},
        "boolean": {"mask": attend},
        "added": {"mask": torch.zeros(3, 9).masked_fill(~attend, -INF)},
    }[masks]
    if masks == "lengths":
        attend = torch.arange(9) < lengths.unsqueeze(1)
    expected = call(functional.pooling_attention, tensors, **options)
    assert all((t[1] == 0).all() for t in expected)
    expected_gradients = gradients(expected, tensors)
    with torch.no_grad():
        for t in (tensors[0], tensors[4]):
            t.masked_fill_(~attend.unsqueeze(-1), NAN)
        tensors[0][1, 0] = INF
    got = call(functional.pooling_attention, tensors, **options)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(got, tensors), expected_gradients)
    with torch.no_grad():
        assert_same_bits(call(functional.pooling_attention, tensors, **options), got)


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_huge_inner_products(size):
    tensors = problem(2, 9, 5, 6, None, torch.float32)
    with torch.no_grad():
        tensors[0].mul_(size)
    wide = to_float64(tensors)
    assert_close_to_float64(call(functional.pooling_attention, tensors), call(formula, wide))
    feature = functional.feature_attention(tensors[0], torch.eye(5))
    assert_close_to_float64(feature, reference.attention.feature_attention(wide[0], torch.eye(5).double()))


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("rows", [None, 2])
def test_empty(shape, rows):
    tensors = problem(*shape, 6, rows, torch.float32)
    pooled, weights = call(functional.pooling_attention, tensors)
    middle = () if rows is None else (rows,)
    assert pooled.shape == (shape[0], *middle, shape[2])
    assert weights.shape == (shape[0], *middle, shape[1])
    found = gradients((pooled, weights), tensors)
    assert all((g == 0).all() for g in (found if not shape[0] * shape[1] else [found[0]]))


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("values", [None, 4])
def test_twice_and_in_torch_machinery(rows, values):
    torch.use_deterministic_algorithms(False)
    tensors = problem(2, 4, 3, 5, rows, torch.float64, values)
    lengths = torch.tensor([4, 2])
    assert torch.autograd.gradgradcheck(
        lambda *t: call(functional.pooling_attention, t, lengths=lengths), tensors, nondet_tol=0
    )
    input, weight, v, bias, *rest = (t.detach() for t in tensors)
    given = (input, weight, bias, v, rest[0] if rest else None)
    torch.library.opcheck(torch.ops.seqattn.pooling_fwd.default, (*given, lengths, None, True))
    pooled, weights, tangents = torch.ops.seqattn.pooling_fwd(*given, lengths, None, True)
    arguments = (*given, weights, tangents, torch.randn_like(pooled), torch.randn_like(weights), lengths, None)
    for needs in (True, False):
        torch.library.opcheck(torch.ops.seqattn.pooling_bwd.default, (*arguments, needs, needs))
    compiled = torch.compile(functional.pooling_attention, fullgraph=True, backend="aot_eager")
    got = call(compiled, tensors, lengths=lengths)
    expected = call(functional.pooling_attention, tensors, lengths=lengths)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(got, tensors), gradients(expected, tensors))


def test_only_gradients_that_are_needed():
    input, weight, v, bias = (t.detach() for t in problem(2, 4, 3, 5, None, torch.float32))
    v.requires_grad_()
    functional.pooling_attention(input, weight, v, bias=bias)[0].sum().backward()
    wide = to_float64([input, weight, v, bias])
    assert_close_to_float64(v.grad, torch.autograd.grad(formula(*wide)[0].sum(), wide[2])[0])
    assert input.grad is None


def test_operator_refuses_what_does_not_fit():
    input, weight, v = torch.zeros(2, 4, 3), torch.zeros(5, 3), torch.zeros(5)
    for bad, message in [
        ((input, torch.zeros(5, 4), None, v), r"weight: expected shape \[\*, 3\], got \[5, 4\]"),
        ((input, weight, torch.zeros(4), v), r"bias: expected shape \[5\], got \[4\]"),
        ((input, weight, None, torch.zeros(2, 4)), r"v: expected shape \[\*, 5\], got \[2, 4\]"),
        ((input, weight, None, v, torch.zeros(2, 3, 3)), r"values: expected shape \[2, 4, \*\], got \[2, 3, 3\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.pooling.attention(*bad)
