"""All steps of an attentional decoder in one CUDA kernel, without gradients (csrc/cuda/decoder.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqattn_kernels import native
from seqattn_kernels.ops.decoder import Tensors
from seqattn_kernels.ops.recurrence import _NUMBER, CELLS
from seqattn_kernels.reference.decoder import Spec


def _register_fake() -> None:
    @torch.library.register_fake("seqattn::decoder_loop")
    def _(cell, x_gates, w_hh, w_context, b_ih, b_hh, w_query, b_query, v, keys, values, lengths, mask, h0, c0):
        batch, steps = x_gates.shape[:2]
        hidden, empty = w_hh.shape[1], x_gates.new_empty
        return (
            empty(batch, steps, hidden),
            empty(batch, hidden),
            empty(batch, hidden) if CELLS[cell] == "lstm" else empty(0),
            empty(batch, steps, values.shape[2]),
            empty(batch, steps, keys.shape[1]),
        )


if native.extension is not None:
    _register_fake()


def why_not(spec: Spec, t: Tensors, weights: Sequence[Tensor]) -> str | None:
    """Why the kernel can't run this decoder, or None."""
    if native.extension is None or native.cuda_why_not() is not None:
        return native.why_not() or native.cuda_why_not()
    if not t.input.is_cuda:
        return f"the decoder's kernel takes CUDA tensors, got {t.input.device}"
    if spec.order != "bahdanau" or spec.score != "additive" or spec.context_at < 0 or spec.attentional_at >= 0:
        return "the decoder's kernel attends by additive scores before the update, which sees the context"
    if len(weights) != (4 if spec.has_bias else 2):
        return "the decoder's kernel has one layer"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*t, *weights)):
        return "the decoder's kernel has no gradients"
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
    )
    return reason or None


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
    hidden, _, c_n, contexts, found = torch.ops.seqattn.decoder_loop.default(
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
    attentional = None
    if t.w_output is not None:
        pair = (contexts, hidden) if spec.output_context_at == 0 else (hidden, contexts)
        attentional = linear(torch.cat(pair, 2), t.w_output, t.b_output)
        attentional = attentional.tanh() if spec.activation == "tanh" else attentional
    return hidden.unsqueeze(0), c_n.unsqueeze(0) if spec.cell == "lstm" else None, contexts, found, attentional
