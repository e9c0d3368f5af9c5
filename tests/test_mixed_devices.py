"""A call whose tensors are not all on one device is refused; "meta" stands for the other device, as it is everywhere.

Without a check torch calls an operator's fake kernel, whose result is memory nobody wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels import functional, native, ops
from tests import test_containment as attention
from tests.cases import KINDS

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="the native kernels are not built")


def assert_refused(call: Callable[..., Any], tensors: list[Tensor]) -> None:
    """With any one of the tensors on another device, with and without gradients."""
    call(*tensors)
    for moved in range(len(tensors)):
        for requires_grad in (False, True):
            given = [
                t.detach().to("meta" if i == moved else "cpu").requires_grad_(requires_grad and t.is_floating_point())
                for i, t in enumerate(tensors)
            ]
            with pytest.raises((ValueError, RuntimeError), match=r"device|meta"):
                call(*given)


@pytest.mark.parametrize("masked", ["", "lengths", "mask"])
@pytest.mark.parametrize("name", attention.KINDS)
def test_attention(name: str, masked: str) -> None:
    kind = attention.KINDS[name]
    B, T, S = attention.B, (kind.steps or (3,))[0], 5
    beside = [torch.randn([{"B": B, "T": T, "S": S}[d] for d in kind.beside])] if kind.beside else []
    shapes = (B, T, attention.K), (B, S, attention.K), (B, S, attention.D)
    tensors = [*map(torch.randn, shapes), *beside, *map(torch.randn, kind.parameters)]
    masks = {"lengths": torch.tensor([S, 3]), "mask": torch.ones(B, S, dtype=torch.bool)}

    def call(query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> Any:
        if not masked:
            return kind.attend(query, keys, values, list(rest))
        *parameters, mask = rest
        return kind.attend(query, keys, values, parameters, **{masked: mask})

    assert_refused(call, [*tensors, *([masks[masked]] if masked else [])])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_recurrence(kind: Any) -> None:
    weights = [w.detach() for w in kind.stock(4, 6)._flat_weights]
    states = [torch.zeros(1, 2, 6)] * (2 if kind.has_cell_state else 1)

    def call(input: Tensor, lengths: Tensor, *rest: Tensor) -> Any:
        state = rest[: len(states)]
        given = tuple(state) if kind.has_cell_state else state[0]
        return kind.run(input, given, list(rest[len(states) :]), lengths=lengths)

    assert_refused(call, [torch.randn(3, 2, 4), torch.tensor([3, 2]), *states, *weights])


def test_normalizers_and_features() -> None:
    scores = torch.randn(2, 5)
    with pytest.raises(ValueError, match="lengths: expected values, as on cpu"):  # they may be on any other device
        functional.masked_softmax(scores, lengths=torch.tensor([5, 3], device="meta"))
    assert_refused(lambda scores, mask: functional.sparsemax(scores, mask=mask), [scores, scores > 0])
    tensors = [torch.randn(2, 5, 4), torch.randn(4, 4), torch.randn(4)]
    assert_refused(functional.feature_attention, tensors)


def test_the_message_names_arguments() -> None:
    query, keys, v = torch.randn(2, 3, 6), torch.randn(2, 5, 6), torch.randn(6)
    with pytest.raises(ValueError, match=r"v: expected device cpu \(from query\), got meta"):
        ops.attention.additive(query, keys, None, keys, v.to("meta"))
    result = ops.attention.additive(*(t.to("meta") for t in (query, keys)), None, keys.to("meta"), v.to("meta"))
    assert all(t.is_meta for t in result)
