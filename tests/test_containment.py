"""What a mask hides from a query, NaN included, reaches neither its results nor the gradients through it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqattn_kernels import functional, native
from seqattn_kernels.functional import Weighting
from tests.compare import assert_close_to_float64, to_float64

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.skipif(native.why_not() is not None, reason="per query only the kernels contain; they are not built"),
]
B, K, D, A = 2, 6, 4, 5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NOT_FINITE = (math.nan, math.inf, -math.inf)


MASKS_ALONE = ("lengths", "[B, S]", "ignore", "added to all")


@dataclass(frozen=True)
class Kind:
    """``attend(query, keys, values, parameters, **masks)`` -> context [B, T, D], weights [B, T, S]."""

    attend: Callable[..., tuple[Tensor, Any]]
    parameters: tuple[tuple[int, ...], ...] = ()
    beside: str = ""  # dimensions of a tensor that goes with the keys, first among the parameters
    heads: int = 1  # of the weights, [B, T, heads, S]
    forms: tuple[str, ...] = ()  # the masks it takes; all where empty
    steps: tuple[int, ...] = ()  # the numbers of queries it takes; all where empty
    softmax_alone: bool = False


def dot(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    return functional.dot_attention(q, k, values, **options)


def scaled_dot(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    return functional.dot_attention(q, k, values, scale=True, **options)


def general(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    return functional.general_attention(q, k, p[0], values, **options)


def cosine(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    return functional.cosine_attention(q, k, values, scale=3.0, **options)


def additive(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    return functional.additive_attention(q, k, p[0], values, **options)


def multi_head(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    context, weights = functional.multi_head_additive_attention(q, k, p[0], values, **options)
    return context, None if weights is None else weights.transpose(1, 2)


def concat(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    return functional.concat_attention(q, k, p[0], p[1], values, **options)


def local(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    position = torch.full(q.shape[:2], k.shape[1] / 2, dtype=q.dtype)
    return functional.local_attention(q, k, position, 2.0 * k.shape[1], values, **options)


def location(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    history, conv_weight, feature_weight, v = p
    return functional.location_attention(q, k, v, history.unsqueeze(2), conv_weight, feature_weight, values, **options)


def coverage(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    found = functional.coverage_attention(q[:, 0], k, p[2], p[0], p[1], values, **options)
    return tuple(None if t is None else t.unsqueeze(1) for t in found)


def pooling(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    weight, v = p
    return functional.pooling_attention(k, weight, v[: q.shape[1]] + 0 * q.sum(), values, **options)


def monotonic(q: Tensor, k: Tensor, values: Tensor, p: list[Tensor], **options: Any) -> Any:
    return functional.monotonic_attention(q, k, p[0], values, **options)


PER_QUERY = ("lengths", "[B, S]", "ignore", "added to all", "[B, T, S]", "added")
KINDS = {
    "dot": Kind(dot),
    "scaled dot": Kind(scaled_dot),
    "general": Kind(general, ((K, K),)),
    "cosine": Kind(cosine),
    "additive": Kind(additive, ((K,),)),
    "multi-head": Kind(multi_head, ((2, K // 2),), heads=2),
    "concat": Kind(concat, ((A, 2 * K), (A,))),
    "local": Kind(local, forms=PER_QUERY),
    "location": Kind(location, ((3, 1, 3), (K, 3), (K,)), beside="BTS", forms=PER_QUERY),
    "coverage": Kind(coverage, ((K,), (K,)), beside="BS", forms=PER_QUERY, steps=(1,)),
    "pooling": Kind(pooling, ((A, K), (14, A)), forms=MASKS_ALONE),
    "monotonic": Kind(monotonic, ((K,),), forms=("lengths", "[B, S]", "ignore"), steps=(1,), softmax_alone=True),
}
WEIGHTINGS = {
    "softmax": None,
    "sharp": Weighting(temperature=0.5, scale=2.0),
    "sparsemax": Weighting("sparsemax"),
    "entmax15": Weighting("entmax15"),
    "sigmoid": Weighting("sigmoid"),
    "filled": Weighting(fill=-3.0),
}


def _added(keep: Tensor) -> dict[str, Any]:
    return {"mask": torch.zeros(keep.shape).masked_fill(~keep, -math.inf)}


# How a set of keys [B, T, S] that queries see is told; for `causal` the queries see no more than that besides.
FORMS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "lengths": lambda keep: {"lengths": keep[:, 0].sum(-1)},
    "[B, S]": lambda keep: {"mask": keep[:, 0]},
    "ignore": lambda keep: {"mask": ~keep[:, :1], "mask_polarity": "ignore"},
    "[B, T, S]": lambda keep: {"mask": keep},
    "added": _added,
    "added to all": lambda keep: _added(keep[:, 0]),
    "causal": lambda keep: {"causal": True},
    "both": lambda keep: {"mask": keep, "causal": True},
}


def seen(form: str, keep: Tensor) -> Tensor:
    """Which keys each query sees, [B, T, S]."""
    T, S = keep.shape[1:]
    earlier = torch.ones(T, S, dtype=torch.bool).tril()
    if form == "lengths":
        return (torch.arange(S) < keep[:, 0].sum(-1)[:, None, None]).expand(B, T, S)
    if form in ("[B, S]", "ignore", "added to all"):
        return keep[:, :1].expand(B, T, S)
    if form == "causal":
        return earlier.expand(B, T, S)
    return keep & earlier if form == "both" else keep


NAMES = ("query", "keys", "values")


def run(kind: Kind, tensors: list[Tensor], directions: list[Tensor], **options: Any) -> tuple[list[Any], list[Tensor]]:
    """Context and weights, and the gradients of all tensors."""
    query, keys, values, *parameters = leaves = [t.clone().requires_grad_() for t in tensors]
    results = list(kind.attend(query, keys, values, parameters, **options))
    pairs = [(r, d) for r, d in zip(results, directions, strict=True) if r is not None]
    found = torch.autograd.grad([r for r, _ in pairs], leaves, [d for _, d in pairs])
    return [None if r is None else r.detach() for r in results], list(found)


def assert_same(got: Tensor, expected: Tensor, where: Tensor, name: str) -> None:
    assert_close_to_float64(got[where], to_float64(expected[where]), names=[name])


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_a_query_does_not_see_stays_out_of_it(name: str, data: st.DataObject) -> None:
    """Against the same call with numbers in place of what isn't finite in keys, values and the context's gradient.

    What saw one of these may be anything: the results of a query, and the gradients of the keys and values that such a
    query sees, which are sums over queries. The rest is as it was; the gradients of parameters, where nobody saw any.
    """
    kind = KINDS[name]
    sizes = [(1, 4), (3, 5), (5, 3), (7, 17), (14, 33)]
    T, S = data.draw(st.sampled_from([s for s in sizes if not kind.steps or s[0] in kind.steps]), "T, S")
    form = data.draw(st.sampled_from(kind.forms or tuple(FORMS)), "form")
    weighting = WEIGHTINGS[
        data.draw(st.sampled_from(["softmax"] if kind.softmax_alone else list(WEIGHTINGS)), "weights")
    ]
    need_weights = data.draw(st.booleans(), "need_weights")
    value = data.draw(st.sampled_from(NOT_FINITE), "value")
    shares = data.draw(
        st.sampled_from([(0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.3), (0.2, 0.2, 0.2)]), "of keys, values, rows"
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    unseen_alone = data.draw(st.booleans(), "only where nobody looks")
    torch.manual_seed(data.draw(st.integers(0, 1 << 16), "seed"))
    keep = torch.rand(B, T, S) < data.draw(st.sampled_from([0.3, 0.7]), "attended")

    by_name = {"B": B, "T": T, "S": S}
    shapes = [tuple(by_name[d] for d in kind.beside)] if kind.beside else []
    tensors = [torch.randn(s) for s in ((B, T, K), (B, S, K), (B, S, D), *shapes, *kind.parameters)]
    directions = [torch.randn(B, T, D), torch.randn(B, T, *([kind.heads] if kind.heads > 1 else []), S)]
    tensors, directions = [t.to(dtype) for t in tensors], [t.to(dtype) for t in directions]
    options = FORMS[form](keep) | {"need_weights": need_weights}
    if weighting is not None:
        options["weighting"] = weighting
    expected, expected_gradients = run(kind, tensors, directions, **options)

    sees = seen(form, keep)
    nobody = ~sees.any(1)
    bad_keys, bad_values = torch.rand(B, S) < shares[0], torch.rand(B, S) < shares[1]
    bad_rows = torch.rand(B, T) < shares[2]
    if unseen_alone:
        bad_keys, bad_values, bad_rows = bad_keys & nobody, bad_values & nobody, torch.zeros_like(bad_rows)
    tensors[1][bad_keys], tensors[2][bad_values] = value, value
    if kind.beside == "BS":
        tensors[3][bad_keys & nobody] = value
    directions[0][bad_rows] = value
    found, gradients = run(kind, tensors, directions, **options)

    # Hidden keys that are filled with a number have weight, and so their values count.
    reads = sees if weighting is None or weighting.fill == -math.inf else torch.ones_like(sees)
    strange = (sees & bad_keys.unsqueeze(1)).any(-1)  # [B, T], whose weights may be anything
    spoiled = strange | (reads & bad_values.unsqueeze(1)).any(-1)
    assert_same(found[0], expected[0], ~spoiled, "context")
    if need_weights:
        assert_same(found[1], expected[1], ~strange, "weights")
        if reads is sees:
            assert (found[1].movedim(-1, 2)[~sees] == 0).all(), "weights of hidden keys"
    spoiled = spoiled | bad_rows
    if name == "pooling":  # its query has no part in it
        spoiled = spoiled.any().expand(B, T)
    reached = (reads & spoiled.unsqueeze(-1)).any(1)
    for i, (named, where) in enumerate(zip(NAMES, (~spoiled, ~reached, ~reached), strict=True)):
        assert_same(gradients[i], expected_gradients[i], where, f"gradient of {named}")
    if not spoiled.any():
        assert_close_to_float64(gradients[3:], to_float64(expected_gradients[3:]))
