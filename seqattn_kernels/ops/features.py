"""The operator of attention over time for each feature: fake kernels, autograd, and what Python calls."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import reference
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function


def _register_fakes() -> None:
    @torch.library.register_fake("seqattn::feature_fwd")
    def _(inner, input, lengths, mask, reduce):
        batch, _, width = input.shape
        return input.new_empty((batch, width) if reduce else input.shape), input.new_empty(input.shape)

    @torch.library.register_fake("seqattn::feature_bwd")
    def _(inner, input, weights, d_result, d_weights, lengths, mask, reduce):
        return input.new_empty(input.shape), input.new_empty(input.shape)


if attention_cuda.declared():
    _register_fakes()


class FeatureFunction(torch.autograd.Function):
    """Saves its inputs and the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inner, input, lengths, mask, reduce):
        return torch.ops.seqattn.feature_fwd.default(inner, input, lengths, mask, reduce)

    @staticmethod
    def setup_context(ctx, inputs, output):
        inner, input, lengths, mask, ctx.reduce = inputs
        ctx.save_for_backward(inner, input, lengths, mask, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_result, d_weights):
        inner, input, lengths, mask, weights = ctx.saved_tensors
        if d_result is None and d_weights is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            attend = reference.attention.attended(input, lengths, mask)
            attend = None if attend is None else attend.transpose(1, 2)
            given = [inner.view_as(inner), input.view_as(input)]
            outputs = reference.attention.feature_weighted(given[0], given[1], attend, ctx.reduce)
            pairs = [(out, g) for out, g in zip(outputs, (d_result, d_weights), strict=True) if g is not None]
            d_inner, d_input = torch.autograd.grad(
                [out for out, _ in pairs], given, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        else:
            d_inner, d_input = torch.ops.seqattn.feature_bwd.default(
                inner, input, weights, d_result, d_weights, lengths, mask, ctx.reduce
            )
        needs = ctx.needs_input_grad
        return d_inner if needs[0] else None, d_input if needs[1] else None, None, None, None


def weighted(
    inner: Tensor, input: Tensor, lengths: Tensor | None, mask: Tensor | None, reduce: bool
) -> tuple[Tensor, Tensor]:
    """weights = softmax over s of tanh(inner [B, S, D]); weights * input, summed over s with `reduce`; and the weights.

    Both of one dtype, on the CPU float32 or float64; mask boolean [B, S].
    """
    if torch.is_grad_enabled() and (inner.requires_grad or input.requires_grad):
        return apply_function(FeatureFunction, inner, input, lengths, mask, reduce)
    return torch.ops.seqattn.feature_fwd.default(inner, input, lengths, mask, reduce)
