"""Local and monotonic attention, against plain formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from seqattn_kernels import functional, nn, ops, reference
from tests.compare import assert_close_to_float64, assert_same_bits, gradients, to_float64
from tests.test_attention import MASKS, NAN
from tests.test_attention_kinds import BACKENDS, check, leaves, needs_native

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("gaussian", [True, False])
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("masked", ["none", "lengths", "[B, T, S]", "added"])
def test_local(score, gaussian, masked):
    tensors, options = leaves((3, 4, 7), (3, 23, 7), (3, 23, 5), (7,)), MASKS[masked](3, 4, 23)
    position = (torch.rand(3, 4) * 23).requires_grad_()
    window = 3.5

    def ours(query, keys, values, v, position):
        given = v if score == "additive" else None
        return functional.local_attention(
            query, keys, position, window, values, score=score, v=given, gaussian=gaussian, **options
        )

    def formula(query, keys, values, v, position):
        away = torch.arange(23, dtype=torch.float64) - position.unsqueeze(-1)
        keep = (away.abs() <= window) & ~torch.zeros(3, 4, 23, dtype=torch.bool)
        attend = reference.attention.attended(keys, options.get("lengths"), options.get("mask"))
        keep = keep if attend is None else keep & attend
        scores = query @ keys.transpose(1, 2) if score == "dot" else reference.attention.additive_scores(query, keys, v)
        mask = options.get("mask")
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + (mask if mask.dim() == 3 else mask.unsqueeze(1))
        weights = reference.normalizers.normalize("softmax", scores, mask=keep)
        if gaussian:
            weights = weights * (-(away**2) / (2 * (window / 2) ** 2)).exp()
        return weights @ values, weights

    check(ours, formula, [*tensors, position])


def test_local_modules():
    query, keys, lengths = torch.randn(3, 4, 6), torch.randn(3, 19, 5), torch.tensor([19, 1, 10])
    predicted = nn.LocalAttention(6, 5, window=4.0, attention_size=3)
    _, weights = predicted(query, keys, lengths=lengths)
    wide = copy.deepcopy(predicted).double()
    share = ((query.double() @ wide.position_weight.t()).tanh() @ wide.position_v).sigmoid()
    expected = functional.predict_position(query, predicted.position_weight, predicted.position_v, 19, lengths)
    assert_close_to_float64(expected, share * lengths.unsqueeze(1))
    relative = functional.predict_position(
        query, predicted.position_weight, predicted.position_v, 19, lengths.float() / 19
    )
    assert_close_to_float64(relative, share * lengths.unsqueeze(1))
    away = (torch.arange(19) - expected.detach().unsqueeze(-1)).abs()
    assert (weights[away > 4.0] == 0).all()
    weights.sum().backward()
    assert all(p.grad is not None for p in predicted.parameters())
    given = nn.LocalAttention(6, 5, window=2.0)
    step, _ = given(query[:, 2], keys, torch.full((3,), 2.0))
    whole, _ = given(query, keys, torch.arange(4.0).expand(3, 4))
    assert_close_to_float64(step, whole[:, 2].double())
    with pytest.raises(ValueError, match="position: expected a tensor"):
        given(query, keys)
    with pytest.raises(ValueError, match="position: expected None"):
        predicted(query, keys, torch.zeros(3, 4))


# Monotonic attention


def walk(choose, previous=None):
    """Where attention stands, by following every path: equations 6 to 8 of the paper, as loops."""
    B, T, S = choose.shape
    result = torch.zeros(B, T, S, dtype=torch.float64)
    for b in range(B):
        stands = [1.0] + [0.0] * (S - 1) if previous is None else previous[b].tolist()
        for t in range(T):
            now = [0.0] * S
            for start in range(S):
                arrives = stands[start]
                for s in range(start, S):
                    p = choose[b, t, s].item()
                    now[s] += arrives * p
                    arrives *= 1 - p
            stands = now
            result[b, t] = torch.tensor(now)
    return result


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (2, 4, 9), (2, 3, 33)], ids=str)
def test_expected_alignment(shape):
    choose = torch.rand(shape)
    choose[..., -1:] = 0.5
    assert_close_to_float64(reference.alignment.monotonic_alignment(choose), walk(choose))
    previous = torch.rand(shape[0], shape[2]).softmax(-1)
    got = reference.alignment.monotonic_alignment(choose, previous)
    assert_close_to_float64(got, walk(choose, previous))


@pytest.mark.parametrize("value", [1 - 1e-6, 1e-6])
def test_expected_alignment_is_stable(value):
    """Where products of (1 - p) vanish, a quotient of them (as in the paper's formula) would be 0 / 0."""
    choose = torch.full((1, 300, 500), value).requires_grad_()
    weights = reference.alignment.monotonic_alignment(choose)
    wide = to_float64(choose)
    assert_close_to_float64(weights, reference.alignment.monotonic_alignment(wide))
    assert weights.isfinite().all()
    found = torch.autograd.grad(weights[:, -1].square().sum(), choose)[0]
    assert found.isfinite().all()


@pytest.mark.cpu
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 40), (5, 7, 33), (2, 0, 4), (0, 3, 4), (2, 3, 0)], ids=str)
def test_alignment_operator(shape, dtype, threads):
    choose = torch.rand(shape, dtype=dtype).requires_grad_()
    previous = torch.rand(shape[0], shape[2], dtype=dtype).requires_grad_()
    check(ops.alignment.monotonic, reference.alignment.monotonic_alignment, [choose, previous])


