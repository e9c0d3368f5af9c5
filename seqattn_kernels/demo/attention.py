"""The demo's attention module on the package's fused operator: what a user writes to replace a class of their own."""

from __future__ import annotations

from torch import Tensor

from seqattn_kernels.accelerate import register_replacement
from seqattn_kernels.demo.model import BahdanauAttention
from seqattn_kernels.functional import PreparedKeys, additive_attention, prepare_keys


class FusedBahdanauAttention(BahdanauAttention):
    """Same parameters, same results; keys are made ready once a word, and no sum of query and keys is ever stored."""

    def project(self, values: Tensor) -> PreparedKeys:  # type: ignore[override]
        return prepare_keys(self.U(values))

    def forward(  # type: ignore[override]
        self, query: Tensor, keys: PreparedKeys, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        context, weights = additive_attention(self.W(query), keys, self.v.weight[0], values, mask=mask)
        assert weights is not None
        return context, weights


def register() -> None:
    register_replacement(BahdanauAttention, FusedBahdanauAttention)
