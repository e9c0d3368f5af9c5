from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from seqattn_kernels import backends, functional, native, reference
from seqattn_kernels.nn import AdditiveAttention
from tests.cases import ATTENTIONS, DTYPES
from tests.compare import (
    TOLERANCE,
    assert_close_to_float64,
    assert_same_bits,
    error_ratio,
    gradients,
    oracle_of,
    to_float64,
)

pytestmark = pytest.mark.usefixtures("device")
needs_native = pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not built")
NAN, INF = float("nan"), float("inf")
NAMES = ("context", "weights")


def inputs(shape, dtype=torch.float32, size=1.0, requires_grad=True):
    B, T, S, A, D = shape
    tensors = [
        torch.randn(B, T, A, dtype=dtype) * size,
        torch.randn(B, S, A, dtype=dtype) * size,
        torch.randn(B, S, D, dtype=dtype),
        torch.randn(A, dtype=dtype) / math.sqrt(A),
    ]
    return [t.requires_grad_(requires_grad) for t in tensors]


def attend(query, keys, values, v, **options):
    return functional.additive_attention(query, keys, v, values, **options)


def plain(query, keys, values, v, lengths=None, mask=None):
    return reference.attention.additive_attention(query, keys, values, v, lengths, mask)


def assert_matches_oracle(tensors, dtype=None, **options):
    """Results and all gradients, through context and weights together, against the formula in float64."""
    wide = to_float64(tensors)
    expected = plain(*wide, **to_float64(options))
    got = attend(*tensors, **options)
    assert_close_to_float64(got, expected, dtype, names=NAMES)
    names = ("query", "keys", "values", "v")
    assert_close_to_float64(gradients(got, tensors), gradients(expected, wide), dtype, names=names)


def assert_as_near_as_stock(tensors):
    """Gradients where cancellation leaves no digits to a tolerance: no further from float64 than the plain formula."""
    wide, stock = to_float64(tensors), [t.detach().clone().requires_grad_() for t in tensors]
    assert_close_to_float64(attend(*tensors), plain(*wide), names=NAMES)
    runs = [gradients(f(*x), x) for f, x in ((attend, tensors), (plain, stock), (plain, wide))]
    for name, ours, theirs, oracle in zip(("query", "keys", "values", "v"), *runs, strict=True):
        error, stock_error = ((g.double() - oracle).abs().max().item() for g in (ours, theirs))
        size = oracle.abs().max().item()
        assert error <= 3 * stock_error + TOLERANCE[ours.dtype] * size + 4 * torch.finfo(ours.dtype).tiny, name


@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(shape, dtype, threads):
    assert_matches_oracle(inputs(shape, dtype))


@pytest.mark.parametrize("shape", [(3, 50, 70, 63, 130), (1, 1, 700, 256, 257), (5, 13, 257, 300, 3)], ids=str)
def test_larger_against_float64(shape, threads):
    assert_matches_oracle(inputs(shape))


@pytest.mark.parametrize("A", [1, 3, 63, 257])
@pytest.mark.parametrize("S", [1, 3, 63, 257])
def test_odd_sizes(S, A):
    assert_matches_oracle(inputs((2, 3, S, A, 63)))


@pytest.mark.parametrize("size", [1e-30, 1e-4, 0.3, 3.0, 10.0, 50.0, 1e4, 1e30])
def test_any_size_of_input(size):
    for scaled in ((0, 1), (0,), (1,)):  # queries and keys; those of different sizes meet
        tensors = inputs((4, 19, 90, 61, 20))
        with torch.no_grad():
            for i in scaled:
                tensors[i].mul_(size)
        assert_as_near_as_stock(tensors)


def test_keys_and_queries_that_cancel():
    query, keys, values, v = inputs((2, 6, 40, 24, 5))
    with torch.no_grad():
        shift = torch.linspace(-200, 200, 24)
        query.add_(shift)
        keys.sub_(shift)
    # q + k itself is rounded: compare with the formula in the same precision.
    got, expected = attend(query, keys, values, v), plain(query, keys, values, v)
    assert_close_to_float64(got, expected, names=NAMES)


@pytest.mark.parametrize("size", [1e-20, 1e8, 1e20])
def test_any_size_of_v(size):
    query, keys, values, v = inputs((2, 3, 20, 17, 4))
    with torch.no_grad():
        v.mul_(size)
        if size > 1:
            keys[:, 1:] = keys[:, :1]  # equal scores, or any rounding decides the softmax
    assert_close_to_float64(attend(query, keys, values, v), oracle_of(plain, query, keys, values, v), names=NAMES)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["query", "keys", "values", "v"])
