"""The operators of scores by themselves, and of weights from scores: fake kernels, autograd, and what Python calls.

Attention that is more than softmax over plain scores (features of earlier weights, sparse weights, alignments) is made
of these two; additive attention as such is one operator, in `seqattn_kernels.ops.attention`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqattn_kernels import native, reference
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function, differentiate_again, needs_gradients
from seqattn_kernels.ops.fakes import register_fake


def _register_fakes() -> None:
    @register_fake("seqattn::scores_fwd")
    def _(kind, query, keys, v, features, feature_weight, lengths):
        return query.new_empty(query.shape[0], query.shape[1], keys.shape[1])

    @register_fake("seqattn::scores_bwd")
    def _(kind, d_scores, query, keys, v, features, feature_weight, lengths):
        return tuple(
            query.new_empty(0) if t is None else query.new_empty(t.shape)
            for t in (query, keys, v, features, feature_weight)
        )

    @register_fake("seqattn::normalize_fwd")
    def _(kind, scores, lengths, mask, scale, temperature, fill, zero_empty):
        return scores.new_empty(scores.shape)

    @register_fake("seqattn::normalize_bwd")
    def _(kind, d_weights, weights, lengths, mask, factor):
        return weights.new_empty(weights.shape)

    @register_fake("seqattn::context_fwd")
    def _(weights, values):
        return values.new_empty(weights.shape[0], weights.shape[1], values.shape[2])


if attention_cuda.declared():
    _register_fakes()


# The scores that kernels exist for, by whether the device is a CPU. A test holds them against the kernels' tables.
_KINDS: dict[bool, list[str]] = {
    True: [] if native.extension is None else list(native.extension.scores()),
    False: ["additive", "dot"],
}


_NORMALIZERS = {kind: number for number, kind in enumerate(reference.normalizers.NORMALIZERS)}


def score_number(kind: str) -> int:
    """What operators call a score."""
    return list(reference.attention.SCORES).index(kind)


def normalizer_number(kind: str) -> int:
    """What operators call a normalizer."""
    return _NORMALIZERS[kind]


def native_kinds(device: str) -> list[str]:
    """The scores that a kernel exists for on devices of this type."""
    return _KINDS[device == "cpu"]


def register_kernel(name: str, triton: Any) -> None:
    """A fused kernel on GPUs for the score of this name: a pair of Triton functions, term and gradients."""
    from seqattn_kernels.kernels import scores as kernels  # needs Triton

    kernels.register(name, triton)
    _KINDS[False].append(name)


class ScoresFunction(torch.autograd.Function):
    """Scores with gradients. Saves its inputs alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind, query, keys, v, features, feature_weight, lengths):
        return torch.ops.seqattn.scores_fwd.default(
            score_number(kind), query, keys, v, features, feature_weight, lengths
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kind, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_scores):
        *tensors, lengths = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:6]
        if torch.is_grad_enabled():
            found = differentiate_again(lambda *t: _reference_scores(ctx.kind, lengths, *t), tensors, needs, [d_scores])
        else:
            found = torch.ops.seqattn.scores_bwd.default(score_number(ctx.kind), d_scores, *tensors, lengths)
        return (None, *(g if need else None for g, need in zip(found, needs, strict=True)), None)


def _reference_scores(
    kind: str,
    lengths: Tensor | None,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None,
    features: Tensor | None,
    feature_weight: Tensor | None,
) -> Tensor:
    hidden, _ = reference.normalizers.hidden_by(keys.shape[1], lengths, None, keys.device)
    if hidden is not None:
        keys = keys.masked_fill(hidden.transpose(1, 2), 0)
    extra = () if features is None else (features, feature_weight)
    scores = reference.attention.SCORES[kind](query, keys, v, *extra)
    return scores if hidden is None else scores.masked_fill(hidden, 0)


