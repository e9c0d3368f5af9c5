"""All steps of an attentional decoder on CUDA (csrc/cuda/decoder.h).

Forward is one kernel. Backward is a loop of few launches a step over what is a chain in time, and single products over
all steps for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqattn_kernels import native
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function, needs_gradients
from seqattn_kernels.ops.decoder import Tensors, _reference_gradients
from seqattn_kernels.ops.fakes import register_fake
from seqattn_kernels.ops.recurrence import _KEPT, _NUMBER, CELLS
from seqattn_kernels.ops.scores import score_number
from seqattn_kernels.reference.decoder import Spec

_HISTORIES = {"last": 1, "sum": 2, "both": 3}  # as decoder_loop has them


def _register_fakes() -> None:
    @register_fake("seqattn::decoder_loop")
    def _(
        cell, x_gates, w_hh, w_context, b_ih, b_hh, w_query, b_query, v, keys, values, lengths, mask, h0, c0, save,
        history=0, history0=None, w_conv=None, w_feature=None, fertility=None,
    ):  # fmt: skip
        batch, steps = x_gates.shape[:2]
        hidden, empty, has_cell = w_hh.shape[1], x_gates.new_empty, CELLS[cell] == "lstm"
        return (
            empty(batch, steps, hidden),
            empty(batch, hidden),
            empty(batch, hidden) if has_cell else empty(0),
            empty(batch, steps, values.shape[2]),
            empty(batch, steps, keys.shape[1]),
            empty(batch, steps, hidden, _KEPT[CELLS[cell]]) if save else empty(0),
            empty(batch, steps, hidden, dtype=torch.float32) if save and has_cell else empty(0, dtype=torch.float32),
        )

    @register_fake("seqattn::decoder_loop_bwd")
    def _(
        cell, w_recurrent, w_context, v, keys, values, lengths, h0, c0, output, weights, queries, saved, cells,
        d_output, d_cn, d_contexts, d_weights,
    ):  # fmt: skip
        batch, steps = output.shape[:2]
        empty = output.new_empty
        return (
            empty(batch, steps, w_context.shape[0]),
            empty(batch, steps, w_recurrent.shape[0]),
            empty(batch, steps, values.shape[2]),
            empty(batch, steps, keys.shape[1], dtype=torch.float32),
            *(empty(0 if t is None else t.shape) for t in (h0, c0)),
        )


if native.extension is not None:
    _register_fakes()


def why_not(spec: Spec, t: Tensors, weights: Sequence[Tensor]) -> str | None:
    """Why the kernel can't run this decoder, or None."""
    if native.extension is None or native.cuda_why_not() is not None:
        return native.why_not() or native.cuda_why_not()
    if not t.input.is_cuda:
        return f"the decoder's kernel takes CUDA tensors, got {t.input.device}"
    gradients = needs_gradients(*t, *weights)
    reason = unserved(spec, t, weights, gradients)
    if reason is not None:
        return reason
    if gradients and attention_cuda.why_not() is not None:
        return f"gradients of the decoder's kernel: {attention_cuda.why_not()}"
    device = torch.cuda.get_device_properties(t.input.device)
    sm = 10 * device.major + device.minor
    reason = native.extension.decoder_why_not(
        spec.cell,
        str(t.input.dtype).removeprefix("torch."),
        t.keys.shape[1],
        weights[1].shape[1],
        t.keys.shape[2],
        t.values.shape[2],
        sm,
        device.multi_processor_count,
        device.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        16 if sm in (90, 100) else 1,
        *(t.w_conv.shape if t.w_conv is not None else (0, 0, 0)),
    )
    return reason or None