@pytest.mark.cpu
@needs_native
def test_alignment_operator_in_torch_machinery():
    torch.use_deterministic_algorithms(False)
    choose, previous = torch.rand(2, 3, 5), torch.rand(2, 5)
    torch.library.opcheck(torch.ops.seqattn.monotonic_fwd.default, (choose, previous))
    weights = torch.ops.seqattn.monotonic_fwd(choose, previous)
    arguments = (choose, previous, weights, torch.randn(2, 3, 5))
    torch.library.opcheck(torch.ops.seqattn.monotonic_bwd.default, arguments)
    with pytest.raises(RuntimeError, match=r"previous: expected shape \[2, 5\], got \[2, 4\]"):
        torch.ops.seqattn.monotonic_fwd(choose, previous[:, :4])
    tensors = [t.double().requires_grad_() for t in (choose, previous)]
    assert torch.autograd.gradcheck(ops.alignment.monotonic, tensors)
    assert torch.autograd.gradgradcheck(ops.alignment.monotonic, tensors)


def energies(query, keys, v, bias=0.0):
    return (query.unsqueeze(2) + keys.unsqueeze(1)).tanh() @ v + bias


@pytest.mark.parametrize("masked", ["none", "lengths", "[B, S]"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_monotonic_expected(masked, backend):
    tensors, options = leaves((3, 4, 7), (3, 12, 7), (7,), (3, 12, 5), ()), MASKS[masked](3, 4, 12)
    if "lengths" in options:
        options["lengths"] = options["lengths"].clamp(max=12)

    def ours(query, keys, v, values, bias):
        return functional.monotonic_attention(query, keys, v, values, score_bias=bias, backend=backend, **options)

    def formula(query, keys, v, values, bias):
        choose = energies(query, keys, v, bias).sigmoid()
        keep = reference.attention.attended(keys, options.get("lengths"), options.get("mask"))
        choose = choose if keep is None else choose * keep
        previous = torch.zeros(3, 12, dtype=torch.float64)
        previous[:, 0] = 1
        weights = []
        for t in range(4):  # alpha_s = p_s ((1 - p_{s-1}) alpha_{s-1} / p_{s-1} + previous_s), without the quotient
            arrives, now = torch.zeros(3, dtype=torch.float64), []
            for s in range(12):
                arrives = arrives * (1 - choose[:, t, s - 1] if s else 0) + previous[:, s]
                now.append(arrives * choose[:, t, s])
            previous = torch.stack(now, 1)
            weights.append(previous)
        stacked = torch.stack(weights, 1)
        return stacked @ values, stacked

    check(ours, formula, tensors)


def test_monotonic_hard():
    query, keys, v, values = (t.detach() for t in leaves((3, 6, 7), (3, 12, 7), (7,), (3, 12, 5)))
    lengths = torch.tensor([12, 0, 5])
    context, weights = functional.monotonic_attention(query, keys, v, values, mode="hard", lengths=lengths)
    e = energies(query.double(), keys.double(), v.double())
    for b in range(3):
        at = 0
        for t in range(6):
            while at is not None and at < lengths[b] and e[b, t, at] <= 0:
                at += 1
            at = None if at is None or at >= lengths[b] else at
            expected = torch.zeros(12) if at is None else F.one_hot(torch.tensor(at), 12)
            assert_same_bits(weights[b, t], expected.float())
            assert_same_bits(context[b, t], torch.zeros(5) if at is None else values[b, at])
    previous = None
    for t in range(6):  # step by step, as a decoder goes
        _, previous = functional.monotonic_attention(
            query[:, t], keys, v, values, previous, mode="hard", lengths=lengths
        )
        assert_same_bits(previous, weights[:, t])


def test_monotonic_module_and_noise():
    module = nn.MonotonicAttention(6, 5, 4, initial_bias=-0.5)
    query, keys = torch.randn(2, 3, 6), torch.randn(2, 9, 5)
    torch.manual_seed(3)
    _, first = module(query, keys)
    torch.manual_seed(3)
    assert_same_bits(module(query, keys)[1], first)
    assert (module(query, keys)[1] != first).any()
    first.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    _, hard = module(query, keys)
    assert ((hard == 0) | (hard == 1)).all()
    _, soft = module(query, keys, mode="expected")
    scaled = module.scale * module.v / module.v.norm()
    e = energies(module.query_proj(query), module.key_proj(keys), scaled, module.score_bias)
    assert_close_to_float64(soft, walk(e.sigmoid().detach().double()))
    prepared = module.prepare_keys(keys)
    assert_close_to_float64(
        module(query, prepared, keys, mode="expected"), to_float64(module(query, keys, mode="expected"))
    )


def test_monotonic_masked_positions_may_be_anything():
    tensors = leaves((2, 3, 7), (2, 9, 7), (7,), (2, 9, 5))
    lengths = torch.tensor([9, 4])
    expected = functional.monotonic_attention(*tensors, lengths=lengths)
    expected_gradients = gradients(expected, tensors)
    with torch.no_grad():
        tensors[1][1, 4:] = NAN
        tensors[3][1, 4:] = NAN
    got = functional.monotonic_attention(*tensors, lengths=lengths)
    assert_same_bits(got, expected)
    assert_close_to_float64(gradients(got, tensors), to_float64(expected_gradients))
