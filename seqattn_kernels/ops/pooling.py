"""The operators of self-attentive pooling: all of it on a CPU, the scores of many rows on a GPU. Fake kernels,
autograd, and what Python calls."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import native, reference
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function, differentiate_again, needs_gradients
from seqattn_kernels.ops.fakes import register_fake


def _register_fakes() -> None:
    @register_fake("seqattn::pooling_fwd")
    def _(input, weight, bias, v, values, lengths, mask, keep):
        batch, source, width = input.shape
        rows, empty = v.shape[:-1], input.new_empty
        return (
            empty(batch, *rows, width if values is None else values.shape[2]),
            empty(batch, *rows, source),
            empty((batch, source, weight.shape[0]) if keep else 0),
        )

    @register_fake("seqattn::pooling_bwd")
    def _(
        input, weight, bias, v, values, weights, tangents, d_context, d_weights, lengths, mask, need_input, need_values
    ):
        empty = input.new_empty
        return (
            empty(input.shape if need_input else 0),
            empty(weight.shape),
            empty(0 if bias is None else bias.shape),
            empty(v.shape),
            empty(values.shape if values is not None and need_values else 0),
        )


def _register_row_fakes() -> None:
    @register_fake("seqattn::pool_fwd")
    def _(inner, v):
        return inner.new_empty(inner.shape[0], v.shape[0], inner.shape[1])

    @register_fake("seqattn::pool_bwd")
    def _(d_scores, inner, v):
        return inner.new_empty(inner.shape), v.new_empty(v.shape)


if native.extension is not None:
    _register_fakes()
if attention_cuda.why_not() is None:
    _register_row_fakes()


class PoolingFunction(torch.autograd.Function):
    """Saves its inputs, the weights and the tanh that their scores are made of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, v, values, lengths, mask):
        return torch.ops.seqattn.pooling_fwd.default(input, weight, bias, v, values, lengths, mask, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1], output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_context, d_weights, _):
        *inputs, weights, tangents = ctx.saved_tensors
        if d_context is None and d_weights is None:
            return (None,) * 7
        *given, lengths, mask = inputs
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            found = differentiate_again(
                lambda x, w, b, v, y: reference.attention.pooling_attention(x, w, b, v, y, lengths, mask),
                given,
                needs,
                [d_context, d_weights],
            )
        else:
            found = torch.ops.seqattn.pooling_bwd.default(
                *given, weights, tangents, d_context, d_weights, lengths, mask, needs[0], needs[4]
            )
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def attention(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    values: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled values [B, D] and weights [B, S] by scores v . tanh(linear(input [B, S, K])); with v [R, A] [B, R, ..].

    On the CPU, all float32 or all float64; values None: the input.
    """
    if needs_gradients(input, weight, bias, v, values):
        context, weights, _ = apply_function(PoolingFunction, input, weight, bias, v, values, lengths, mask)
    else:
        context, weights, _ = torch.ops.seqattn.pooling_fwd.default(
            input, weight, bias, v, values, lengths, mask, False
        )
    return context, weights


class RowScoresFunction(torch.autograd.Function):
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
            return tuple(differentiate_again(reference.attention.scores_of_rows, [inner, v], needs, [d_scores]))
        d_inner, d_v = torch.ops.seqattn.pool_bwd.default(d_scores, inner, v)
        return d_inner if needs[0] else None, d_v if needs[1] else None


def scores_of_rows(inner: Tensor, v: Tensor) -> Tensor:
    """Scores [B, R, S], ``v @ tanh(inner)``, of inner [B, S, A] and v [R, A] of one dtype, on a GPU."""
    if needs_gradients(inner, v):
        return apply_function(RowScoresFunction, inner, v)
    return torch.ops.seqattn.pool_fwd.default(inner, v)