def unserved(spec: Spec, t: Tensors, weights: Sequence[Tensor], gradients: bool) -> str | None:
    """What the kernel doesn't have of what this decoder is, its sizes and the device apart; or None."""
    if spec.order != "bahdanau":
        return f"the decoder's kernel attends before the update, not in the order {spec.order!r}"
    if spec.score != "additive":
        return f"the decoder's kernel has additive scores, not {spec.score!r}"
    if t.w_query is None:
        return "the decoder's kernel projects the query, got query_weight None"
    if spec.context_at < 0 or spec.attentional_at >= 0:
        return "the decoder's kernel feeds back the context, and nothing else"
    if len(weights) != (4 if spec.has_bias else 2):
        return "the decoder's kernel has one layer"
    if any(x is not None and x.is_floating_point() and x.dtype != t.input.dtype for x in (*t, *weights)):
        return "the decoder's kernel takes tensors of one dtype"
    if t.w_conv is not None and not len(t.w_conv):
        return "the decoder's kernel takes convolutions with filters"
    if spec.history != "none" and gradients:
        return "the decoder's kernel has no gradients of scores that know of earlier weights"
    return None


class DecoderLoopFunction(torch.autograd.Function):
    """All steps with gradients. Saves inputs, h, contexts, weights and the cells' values: O(B * T * (H + D + S))."""

    @staticmethod
    def forward(*arguments):
        output, _, *others = torch.ops.seqattn.decoder_loop.default(*arguments, True)
        return (output, *others)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, *tensors = inputs
        hidden, c_n, contexts, found, saved, cells = output
        ctx.save_for_backward(hidden, contexts, found, saved, cells, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(() if CELLS[ctx.cell] == "lstm" else (c_n,)), saved, cells)

    @staticmethod
    def backward(ctx, d_hidden, d_c_n, d_contexts, d_found, *_):
        hidden, contexts, found, saved, cells, *tensors = ctx.saved_tensors
        # torch.compile passes zeros for results that there are none of.
        d_c_n = d_c_n if CELLS[ctx.cell] == "lstm" else None
        gradients = d_hidden, d_c_n, d_contexts, d_found
        if all(g is None for g in gradients):
            return (None,) * (1 + len(tensors))
        if torch.is_grad_enabled():
            return None, *_gradients_again(CELLS[ctx.cell], tensors, gradients)
        d_hidden, d_c_n, d_contexts, d_found = (g if g is None else g.contiguous() for g in gradients)
        _, w_hh, w_context, _, _, w_query, b_query, v, keys, values, lengths, _, h0, c0 = tensors
        dtype, rows = keys.dtype, w_hh.shape[0]
        first = torch.zeros_like(hidden[:, 0]) if h0 is None else h0
        before = torch.cat([first.unsqueeze(1), hidden[:, :-1]], 1)
        queries = linear(before, w_query, None if b_query is None else b_query.to(dtype))
        d_x_gates, d_step, d_context, d_scores, d_h0, d_c0 = torch.ops.seqattn.decoder_loop_bwd.default(
            ctx.cell, torch.cat([w_hh, w_query]), w_context, v, keys, values, lengths, h0, c0, hidden, found, queries,
            saved, cells, d_hidden, d_c_n, d_contexts, d_found,
        )  # fmt: skip
        d_recurrent = d_step.flatten(0, 1).t() @ before.flatten(0, 1)
        d_w_context = d_x_gates.flatten(0, 1).t() @ contexts.flatten(0, 1)
        sums, sums_x = d_step.sum((0, 1), dtype=torch.float32), d_x_gates.sum((0, 1))
        _, d_keys, d_v, _, _ = torch.ops.seqattn.scores_bwd.default(
            score_number("additive"), d_scores, queries, keys, v.to(dtype), None, None, lengths
        )
        d_values = torch.bmm(found.transpose(1, 2), d_context)
        results = (
            d_x_gates, d_recurrent[:rows], d_w_context, sums_x, sums[:rows].to(dtype), d_recurrent[rows:],
            sums[rows:], d_v.float(), d_keys, d_values, None, None, d_h0, d_c0,
        )  # fmt: skip
        needs = ctx.needs_input_grad[1:]
        return None, *(g if need else None for g, need in zip(results, needs, strict=True))