def test_not_finite_spreads_as_in_eager(place, value):
    tensors = inputs((2, 14, 20, 9, 5), requires_grad=False)
    target = dict(zip(("query", "keys", "values", "v"), tensors, strict=True))[place]
    target.view(-1)[7] = value
    got, expected = attend(*tensors), oracle_of(plain, *tensors)
    assert_close_to_float64(got, expected, names=NAMES)


def test_not_finite_gradients_stay_in_their_row():
    tensors = inputs((1, 5, 20, 9, 5))
    with torch.no_grad():
        tensors[0][0, 2, 3] = NAN
    found = torch.autograd.grad(attend(*tensors)[0][0, :2].sum(), tensors[:2])
    assert found[0][0, :2].isfinite().all()


MASKS = {
    "none": lambda B, T, S: {},
    "lengths": lambda B, T, S: {"lengths": torch.tensor([S, 0, 5])},
    "int32 lengths": lambda B, T, S: {"lengths": torch.tensor([1, S, 17], dtype=torch.int32)},
    "[B, S]": lambda B, T, S: {"mask": torch.rand(B, S) < 0.5},
    "[B, 1, S]": lambda B, T, S: {"mask": torch.rand(B, 1, S) < 0.5},
    "[B, T, S]": lambda B, T, S: {"mask": torch.rand(B, T, S) < 0.3},
    "causal": lambda B, T, S: {"mask": torch.ones(T, S, dtype=torch.bool).tril().expand(B, T, S)},
    "added": lambda B, T, S: {"mask": torch.randn(B, S)},
    "added, -inf": lambda B, T, S: {"mask": torch.where(torch.rand(B, T, S) < 0.5, torch.randn(B, T, S), -INF)},
    "both": lambda B, T, S: {"lengths": torch.tensor([S, 0, 20]), "mask": torch.rand(B, T, S) < 0.5},
    "nothing": lambda B, T, S: {"mask": torch.zeros(B, S, dtype=torch.bool)},
}


@pytest.mark.parametrize("T", [1, 14])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, T, threads):
    tensors = inputs((3, T, 37, 20, 21))
    assert_matches_oracle(tensors, **MASKS[kind](3, T, 37))


@pytest.mark.parametrize("kind", [k for k in MASKS if k != "none"])
def test_nothing_leaks_from_masked_positions(kind):
    shape = (3, 14, 37, 20, 21)
    options = MASKS[kind](*shape[:3])
    tensors = inputs(shape)
    expected = attend(*tensors, **options)
    expected_gradients = gradients(expected, tensors)
    hidden = expected[1].detach().sum(1) == 0  # [B, S]
    assert hidden.any() or kind.startswith("added") or kind == "[B, T, S]"
    for value in (NAN, INF):
        poisoned = [t.detach().clone().requires_grad_() for t in tensors]
        with torch.no_grad():
            poisoned[1][hidden] = value
            poisoned[2][hidden] = value
        got = attend(*poisoned, **options)
        assert_close_to_float64(got, expected, names=NAMES)
        assert_close_to_float64(gradients(got, poisoned), expected_gradients)


@needs_native
def test_a_value_only_neighbours_attend_to_does_not_leak():
    query, keys, values, v = inputs((1, 3, 20, 8, 4), requires_grad=False)
    mask = torch.ones(1, 3, 20, dtype=torch.bool)
    mask[0, 1, 7] = False
    values[0, 7] = NAN
    context, _ = attend(query, keys, values, v, mask=mask)
    assert context[0, 1].isfinite().all()
    assert context[0, [0, 2]].isnan().all()


@pytest.mark.cpu
@needs_native
def test_a_key_only_neighbours_attend_to_does_not_leak():
    """Into the context of a query that may not attend to it, or the gradient by that query."""
    query, keys, values, v = inputs((1, 3, 20, 8, 4))
    mask = torch.ones(1, 3, 20, dtype=torch.bool)
    mask[0, 1, 7] = False
    alone = attend(query[:, 1:2], keys, values, v, mask=mask[:, 1:2])[0]
    expected = torch.autograd.grad(alone.square().sum(), query)[0]
    for value in (NAN, INF):
        with torch.no_grad():
            keys[0, 7] = value
            values[0, 7] = value
        context, weights = attend(query, keys, values, v, mask=mask)
        assert_close_to_float64(context[:, 1:2], to_float64(alone))
        assert weights[0, 1].isfinite().all()
        found = torch.autograd.grad(context[0, 1].square().sum(), query)[0]
        assert_close_to_float64(found[0, 1], expected[0, 1].double())


