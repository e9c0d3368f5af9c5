"""The operator of location-sensitive scores on the CPU: fake kernel, autograd, and what Python calls."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import native, reference
from seqattn_kernels.ops.autograd import apply_function, differentiate_again, needs_gradients
from seqattn_kernels.ops.fakes import register_fake
from seqattn_kernels.ops.scores import score_number


def _register_fakes() -> None:
    @register_fake("seqattn::location_fwd")
    def _(query, keys, v, history, conv_weight, feature_weight, lengths):
        return query.new_empty(*query.shape[:-1], keys.shape[1])


if native.extension is not None:
    _register_fakes()


class LocationFunction(torch.autograd.Function):
    """Saves its inputs alone; backward makes the features again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query, keys, v, history, conv_weight, feature_weight, lengths):
        return torch.ops.seqattn.location_fwd.default(query, keys, v, history, conv_weight, feature_weight, lengths)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_scores):
        *given, lengths = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            found = differentiate_again(lambda *t: _reference_scores(lengths, *t), given, needs, [d_scores])
        else:
            found = _gradients(lengths, d_scores, needs, *given)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None


def _gradients(lengths, d_scores, needs, query, keys, v, history, conv_weight, feature_weight):
    single = query.dim() == 2
    features = reference.attention.location_features(history, conv_weight)
    if single:
        query, d_scores = query.unsqueeze(1), d_scores.unsqueeze(1)
    d_query, d_keys, d_v, d_features, d_weight = torch.ops.seqattn.scores_bwd.default(
        score_number("additive"), d_scores, query, keys, v, features, feature_weight.t(), lengths
    )
    flat = history.reshape(-1, *history.shape[-2:])
    d_history, d_conv, _ = torch.ops.aten.convolution_backward.default(
        d_features.reshape(flat.shape[0], *d_features.shape[-2:]).transpose(1, 2),
        flat,
        conv_weight,
        None,
        [1],
        [conv_weight.shape[-1] // 2],
        [1],
        False,
        [0],
        1,
        [needs[3], needs[4], False],
    )
    return (
        d_query.squeeze(1) if single else d_query,
        d_keys,
        d_v,
        d_history.reshape(history.shape) if needs[3] else None,
        d_conv,
        d_weight.t(),
    )


def _reference_scores(lengths, query, keys, v, history, conv_weight, feature_weight):
    single = query.dim() == 2
    hidden, _ = reference.normalizers.hidden_by(keys.shape[1], lengths, None, keys.device)
    if hidden is not None:
        keys = keys.masked_fill(hidden.transpose(1, 2), 0)
    scores = reference.attention.additive_scores(
        query.unsqueeze(1) if single else query,
        keys,
        v,
        reference.attention.location_features(history, conv_weight),
        feature_weight.t(),
    )
    scores = scores if hidden is None else scores.masked_fill(hidden, 0)
    return scores.squeeze(1) if single else scores


def scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    history: Tensor,
    conv_weight: Tensor,
    feature_weight: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    """Scores [B, T, S] of query [B, T, A], history [B, T, C, S], or [B, S] of [B, A], [B, C, S]; 0 past lengths.

    On the CPU, all float32 or all float64.
    """
    if needs_gradients(query, keys, v, history, conv_weight, feature_weight):
        return apply_function(LocationFunction, query, keys, v, history, conv_weight, feature_weight, lengths)
    return torch.ops.seqattn.location_fwd.default(query, keys, v, history, conv_weight, feature_weight, lengths)
