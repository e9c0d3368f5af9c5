"""The attentional decoder's operators: fake kernels, autograd, and what Python calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqattn_kernels import native, reference
from seqattn_kernels.ops.autograd import apply_function, needs_gradients
from seqattn_kernels.ops.fakes import register_fake
from seqattn_kernels.ops.recurrence import _NUMBER, _SAVED, CELLS, _padded
from seqattn_kernels.reference.decoder import ACTIVATIONS, HISTORIES, ORDERS, SCORES, Spec


class Tensors(NamedTuple):
    """What a decoder computes with, beside the weights of its cells; see `reference.decoder.attention_decoder`."""

    input: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None
    mask: Tensor | None = None
    h0: Tensor | None = None
    c0: Tensor | None = None
    context0: Tensor | None = None
    attentional0: Tensor | None = None
    w_query: Tensor | None = None
    b_query: Tensor | None = None
    v: Tensor | None = None
    w_output: Tensor | None = None
    b_output: Tensor | None = None
    history0: Tensor | None = None
    w_conv: Tensor | None = None
    w_feature: Tensor | None = None
    fertility: Tensor | None = None


_DIFFERENTIABLE = tuple(name for name in Tensors._fields if name not in ("lengths", "mask"))
MAX_LAYERS = 16  # of the native kernels


def _options(spec: Spec) -> list[int]:
    return [
        ORDERS.index(spec.order),
        SCORES.index(spec.score),
        ACTIVATIONS.index(spec.activation),
        spec.input_at,
        spec.context_at,
        spec.attentional_at,
        spec.output_context_at,
        spec.output_hidden_at,
        HISTORIES.index(spec.history),
        int(spec.history_gradient),
    ]


def _arguments(spec: Spec, t: Tensors, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """Those that forward and backward share, after cell, options and scale; forward has packed keys in between."""
    return (
        t.lengths, t.mask, t.h0, t.c0, t.context0, t.attentional0, weights, spec.has_bias,
        t.w_query, t.b_query, t.v, t.w_output, t.b_output, t.history0, t.w_conv, t.w_feature, t.fertility,
    )  # fmt: skip


def _forward(
    spec: Spec,
    t: Tensors,
    weights: Sequence[Tensor],
    packed_keys: Tensor | None,
    packed: Tensor | None,
    owners: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    return torch.ops.seqattn.decoder_fwd.default(
        _NUMBER[spec.cell], _options(spec), spec.scale, t.input, t.keys, packed_keys, t.values,
        *_arguments(spec, t, weights), packed, owners, save,
    )  # fmt: skip


def _register_fakes() -> None:
    @register_fake("seqattn::decoder_fwd")
    def _(
        cell, options, scale, input, keys, packed_keys, values, lengths, mask, h0, c0, context0, attentional0, weights,
        has_bias, w_query, b_query, v, w_output, b_output, history0, w_conv, w_feature, fertility, packed, owners,
        save,
    ):  # fmt: skip
        layers, hidden = len(weights) // (4 if has_bias else 2), weights[1].shape[1]
        batch, steps = input.shape[:2]
        empty, has_cell = input.new_empty, CELLS[cell] == "lstm"
        return (
            empty(layers, batch, steps, hidden),
            empty(layers, batch, hidden) if has_cell else empty(0),
            empty(batch, steps, values.shape[2]),
            empty(batch, steps, keys.shape[1]),
            empty(0) if w_output is None else empty(batch, steps, w_output.shape[0]),
            empty(layers, batch, steps, _SAVED[CELLS[cell]] * _padded(hidden)) if save else empty(0),
        )

    @register_fake("seqattn::decoder_generate")
    def _(
        cell, options, scale, embedding, keys, packed_keys, values, lengths, mask, h0, c0, context0, attentional0,
        weights, has_bias, w_query, b_query, v, w_output, b_output, history0, w_conv, w_feature, fertility, packed,
        owners, w_predict, b_predict, start, end, max_length,
    ):  # fmt: skip
        batch = start.shape[0]
        return (
            start.new_empty(batch, max_length),
            start.new_empty(batch),
            embedding.new_empty(batch),
            embedding.new_empty(batch, max_length, keys.shape[1]),
        )

    @register_fake("seqattn::decoder_bwd")
    def _(
        cell, options, scale, input, keys, values, lengths, mask, h0, c0, context0, attentional0, weights, has_bias,
        w_query, b_query, v, w_output, b_output, history0, w_conv, w_feature, fertility, hidden, contexts, found,
        attentional, reserve, d_hidden, d_c_n, d_contexts, d_weights, d_attentional, need_input,
    ):  # fmt: skip
        found = [
            input if need_input else None, keys, values, h0, c0, context0, attentional0, w_query, b_query, v, w_output,
            b_output, history0, w_conv, w_feature, fertility, *weights,
        ]  # fmt: skip
        return [input.new_empty(0 if t is None else t.shape) for t in found]

    @register_fake("seqattn::decoder_pack")
    def _(cell, weights, has_bias, w_query, b_query, w_output, b_output, w_conv, w_feature):
        hidden, each = weights[1].shape[1], 4 if has_bias else 2
        gates = reference.recurrence.GATES[CELLS[cell]]
        size = 0
        for layer in range(0, len(weights), each):
            size += gates * _padded(hidden) * (weights[layer].shape[1] + hidden)
            size += (4 if gates > 1 else 1) * _padded(hidden)
        for w in (w_query, w_output):
            if w is not None:
                size += _padded(w.shape[0]) * (w.shape[1] + 1)
        if w_conv is not None:
            filters, channels, window = w_conv.shape
            size += channels * window * _padded(filters) + filters * _padded(w_feature.shape[0])
        return weights[0].new_empty(size)


if native.extension is not None:
    _register_fakes()


class DecoderFunction(torch.autograd.Function):
    """All steps with gradients. Saves inputs, h, contexts, weights and the cells' reserve: O(B * T * (H + D + S))."""

    @staticmethod
    def forward(spec, packed_keys, *tensors):
        t, weights = Tensors(*tensors[: len(Tensors._fields)]), tensors[len(Tensors._fields) :]
        return _forward(spec, t, weights, packed_keys, None, None, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        spec, _, *tensors = inputs
        ctx.spec = spec
        hidden, c_n, contexts, found, attentional, reserve = output
        ctx.save_for_backward(hidden, contexts, found, attentional, reserve, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (c_n, attentional) if t.dim() == 1), reserve)

    @staticmethod
    def backward(ctx, d_hidden, d_c_n, d_contexts, d_found, d_attentional, _):
        spec = ctx.spec
        hidden, contexts, found, attentional, reserve, *tensors = ctx.saved_tensors
        t, weights = Tensors(*tensors[: len(Tensors._fields)]), tensors[len(Tensors._fields) :]
        # torch.compile passes zeros for results that there are none of.
        d_c_n = d_c_n if spec.cell == "lstm" else None
        d_attentional = d_attentional if t.w_output is not None else None
        gradients = d_hidden, d_c_n, d_contexts, d_found, d_attentional
        if all(g is None for g in gradients):
            return (None,) * (2 + len(tensors))
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_reference_gradients(spec, t, weights, gradients, needs)
        results = torch.ops.seqattn.decoder_bwd.default(
            _NUMBER[spec.cell], _options(spec), spec.scale, t.input, t.keys, t.values, *_arguments(spec, t, weights),
            hidden, contexts, found, attentional if t.w_output is not None else None, reserve,
            *(g if g is None else g.contiguous() for g in gradients), needs[0],
        )  # fmt: skip
        named = dict(zip(_DIFFERENTIABLE, results, strict=False))
        all_gradients = [*(named.get(name) for name in Tensors._fields), *results[len(_DIFFERENTIABLE) :]]
        return None, None, *(g if need else None for g, need in zip(all_gradients, needs, strict=True))