def test_fully_masked_rows_are_zero():
    tensors = inputs((2, 3, 9, 8, 4))
    mask = torch.ones(2, 3, 9, dtype=torch.bool)
    mask[1, 2] = False
    context, weights = attend(*tensors, mask=mask)
    assert (context[1, 2] == 0).all()
    assert (weights[1, 2] == 0).all()
    assert_close_to_float64(weights.sum(-1)[0], torch.ones(3))


@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 2), (2, 0, 5, 4, 2), (2, 3, 0, 4, 2), (2, 3, 5, 0, 2)], ids=str)
def test_empty_sizes(shape):
    tensors = inputs((shape[0], shape[1], shape[2], max(shape[3], 1), shape[4]))
    if shape[3] == 0:
        tensors = [t[..., :0].detach().requires_grad_() if i != 2 else t for i, t in enumerate(tensors)]
    assert_matches_oracle(tensors)


def test_layouts():
    query, keys, values, v = inputs((3, 7, 20, 16, 16), requires_grad=False)
    expected = attend(query, keys, values, v)
    strided = [
        query.transpose(0, 1).contiguous().transpose(0, 1),
        keys.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([values, values], -1)[..., 0],
        torch.stack([v, v], -1)[..., 0],
    ]
    assert not any(t.is_contiguous() for t in strided)
    assert_same_bits(attend(*strided), expected)
    shared = keys[:1].expand(3, -1, -1)
    assert_same_bits(attend(query, shared, values, v), attend(query, shared.contiguous(), values, v))
    mask = torch.rand(3, 20, 7) < 0.5
    assert_same_bits(
        attend(query, keys, values, v, mask=mask.transpose(1, 2)),
        attend(query, keys, values, v, mask=mask.transpose(1, 2).contiguous()),
    )


def test_one_query_without_a_time_dimension():
    query, keys, values, v = inputs((3, 1, 20, 16, 8))
    lengths = torch.tensor([20, 0, 7])
    got = attend(query.squeeze(1), keys, values, v, lengths=lengths)
    expected = attend(query, keys, values, v, lengths=lengths)
    assert_same_bits(got, [t.squeeze(1) for t in expected])
    assert_same_bits(gradients(got, [query, keys]), gradients([t.squeeze(1) for t in expected], [query, keys]))


def test_values_default_to_keys_and_bias_is_added():
    query, keys, _, v = inputs((2, 3, 9, 8, 8))
    bias = torch.randn(8, requires_grad=True)
    got = functional.additive_attention(query, keys, v, bias=bias)
    wide = to_float64([query, keys, v, bias])
    expected = plain(wide[0] + wide[3], wide[1], wide[1], wide[2])
    assert_close_to_float64(got, expected)
    assert_close_to_float64(gradients(got, [query, keys, v, bias]), gradients(expected, wide))


@pytest.mark.parametrize("result", [0, 1])
def test_gradients_through_one_result(result):
    tensors = inputs((2, 5, 19, 12, 7))
    wide = to_float64(tensors)
    used = tensors if result == 0 else [t for i, t in enumerate(tensors) if i != 2]
    used_wide = wide if result == 0 else [t for i, t in enumerate(wide) if i != 2]
    got, expected = attend(*tensors)[result], plain(*wide)[result]
    assert_close_to_float64(gradients(got, used), gradients(expected, used_wide))


def test_without_weights():
    query, keys, values, v = inputs((2, 5, 19, 12, 7))
    context, weights = attend(query, keys, values, v, need_weights=False)
    assert weights is None
    assert_same_bits(context, attend(query, keys, values, v)[0])
    with torch.no_grad():
        assert_same_bits(attend(query, keys, values, v, need_weights=False)[0], context)