def _gradients_again(cell: str, tensors: Sequence[Any], gradients: Sequence[Any]) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the reference: x_gates is the input, W_ih the identity."""
    x_gates, w_hh, w_context, b_ih, b_hh, w_query, b_query, v, keys, values, lengths, mask, h0, c0 = tensors
    dtype, rows = keys.dtype, w_hh.shape[0]
    spec = Spec(cell=cell, has_bias=b_ih is not None, context_at=rows)
    w_ih = torch.cat([torch.eye(rows, dtype=dtype, device=keys.device), w_context], 1)
    weights = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    h0, c0 = (x if x is None else x.unsqueeze(0) for x in (h0, c0))
    b_query = None if b_query is None else b_query.to(dtype)
    t = Tensors(x_gates, keys, values, lengths, mask, h0, c0, None, None, w_query, b_query, v.to(dtype))
    needs = [x is not None and x.requires_grad for x in (*t, *weights)]
    d_hidden, d_c_n, d_contexts, d_found = gradients
    d_states = [None if g is None else g.unsqueeze(0) for g in (d_hidden, d_c_n)]
    found = _reference_gradients(spec, t, weights, (*d_states, d_contexts, d_found, None), needs)
    own, (d_w_ih, d_w_hh, *d_biases) = Tensors(*found[: len(t)]), found[len(t) :]  # type: ignore[arg-type]
    d_b_ih, d_b_hh = d_biases or (None, None)
    d_h0, d_c0 = (None if g is None else g.squeeze(0) for g in (own.h0, own.c0))
    d_b_query, d_v = (None if g is None else g.float() for g in (own.b_query, own.v))
    return [
        own.input, d_w_hh, None if d_w_ih is None else d_w_ih[:, rows:], d_b_ih, d_b_hh, own.w_query, d_b_query, d_v,
        own.keys, own.values, None, None, d_h0, d_c0,
    ]  # fmt: skip


def attention_decoder(
    spec: Spec, t: Tensors, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Arguments and results as of `reference.decoder.attention_decoder`; `why_not` must have nothing against them."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases if spec.has_bias else (None, None)
    assert t.w_query is not None
    assert t.v is not None
    width, value = t.input.shape[2], t.values.shape[2]
    w_context = w_ih[:, spec.context_at : spec.context_at + value]
    if w_context.stride(0) % 8 or w_context.data_ptr() % 16 or w_context.stride(1) != 1:
        w_context = w_context.contiguous()
    arguments: tuple[Any, ...] = (
        _NUMBER[spec.cell],
        linear(t.input, w_ih[:, spec.input_at : spec.input_at + width]).contiguous(),
        w_hh.contiguous(),
        w_context,
        b_ih,
        b_hh,
        t.w_query.contiguous(),
        None if t.b_query is None else t.b_query.float(),
        t.v.float(),
        t.keys.contiguous(),
        t.values.contiguous(),
        t.lengths,
        None if t.mask is None else t.mask.contiguous(),
        None if t.h0 is None else t.h0[0].contiguous(),
        None if t.c0 is None else t.c0[0].contiguous(),
    )
    known: tuple[Any, ...] = ()
    if needs_gradients(*arguments[1:]):
        hidden, c_n, contexts, found, *_ = apply_function(DecoderLoopFunction, *arguments)
    else:
        if spec.history != "none":
            history0, fertility = (None if x is None else x.contiguous() for x in (t.history0, t.fertility))
            known = (_HISTORIES[spec.history], history0, t.w_conv, t.w_feature, fertility)
        hidden, _, c_n, contexts, found, *_ = torch.ops.seqattn.decoder_loop.default(*arguments, False, *known)
    attentional = None
    if t.w_output is not None:
        pair = (contexts, hidden) if spec.output_context_at == 0 else (hidden, contexts)
        attentional = linear(torch.cat(pair, 2), t.w_output, t.b_output)
        attentional = attentional.tanh() if spec.activation == "tanh" else attentional
    return hidden.unsqueeze(0), c_n.unsqueeze(0) if spec.cell == "lstm" else None, contexts, found, attentional
