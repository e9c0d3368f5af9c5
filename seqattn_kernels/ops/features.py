"""The operator of attention over time for each feature: fake kernels, autograd, and what Python calls."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import reference
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function, differentiate_again, needs_gradients
from seqattn_kernels.ops.fakes import register_fake


def _register_fakes() -> None:
    @register_fake("seqattn::feature_fwd")
    def _(input, weight, bias, lengths, mask, reduce, keep):
        batch, _, width = input.shape
        empty = input.new_empty
        return empty((batch, width) if reduce else input.shape), empty(input.shape), empty(input.shape if keep else 0)

    @register_fake("seqattn::feature_bwd")
    def _(input, weight, bias, weights, tangents, d_result, d_weights, lengths, mask, reduce, need_input):
        empty = input.new_empty
        return empty(input.shape if need_input else 0), empty(weight.shape), empty(0 if bias is None else bias.shape)


if attention_cuda.declared():
    _register_fakes()


class FeatureFunction(torch.autograd.Function):
    """Saves its inputs, the weights and what forward keeps of the tanh that they are a softmax of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, lengths, mask, reduce):
        return torch.ops.seqattn.feature_fwd.default(input, weight, bias, lengths, mask, reduce, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reduce = inputs
        ctx.save_for_backward(*tensors, output[1], output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_result, d_weights, _):
        input, weight, bias, lengths, mask, weights, tangents = ctx.saved_tensors
        if d_result is None and d_weights is None:
            return (None,) * 6
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            attend = reference.attention.attended(input, lengths, mask)
            attend = None if attend is None else attend.transpose(1, 2)
            found = differentiate_again(
                lambda x, w, b: reference.attention.feature_attention(x, w, b, attend, ctx.reduce),
                [input, weight, bias],
                needs[:3],
                [d_result, d_weights],
            )
        else:
            found = torch.ops.seqattn.feature_bwd.default(
                input, weight, bias, weights, tangents, d_result, d_weights, lengths, mask, ctx.reduce, needs[0]
            )
        return *(g if need else None for g, need in zip(found, needs[:3], strict=True)), None, None, None


def attention(
    input: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, mask: Tensor | None, reduce: bool
) -> tuple[Tensor, Tensor]:
    """weights = softmax over s of tanh(linear(input [B, S, D])); weights * input, summed over s with `reduce`; and the
    weights.

    All of one dtype, on the CPU float32 or float64; mask boolean [B, S].
    """
    if needs_gradients(input, weight, bias):
        result, weights, _ = apply_function(FeatureFunction, input, weight, bias, lengths, mask, reduce)
    else:
        result, weights, _ = torch.ops.seqattn.feature_fwd.default(input, weight, bias, lengths, mask, reduce, False)
    return result, weights