def test_gradcheck_twice():
    tensors = inputs((2, 3, 5, 4, 3), torch.float64)
    mask = torch.rand(2, 3, 5) < 0.7
    assert torch.autograd.gradcheck(lambda *t: attend(*t, mask=mask), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: attend(*t, mask=mask), tensors)
    shared = [t.detach().clone().requires_grad_() for t in tensors[:2]]
    assert torch.autograd.gradgradcheck(lambda q, k: attend(q, k, k, tensors[3].detach()), shared)


def test_torch_func():
    tensors = [t.detach() for t in inputs((2, 3, 5, 4, 3), torch.float64)]
    ours = torch.func.grad(lambda q: attend(q, *tensors[1:])[0].square().sum())(tensors[0])
    stock = torch.func.grad(lambda q: plain(q, *tensors[1:])[0].square().sum())(tensors[0])
    assert_close_to_float64(ours, stock)


def test_runs_agree_bit_for_bit_on_any_number_of_threads():
    tensors = inputs((3, 30, 70, 64, 96))
    runs = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        found = attend(*tensors)
        runs.append([*found, *gradients(found, [tensors[0], tensors[1], tensors[3]])])
    assert_same_bits(runs[1], runs[2])
    assert_same_bits(runs[0], runs[1])


def test_changing_an_input_before_backward_raises():
    tensors = inputs((2, 3, 5, 4, 3))
    context, _ = attend(*tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()


def ratios(size, v_size=1.0):
    """Errors of ours over those of stock, of results and gradients, over some seeds."""
    ours, stock, oracle = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        tensors = inputs((2, 16, 90, 128, 64), size=size)
        with torch.no_grad():
            tensors[3].mul_(v_size)
        for runs, function, arguments in (
            (ours, attend, tensors),
            (stock, plain, [t.detach().clone().requires_grad_() for t in tensors]),
            (oracle, plain, to_float64(tensors)),
        ):
            found = function(*arguments)
            runs.append([*found, *gradients(found, arguments)])
    pooled = [
        [torch.cat([run[i].detach().flatten() for run in runs]) for i in range(6)] for runs in (ours, stock, oracle)
    ]
    return [error_ratio(*each) for each in zip(*pooled, strict=True)]


@needs_native
@pytest.mark.parametrize("size", [1e-4, 0.3, 1.0, 3.0, 10.0, 30.0])
def test_errors_are_of_the_size_of_stock(size):
    torch.set_num_threads(2)
    names = ("context", "weights", "d_query", "d_keys", "d_values", "d_v")
    over = {n: (r.largest, r.mean) for n, r in zip(names, ratios(size), strict=True) if not r.within_bars}
    assert not over


# Prepared keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_keys_change_nothing(dtype):
    query, keys, values, v = inputs((3, 4, 37, 20, 8), dtype)
    lengths = torch.tensor([37, 0, 9])
    expected = attend(query, keys, values, v, lengths=lengths)
    prepared = functional.prepare_keys(keys)
    got = attend(query, prepared, values, v, lengths=lengths)
    assert_same_bits(got, expected)
    assert_same_bits(gradients(got, [query, keys, values]), gradients(expected, [query, keys, values]))
    for step in range(4):
        now = attend(query[:, step], prepared, values, v, lengths=lengths)
        assert_close_to_float64(now, [t[:, step] for t in expected], names=NAMES)


def test_prepared_keys_are_a_snapshot():
    query, keys, values, v = inputs((2, 3, 9, 8, 4), requires_grad=False)
    expected = attend(query, keys, values, v)
    prepared = functional.prepare_keys(keys)
    reference_prepared = functional.prepare_keys(keys, backend="reference")
    keys.zero_()
    with torch.no_grad():
        assert_same_bits(attend(query, prepared, values, v), expected)
        assert_close_to_float64(attend(query, reference_prepared, values, v, backend="reference"), expected)


def test_prepared_keys_that_changed_have_no_gradient():
    query, keys, values, v = inputs((2, 3, 9, 8, 4))
    prepared = functional.prepare_keys(keys)
    with torch.no_grad():
        keys.add_(1)
    with pytest.raises(RuntimeError, match="keys: changed in place since prepare_keys"):
        attend(query, prepared, values, v)


def test_prepared_keys_in_inference_mode():
    with torch.inference_mode():
        query, keys, values, v = inputs((2, 3, 9, 8, 4), requires_grad=False)
        assert_same_bits(attend(query, functional.prepare_keys(keys), values, v), attend(query, keys, values, v))


def test_prepared_blocks_of_every_form():
    query, keys, values, v = inputs((1, 3, 80, 12, 4), requires_grad=False)
    keys[0, :16] *= 0.01
    keys[0, 16:32] *= 100
    keys[0, 32:48] *= 10
    expected = oracle_of(plain, query, keys, values, v)
    assert_close_to_float64(attend(query, functional.prepare_keys(keys), values, v), expected, names=NAMES)
    small = query * 0.01
    expected = oracle_of(plain, small, keys, values, v)
    assert_close_to_float64(attend(small, functional.prepare_keys(keys), values, v), expected, names=NAMES)


# Operators in torch's machinery


@pytest.mark.cpu
@needs_native
@pytest.mark.parametrize("masked", ["none", "lengths", "[B, T, S]"])
def test_opcheck(masked):
    torch.use_deterministic_algorithms(False)
    query, keys, values, v = inputs((3, 4, 17, 6, 5), requires_grad=False)
    options = MASKS[masked](3, 4, 17)
    masks = options.get("lengths"), options.get("mask")
    seqattn = torch.ops.seqattn
    torch.library.opcheck(seqattn.additive_pack.default, (keys,))
    packed = seqattn.additive_pack(keys)
    for need_weights in (True, False):
        torch.library.opcheck(seqattn.additive_fwd.default, (query, keys, packed, values, v, *masks, need_weights))
    torch.library.opcheck(seqattn.additive_fwd.default, (query[:, 0], keys, None, values, v, masks[0], None, True))
    context, weights = seqattn.additive_fwd(query, keys, None, values, v, *masks, True)
    for gradient in ((context, weights), (context, None), (None, weights)):
        torch.library.opcheck(seqattn.additive_bwd.default, (query, keys, values, v, weights, *gradient, *masks, True))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = AdditiveAttention(6, 5, 7)

    def forward(self, query, keys, lengths):
        prepared = self.attention.prepare_keys(keys)
        first, _ = self.attention(query[:, 0], prepared, keys, lengths=lengths)
        all_of_them, weights = self.attention(query, keys, lengths=lengths)
        return first, all_of_them, weights


def test_compile():
    torch.use_deterministic_algorithms(False)
    module = Decoder()
    query, keys, lengths = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 9, 5), torch.tensor([9, 0, 4])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = module(query, keys, lengths)
    got = compiled(query, keys, lengths)
    assert_close_to_float64(got, expected)
    leaves = [query, *module.parameters()]
    assert_close_to_float64(gradients(got, leaves), gradients(expected, leaves))


