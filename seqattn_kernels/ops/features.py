"""The operators of attention without a query, over time for each feature and pooling: fake kernels, autograd, and what
Python calls."""

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
