"""The attention operators: fake kernels, autograd, and what Python calls.

The Function here exists only to be differentiated; where nothing needs a gradient the plain operator is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import reference
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function, differentiate_again, needs_gradients
from seqattn_kernels.ops.fakes import register_fake

_KEY_BLOCK = 16
_COLUMN_GROUP = 4


def _register_fakes() -> None:
    @register_fake("seqattn::additive_fwd")
    def _(query, keys, packed, values, v, lengths, mask, need_weights):
        context = query.new_empty(*query.shape[:-1], values.shape[2])
        return context, query.new_empty(*query.shape[:-1], keys.shape[1]) if need_weights else query.new_empty(0)

    @register_fake("seqattn::additive_bwd")
    def _(query, keys, values, v, weights, d_context, d_weights, lengths, mask, need_values):
        empty = query.new_empty
        return (
            empty(query.shape),
            empty(keys.shape),
            empty(values.shape) if need_values else empty(0),
            empty(v.shape),
        )

    @register_fake("seqattn::additive_pack")
    def _(keys):
        batch, source, width = keys.shape
        rows = (width + _COLUMN_GROUP - 1) // _COLUMN_GROUP * _COLUMN_GROUP + 1
        return keys.new_empty(batch, (source + _KEY_BLOCK - 1) // _KEY_BLOCK, rows, _KEY_BLOCK)


if attention_cuda.declared():
    _register_fakes()


class AdditiveFunction(torch.autograd.Function):
    """Additive attention with gradients. Saves its inputs and the weights; backward computes the scores' part again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query, keys, packed, values, v, lengths, mask):
        return torch.ops.seqattn.additive_fwd.default(query, keys, packed, values, v, lengths, mask, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, keys, _, values, v, lengths, mask = inputs
        ctx.save_for_backward(query, keys, values, v, lengths, mask, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_context, d_weights):
        query, keys, values, v, lengths, mask, weights = ctx.saved_tensors
        if d_context is None and d_weights is None:
            return (None,) * 7
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _reference_gradients(query, keys, values, v, lengths, mask, (d_context, d_weights), needs)
        d_query, d_keys, d_values, d_v = torch.ops.seqattn.additive_bwd.default(
            query, keys, values, v, weights, d_context, d_weights, lengths, mask, needs[3]
        )
        return (
            d_query if needs[0] else None,
            d_keys if needs[1] else None,
            None,
            d_values if needs[3] else None,
            d_v if needs[4] else None,
            None,
            None,
        )


def _reference_gradients(query, keys, values, v, lengths, mask, gradients, needs):
    """Gradients that can be differentiated again, through the reference."""
    single = query.dim() == 2

    def compute(query, keys, values, v):
        found = reference.attention.additive_attention(
            query.unsqueeze(1) if single else query, keys, values, v, lengths, mask
        )
        return tuple(t.squeeze(1) for t in found) if single else found

    wanted = [needs[place] for place in (0, 1, 3, 4)]
    d_query, d_keys, d_values, d_v = differentiate_again(compute, [query, keys, values, v], wanted, gradients)
    return d_query, d_keys, None, d_values, d_v, None, None


def additive(
    query: Tensor,
    keys: Tensor,
    packed: Tensor | None,
    values: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor]:
    """The native operator: query [B, A] or [B, T, A], all tensors float32 or all float64, on the CPU.

    v is [A], or [H, A] with H dividing B: batch element b has row b % H, as heads folded into the batch need it.
    packed: what `pack_keys` made of these very keys, or None. Without `need_weights` the second result is empty where
    no gradient is needed.
    """
    if needs_gradients(query, keys, values, v):
        return apply_function(AdditiveFunction, query, keys, packed, values, v, lengths, mask)
    return torch.ops.seqattn.additive_fwd.default(query, keys, packed, values, v, lengths, mask, need_weights)


def pack_keys(keys: Tensor) -> Tensor:
    """Keys [B, S, A] as the forward kernel on the CPU reads them; on a GPU they are read as they are."""
    return torch.ops.seqattn.additive_pack.default(keys.detach())