def test_export():
    torch.use_deterministic_algorithms(False)
    module = Decoder().eval()
    arguments = torch.randn(3, 4, 6), torch.randn(3, 9, 5), torch.tensor([9, 0, 4])
    with torch.no_grad():
        program = torch.export.export(module, arguments)
        assert_close_to_float64(program.module()(*arguments), module(*arguments))


@pytest.mark.cpu
@needs_native
def test_backends():
    tensors = inputs((2, 3, 5, 4, 3))
    assert_close_to_float64(attend(*tensors, backend="reference"), attend(*tensors, backend="cpu"))
    mask = torch.randn(2, 5, requires_grad=True)
    attend(*tensors, mask=mask, backend="cpu")[1].square().sum().backward()
    assert mask.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"backend: expected one of \['cpu', 'triton', 'reference'\]"):
        attend(*tensors, backend="gpu")
    assert [b.name for b in backends.ATTENTION] == ["cpu", "triton", "reference"]


def test_works_without_native_kernels(monkeypatch):
    tensors = inputs((2, 3, 5, 4, 3))
    expected = attend(*tensors)
    monkeypatch.setattr(native, "why_not", lambda: "not built")
    assert_close_to_float64(attend(*tensors), expected)
    assert_close_to_float64(attend(tensors[0], functional.prepare_keys(tensors[1]), *tensors[2:]), expected)


# Bad input

