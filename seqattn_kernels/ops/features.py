"""The operators of attention without a query, over time for each feature and pooling: fake kernels, autograd, and what
Python calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqattn_kernels import reference
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function


def _register_fakes() -> None:
    @torch.library.register_fake("seqattn::feature_fwd")
    def _(input, weight, bias, lengths, mask, reduce, keep):
        batch, _, width = input.shape
        empty = input.new_empty
        return empty((batch, width) if reduce else input.shape), empty(input.shape), empty(input.shape if keep else 0)

    @torch.library.register_fake("seqattn::feature_bwd")
    def _(input, weight, bias, weights, tangents, d_result, d_weights, lengths, mask, reduce, need_input):
        empty = input.new_empty
        return empty(input.shape if need_input else 0), empty(weight.shape), empty(0 if bias is None else bias.shape)


def _register_pool_fakes() -> None:
    @torch.library.register_fake("seqattn::pool_fwd")
    def _(inner, v):
        return inner.new_empty(inner.shape[0], v.shape[0], inner.shape[1])

    @torch.library.register_fake("seqattn::pool_bwd")
    def _(d_scores, inner, v):
        return inner.new_empty(inner.shape), v.new_empty(v.shape)


if attention_cuda.declared():
    _register_fakes()
if attention_cuda.why_not() is None:
    _register_pool_fakes()


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
            given: list[Any] = [None if t is None else t.view_as(t) for t in (input, weight, bias)]
            outputs = reference.attention.feature_attention(given[0], given[1], given[2], attend, ctx.reduce)
            pairs = [(out, g) for out, g in zip(outputs, (d_result, d_weights), strict=True) if g is not None]
            wanted = [i for i in range(3) if needs[i]]
            some = torch.autograd.grad(
                [out for out, _ in pairs], [given[i] for i in wanted], [g for _, g in pairs], create_graph=True
            )
            found = [dict(zip(wanted, some, strict=True)).get(i) for i in range(3)]
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
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        result, weights, _ = apply_function(FeatureFunction, input, weight, bias, lengths, mask, reduce)
    else:
        result, weights, _ = torch.ops.seqattn.feature_fwd.default(input, weight, bias, lengths, mask, reduce, False)
    return result, weights


class PoolFunction(torch.autograd.Function):
    """Saves its inputs alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inner, v):
        return torch.ops.seqattn.pool_fwd.default(inner, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_scores):
        inner, v = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            slope = 1 - inner.tanh().square()
            return (
                (d_scores.transpose(1, 2) @ v) * slope if needs[0] else None,
                torch.einsum("brs,bsa->ra", d_scores, inner.tanh()) if needs[1] else None,
            )
        d_inner, d_v = torch.ops.seqattn.pool_bwd.default(d_scores, inner, v)
        return d_inner if needs[0] else None, d_v if needs[1] else None


def pool_scores(inner: Tensor, v: Tensor) -> Tensor:
    """Scores [B, R, S], ``v @ tanh(inner)``, of inner [B, S, A] and v [R, A] of one dtype, on a GPU."""
    if torch.is_grad_enabled() and (inner.requires_grad or v.requires_grad):
        return apply_function(PoolFunction, inner, v)
    return torch.ops.seqattn.pool_fwd.default(inner, v)