def _reference_gradients(spec, t, weights, gradients, needs):
    """Gradients that can be differentiated again, through the reference."""
    # Views, so that a tensor given in two places gets the gradient of each place apart.
    inputs: list[Any] = [x if x is None else x.view_as(x) for x in (*t, *weights)]
    own = Tensors(*inputs[: len(Tensors._fields)])
    outputs = reference.decoder.attention_decoder(
        spec, own.input, own.keys, own.values, own.lengths, own.mask, own.h0, own.c0, own.context0, own.attentional0,
        inputs[len(Tensors._fields) :], own.w_query, own.b_query, own.v, own.w_output, own.b_output, own.history0,
        own.w_conv, own.w_feature, own.fertility,
    )  # fmt: skip
    pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out is not None and g is not None]
    chosen = [i for i, need in enumerate(needs) if need]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [inputs[i] for i in chosen],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    results: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(chosen, found, strict=True):
        results[i] = gradient
    return results


def attention_decoder(
    spec: Spec,
    t: Tensors,
    weights: Sequence[Tensor],
    *,
    packed_keys: Tensor | None = None,
    packed: Tensor | None = None,
    owners: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """The native operator; arguments and results as of `reference.decoder.attention_decoder`. mask: boolean [B, S].

    packed_keys: what `ops.attention.pack_keys` made of these very keys (additive scores); packed: what `pack_decoder`
    made of these very weights; None: made here. owners [B]: the row of keys, values, lengths and mask that each row
    attends to, where no gradient is needed.
    """
    if packed_keys is None and spec.score == "additive" and spec.history == "none":
        packed_keys = torch.ops.seqattn.additive_pack.default(t.keys.detach())
    if needs_gradients(*t, *weights):
        hidden, c_n, contexts, found, attentional, _ = apply_function(DecoderFunction, spec, packed_keys, *t, *weights)
    else:
        hidden, c_n, contexts, found, attentional, _ = _forward(spec, t, weights, packed_keys, packed, owners, False)
    return hidden, c_n if spec.cell == "lstm" else None, contexts, found, None if t.w_output is None else attentional


def generate(
    spec: Spec,
    t: Tensors,
    weights: Sequence[Tensor],
    w_predict: Tensor | None,
    b_predict: Tensor | None,
    start: Tensor,
    end: int | None,
    max_length: int,
    *,
    packed_keys: Tensor | None,
    packed: Tensor | None,
    owners: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy decoding in one operator; the input of `t` is the table of embeddings [V, I]. No gradients.

    -> words [B, T], how many of them are each row's [B], sums of log-probabilities [B], weights [B, T, S].
    """
    return torch.ops.seqattn.decoder_generate.default(
        _NUMBER[spec.cell], _options(spec), spec.scale, t.input, t.keys, packed_keys, t.values,
        *_arguments(spec, t, weights), packed, owners, w_predict, b_predict, start, -1 if end is None else end,
        max_length,
    )  # fmt: skip


def pack_decoder(
    cell: str,
    weights: Sequence[Tensor],
    has_bias: bool,
    w_query: Tensor | None = None,
    b_query: Tensor | None = None,
    w_output: Tensor | None = None,
    b_output: Tensor | None = None,
    w_conv: Tensor | None = None,
    w_feature: Tensor | None = None,
) -> Tensor:
    """The weights as the kernels read them; valid as long as they don't change."""
    return torch.ops.seqattn.decoder_pack.default(
        _NUMBER[cell], weights, has_bias, w_query, b_query, w_output, b_output, w_conv, w_feature
    )