def scores(
    kind: str,
    query: Tensor,
    keys: Tensor,
    v: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The native operator: scores [B, T, S] of query [B, T, A] and keys [B, S, A]; 0 past `lengths` (int64 [B]).

    features [B, S, F] or [B, T, S, F] and feature_weight [F, A] belong to the additive score alone.
    """
    if needs_gradients(query, keys, v, features, feature_weight):
        return apply_function(ScoresFunction, kind, query, keys, v, features, feature_weight, lengths)
    return torch.ops.seqattn.scores_fwd.default(score_number(kind), query, keys, v, features, feature_weight, lengths)


class NormalizeFunction(torch.autograd.Function):
    """Weights with gradients. Saves the weights; the scores only for a second derivative's sake."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind, scores, lengths, mask, scale, temperature, fill, zero_empty):
        return torch.ops.seqattn.normalize_fwd.default(
            normalizer_number(kind), scores, lengths, mask, scale, temperature, fill, zero_empty
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kind, scores, lengths, mask, *ctx.numbers = inputs
        ctx.save_for_backward(scores, lengths, mask, output)

    @staticmethod
    def backward(ctx, d_weights):
        scores, lengths, mask, weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        if torch.is_grad_enabled():
            d_scores, d_mask = differentiate_again(
                lambda s, m: _reference_weights(ctx.kind, s, lengths, m, *ctx.numbers),
                [scores, mask],
                needs,
                [d_weights],
            )
        else:
            scale, temperature = ctx.numbers[:2]
            d_scores = d_mask = torch.ops.seqattn.normalize_bwd.default(
                normalizer_number(ctx.kind),
                d_weights,
                weights,
                lengths,
                mask,
                1 / temperature if needs[1] else scale / temperature,
            )
            if needs[1]:
                d_scores = d_scores * scale
                d_mask = (d_mask.sum(1) if mask.dim() == 2 else d_mask).sum_to_size(mask.shape)
        return (None, d_scores if needs[0] else None, None, d_mask if needs[1] else None, None, None, None, None)


def _reference_weights(kind: str, scores: Tensor, *args: Any) -> Tensor:
    if scores.dim() == 3:
        return reference.normalizers.normalize(kind, scores, *args)
    return reference.normalizers.normalize(kind, scores.unsqueeze(1), *args).squeeze(1)


def normalize(
    kind: str,
    scores: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    fill: float = -math.inf,
    zero_empty: bool = True,
) -> Tensor:
    """The native operator: weights [B, T, S] of scores, as `seqattn_kernels.reference.normalizers.normalize`. On a CPU
    also [B, S], without a gradient of the mask."""
    if needs_gradients(scores, mask):
        return apply_function(NormalizeFunction, kind, scores, lengths, mask, scale, temperature, fill, zero_empty)
    return torch.ops.seqattn.normalize_fwd.default(
        normalizer_number(kind), scores, lengths, mask, scale, temperature, fill, zero_empty
    )


class ContextFunction(torch.autograd.Function):
    """Weights times values, with gradients; what has no weight has no part in either. See `context`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights, values):
        return torch.ops.seqattn.context_fwd.default(weights, values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_context):
        weights, values = ctx.saved_tensors
        d_weights = d_values = None
        if ctx.needs_input_grad[0]:
            d_weights = product(d_context, values).masked_fill(weights == 0, 0)
        if ctx.needs_input_grad[1]:
            d_values = context(weights.transpose(1, 2), d_context)
        return d_weights, d_values


def context(weights: Tensor, values: Tensor) -> Tensor:
    """The native operator: weights [B, T, S] times values [B, S, D], of one dtype.

    Values of keys without weight may be anything, NaN included: they add nothing to the result, nor a row's gradient
    to theirs.
    """
    if needs_gradients(weights, values):
        return apply_function(ContextFunction, weights, values)
    return torch.ops.seqattn.context_fwd.default(weights, values)


class ProductFunction(torch.autograd.Function):
    """Scores that are products, with gradients. A score without a gradient has no part in those of query and key."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query, keys, factor):
        return plain_product(query, keys, factor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.factor = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_scores):
        query, keys = ctx.saved_tensors
        if ctx.factor != 1:
            d_scores = d_scores * ctx.factor
        d_query = d_keys = None
        if ctx.needs_input_grad[0]:
            d_query = context(d_scores.to(keys.dtype), keys).to(query.dtype)
        if ctx.needs_input_grad[1]:
            d_keys = context(d_scores.to(query.dtype).transpose(1, 2), query).to(keys.dtype)
        return d_query, d_keys, None


def plain_product(query: Tensor, keys: Tensor, factor: float) -> Tensor:
    """`product` where nothing is hidden, as torch differentiates it."""
    if factor == 1:
        return torch.bmm(query, keys.transpose(1, 2))
    return torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=factor)


def product(query: Tensor, keys: Tensor, factor: float = 1.0) -> Tensor:
    """``factor * query @ keys^T`` [B, T, S] of query [B, T, K] and keys [B, S, K], by torch's product.

    Where the gradient of a score is 0, as a mask leaves it, query and key may be anything. `context` and this are each
    other's derivatives.
    """
    if needs_gradients(query, keys):
        return apply_function(ProductFunction, query, keys, factor)
    return plain_product(query, keys, factor)