q, k, w, v = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6), torch.zeros(4)
BAD = {
    "rank of query": ((q[0, 0], k, v, w), {}, ValueError, r"query: expected \[B, A\] or \[B, T, A\], got \[4\]"),
    "batch of keys": (
        (q, k[:1], v, w),
        {},
        ValueError,
        r"keys: expected \[B, S, A\] with B=2, A=4 \(from query\), got \[1, 5, 4\]",
    ),
    "width of keys": ((q, k[..., :3], v, w), {}, ValueError, r"keys: expected .* got \[2, 5, 3\]"),
    "rank of keys": ((q, k[0], v, w), {}, ValueError, r"keys: expected \[B, S, A\], got \[5, 4\]"),
    "values": (
        (q, k, v, w[:, :4]),
        {},
        ValueError,
        r"values: expected \[B, S, D\] with B=2, S=5 \(from keys\), got \[2, 4, 6\]",
    ),
    "v": ((q, k, v[:3], w), {}, ValueError, r"v: expected \[A\] with A=4 \(from query\), got \[3\]"),
    "rank of v": ((q, k, v[None], w), {}, ValueError, r"v: expected \[A\], got \[1, 4\]"),
    "bias": ((q, k, v, w), {"bias": v[:2]}, ValueError, r"bias: expected \[A\] with A=4"),
    "dtype of keys": (
        (q, k.double(), v, w),
        {},
        TypeError,
        "keys: expected torch.float32 .from query., got torch.float64",
    ),
    "integer query": ((q.long(), k, v, w), {}, TypeError, "query: expected a floating dtype, got torch.int64"),
    "device": ((q, k.to("meta"), v, w), {}, ValueError, "keys: expected device cpu .from query., got meta"),
    "lengths past the end": (
        (q, k, v, w),
        {"lengths": torch.tensor([5, 6])},
        ValueError,
        r"lengths: expected values in \[0, 5\] .* got 6 at \[1\]",
    ),
    "negative lengths": ((q, k, v, w), {"lengths": torch.tensor([-1, 5])}, ValueError, r"lengths: .* got -1 at \[0\]"),
    "float lengths": (
        (q, k, v, w),
        {"lengths": torch.tensor([NAN, 5.0])},
        ValueError,
        r"lengths: expected fractions in \[0, 1\], lengths over S of keys, got nan at \[0\]",
    ),
    "complex lengths": (
        (q, k, v, w),
        {"lengths": torch.zeros(2, dtype=torch.complex64)},
        TypeError,
        "lengths: expected an integer dtype, or fractions of S, got torch.complex64",
    ),
    "polarity": (
        (q, k, v, w),
        {"mask": torch.ones(2, 5, dtype=torch.bool), "mask_polarity": "ignore me"},
        ValueError,
        "mask_polarity: expected 'attend' or 'ignore'",
    ),
    "causal step": ((q[:, 0], k, v, w), {"causal": True}, ValueError, r"causal: expected a query \[B, T, A\]"),
    "weighting": ((q, k, v, w), {"weighting": "softmin"}, ValueError, r"normalizer: expected one of .* got 'softmin'"),
    "type of weighting": ((q, k, v, w), {"weighting": 3}, TypeError, "weighting: expected a Weighting or the name"),
    "score_bias": ((q, k, v, w), {"score_bias": v}, ValueError, r"score_bias: expected a number or a tensor \[\]"),
    "list of lengths": ((q, k, v, w), {"lengths": [5, 5]}, TypeError, "lengths: expected a tensor, got list"),
    "shape of lengths": ((q, k, v, w), {"lengths": torch.tensor([5])}, ValueError, r"lengths: expected \[B\] with B=2"),
    "shape of mask": (
        (q, k, v, w),
        {"mask": torch.ones(2, 4, dtype=torch.bool)},
        ValueError,
        r"mask: expected \[B, S\].* got \[2, 4\]",
    ),
    "integer mask": (
        (q, k, v, w),
        {"mask": torch.ones(2, 5, dtype=torch.int64)},
        TypeError,
        "mask: expected torch.bool",
    ),
}


@pytest.mark.cpu
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        functional.additive_attention(*arguments, backend=backend, **options)


@pytest.mark.cpu
@needs_native
def test_operators_check_their_arguments():
    seqattn = torch.ops.seqattn
    with pytest.raises(RuntimeError, match=r"keys: expected shape \[2, \*, 4\]"):
        seqattn.additive_fwd(q, k[..., :2], None, w, v, None, None, True)
    with pytest.raises(RuntimeError, match=r"packed: expected shape"):
        seqattn.additive_fwd(q, k, torch.zeros(2, 1, 4, 16), w, v, None, None, True)
    with pytest.raises(RuntimeError, match=r"expected a gradient of the context, of the weights, or both"):
        seqattn.additive_bwd(q, k, w, v, torch.zeros(2, 3, 5), None, None, None, None, True)
