"""The recurrence operators: fake kernels, autograd, and what Python calls.

An operator works on one layer with all its directions and steps. The Functions here exist only to be differentiated;
where nothing needs a gradient the plain operator is called, which costs a few microseconds less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqattn_kernels import native, reference
from seqattn_kernels.ops.autograd import apply_function, needs_gradients
from seqattn_kernels.ops.fakes import register_fake
from seqattn_kernels.reference.recurrence import BATCH_FIRST, PACKED

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # the order of csrc/cells/registry.h
_NUMBER = {name: number for number, name in enumerate(CELLS)}
_SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}
_KEPT = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4}  # on CUDA: a unit's values but for the cell state
_UNIT_PAD = 16

Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _padded(units: int) -> int:
    return -(-units // _UNIT_PAD) * _UNIT_PAD


def _cuda_reserve_bytes(name: str, dtype: torch.dtype, directions: int, rows: int, hidden: int, output: int) -> int:
    """Bytes of the reserve on CUDA; mirrors Problem::parts in csrc/cuda/problem.cpp."""
    count, item = directions * rows, dtype.itemsize
    parts = [count * hidden * _KEPT[name] * item, count * output * item]
    if name == "lstm":
        parts.append(count * hidden * max(item, 4))
    if output != hidden:
        parts.append(count * hidden * item)
    return sum((part + 255) // 256 * 256 for part in parts)


def _geometry(cell: str, input: Tensor, layout: int, sizes: Tensor | None, weights: Sequence[Tensor], has_bias: bool):
    hidden = weights[1].shape[0] // reference.recurrence.GATES[cell]
    output = weights[1].shape[1]
    per_direction = 2 + 2 * has_bias + (output != hidden)
    return len(weights) // per_direction, hidden, output


def _register_fakes() -> None:
    @register_fake("seqattn::recurrence_fwd")
    def _(
        cell, input, sizes, layout, h0, c0, weights, packed, has_bias, save, cell_states, allow_tf32=False,
        stepwise=False,
    ):  # fmt: skip
        name = CELLS[cell]
        D, hidden, output = _geometry(name, input, layout, sizes, weights, has_bias)
        if layout == PACKED:
            rows = input.shape[0]
            batch = h0.shape[1] if h0 is not None else torch.library.get_ctx().new_dynamic_size()
        else:
            batch = input.shape[0] if layout == BATCH_FIRST else input.shape[1]
            rows = input.shape[0] * input.shape[1]
        has_cell = name == "lstm"
        empty = input.new_empty
        if not save:
            reserve = empty(0, dtype=torch.uint8) if input.is_cuda else empty(0)
        elif input.is_cuda:
            reserve = empty(_cuda_reserve_bytes(name, input.dtype, D, rows, hidden, output), dtype=torch.uint8)
        else:
            reserve = empty(D, rows, (_SAVED[name] + 1) * _padded(hidden))
        return (
            empty(*input.shape[:-1], D * output),
            empty(D, batch, output),
            empty(D, batch, hidden) if has_cell else empty(0),
            empty(*input.shape[:-1], D * hidden) if has_cell and cell_states else empty(0),
            reserve,
        )

    @register_fake("seqattn::recurrence_bwd")
    def _(
        cell, input, sizes, layout, h0, c0, weights, has_bias, reserve, d_output, d_hn, d_cn, d_cell_states,
        need_input, need_weights, allow_tf32=False, stepwise=False,
    ):  # fmt: skip
        empty = input.new_empty
        return (
            torch.empty_like(input) if need_input else empty(0),
            torch.empty_like(h0) if h0 is not None else empty(0),
            torch.empty_like(c0) if c0 is not None else empty(0),
            [torch.empty_like(w) for w in weights] if need_weights else [],
        )

    @register_fake("seqattn::cell_fwd")
    def _(cell, input, h, c, weights, packed, has_bias, save):
        batch, hidden, name = input.shape[0], weights[1].shape[1], CELLS[cell]
        columns = [hidden, hidden] if name == "lstm" else [hidden]
        if save and not input.is_cuda:
            columns.append(max(_SAVED[name], 1) * _padded(hidden))
        results = [input.new_empty(batch, n) for n in columns]
        if save and input.is_cuda:
            size = _cuda_reserve_bytes(name, input.dtype, 1, batch, hidden, hidden)
            results.append(input.new_empty(size, dtype=torch.uint8))
        return results

    @register_fake("seqattn::cell_bwd")
    def _(cell, input, h, c, weights, has_bias, reserve, d_h, d_c, need_input, need_weights):
        inputs = [input if need_input else None, h, c, *(weights if need_weights else ())]
        return [torch.empty_like(t) for t in inputs if t is not None]

    @register_fake("seqattn::recurrence_pack")
    def _(cell, weights, has_bias, bfloat16=False):
        D, hidden, output = _geometry(CELLS[cell], weights[0], 0, None, weights, has_bias)
        gates = reference.recurrence.GATES[CELLS[cell]]
        slots = 4 if gates > 1 else 1
        depth = weights[0].shape[1] + output
        if bfloat16:  # pairs in the place of values
            depth = (weights[0].shape[1] + 1) // 2 + (output + 1) // 2
        size = gates * _padded(hidden) * depth + slots * _padded(hidden)
        if output != hidden:
            size += _padded(output) * hidden
        if bfloat16:
            return [weights[0].new_empty(2 * size, dtype=torch.bfloat16) for _ in range(D)]
        return [weights[0].new_empty(size) for _ in range(D)]


if native.extension is not None:
    _register_fakes()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


class RecurrenceFunction(torch.autograd.Function):
    """One layer with gradients. Saves the inputs and the reserve, never the outputs: those may be changed in place."""

    @staticmethod
    def forward(cell, has_bias, layout, cell_states, allow_tf32, stepwise, input, sizes, h0, c0, *weights):
        return torch.ops.seqattn.recurrence_fwd.default(
            _NUMBER[cell], input, sizes, layout, h0, c0, weights, (), has_bias, True, cell_states, allow_tf32, stepwise
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *settings, input, sizes, h0, c0 = inputs[:10]
        weights = inputs[10:]
        ctx.settings = tuple(settings)
        ctx.save_for_backward(input, sizes, h0, c0, output[4], *weights)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in output[2:] if t.dim() == 1), output[4])

    @staticmethod
    def backward(ctx, d_output, d_hn, d_cn, d_states, _):
        cell, has_bias, layout, cell_states, allow_tf32, stepwise = ctx.settings
        input, sizes, h0, c0, reserve, *weights = ctx.saved_tensors
        unneeded = (None,) * 6  # gradients of the settings
        needs = ctx.needs_input_grad[6:]
        # torch.compile passes zeros for results that the cell doesn't have.
        has_cell = cell == "lstm"
        gradients = d_output, d_hn, d_cn if has_cell else None, d_states if has_cell and cell_states else None
        if all(g is None for g in gradients):
            return (None,) * (10 + len(weights))
        if torch.is_grad_enabled():
            outputs = reference.recurrence.recurrence(cell, input, sizes, layout, h0, c0, weights, has_bias)
            inputs = input, sizes, h0, c0, *weights
            return *unneeded, *_differentiable_gradients(outputs, inputs, needs, gradients)
        d_input, d_h0, d_c0, d_weights = torch.ops.seqattn.recurrence_bwd.default(
            _NUMBER[cell], input, sizes, layout, h0, c0, weights, has_bias, reserve,
            *map(_contiguous, gradients), needs[0], any(needs[4:]), allow_tf32, stepwise,
        )  # fmt: skip
        return (
            *unneeded,
            d_input if needs[0] else None,
            None,
            d_h0 if needs[2] else None,
            d_c0 if needs[3] else None,
            *(d_weights or (None,) * len(weights)),
        )


def _differentiable_gradients(outputs, inputs, needs, gradients):
    """Gradients of the reference's outputs, to the inputs that need them, that can be differentiated again."""
    pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if out is not None and grad is not None]
    chosen = [i for i, need in enumerate(needs) if need]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [inputs[i] for i in chosen],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    results: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(chosen, found, strict=True):
        results[i] = gradient
    return results


def recurrence(
    cell: str,
    input: Tensor,
    sizes: Tensor | None,
    layout: int,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_bias: bool,
    cell_states: bool = False,
    packed: Sequence[Tensor] = (),
    stepwise: bool = False,
) -> Results:
    """The native operator on one layer; see `reference.recurrence.recurrence` for the arguments and results.

    `packed`: what `pack_recurrence` made of these very weights, or empty. `stepwise`: on CUDA, no persistent kernel.
    """
    allow_tf32 = input.is_cuda and input.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    input, h0, c0 = input.contiguous(), _contiguous(h0), _contiguous(c0)
    weights = [w.contiguous() for w in weights]
    if needs_gradients(input, h0, c0, *weights):
        output, hn, cn, states, _ = apply_function(
            RecurrenceFunction, cell, has_bias, layout, cell_states, allow_tf32, stepwise, input, sizes, h0, c0,
            *weights,
        )  # fmt: skip
    else:
        output, hn, cn, states, _ = torch.ops.seqattn.recurrence_fwd.default(
            _NUMBER[cell], input, sizes, layout, h0, c0, weights, packed, has_bias, False, cell_states, allow_tf32,
            stepwise,
        )  # fmt: skip
    if cell != "lstm":
        return output, hn, None, None
    return output, hn, cn, states if cell_states else None


def pack_recurrence(cell: str, weights: Sequence[Tensor], has_bias: bool, bfloat16: bool = False) -> list[Tensor]:
    """The weights of one layer's directions as the kernels read them; valid as long as the weights don't change.

    ``bfloat16``: w_ih and w_hh (float32) rounded; `recurrence` then rounds x and h likewise, and sums in float32.
    """
    weights = [w.detach().contiguous() for w in weights]
    return torch.ops.seqattn.recurrence_pack.default(_NUMBER[cell], weights, has_bias, bfloat16)


def direct_step(
    cell: str,
    save: bool,
    packed: Sequence[Tensor] | None,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, ...] | None:
    """What the operator of one step would return, past torch's dispatcher, which takes longer than a small step.

    None where that could be told, or an argument is not as the kernels take it: the operator has to be called, then.
    """
    extension = native.extension
    if extension is None or torch.compiler.is_compiling():
        return None
    own = packed[0] if packed else None
    return extension.cell_fwd(_NUMBER[cell], save, own, input, h, c, w_ih, w_hh, b_ih, b_hh)


def direct_step_backward(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    gradients: Sequence[Tensor | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor, ...] | None:
    """The same of the operator's backward."""
    extension = native.extension
    if extension is None or torch.compiler.is_compiling():
        return None
    return extension.cell_bwd(_NUMBER[cell], *needs, reserve, *gradients, input, h, c, *weights)


class CellFunction(torch.autograd.Function):
    """One step with gradients; as with sequences, the results are not saved and may be changed in place."""

    @staticmethod
    def forward(cell, has_bias, input, h, c, *weights):
        states = direct_step(cell, True, None, input, h, c, *weights)
        if states is not None:
            return states
        return tuple(torch.ops.seqattn.cell_fwd.default(_NUMBER[cell], input, h, c, weights, (), has_bias, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings = inputs[:2]
        ctx.save_for_backward(*inputs[2:], output[-1])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def backward(ctx, d_h_new, d_c_new, _=None):
        cell, has_bias = ctx.settings
        input, h, c, *weights, reserve = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if cell != "lstm":
            d_c_new = None
        if d_h_new is None and d_c_new is None:
            return (None,) * (5 + len(weights))
        if torch.is_grad_enabled():
            zeros = input.new_zeros(len(input), weights[1].shape[1])
            c_in = None if cell != "lstm" else zeros if c is None else c
            outputs = reference.recurrence.cell_step(cell, input, zeros if h is None else h, c_in, weights, has_bias)
            inputs = input, h, c, *weights
            return None, None, *_differentiable_gradients(outputs, inputs, needs[2:], (d_h_new, d_c_new))
        need_weights = any(needs[5:])
        found = direct_step_backward(cell, input, h, c, weights, reserve, (d_h_new, d_c_new), (needs[2], need_weights))
        if found is None:
            found = torch.ops.seqattn.cell_bwd.default(
                _NUMBER[cell], input, h, c, weights, has_bias, reserve, d_h_new, d_c_new, needs[2], need_weights
            )
        gradients = iter(found)
        return (
            None,
            None,
            next(gradients) if needs[2] else None,
            None if h is None else next(gradients),
            None if c is None else next(gradients),
            *(gradients if need_weights else (None,) * len(weights)),
        )


def cell_step(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    has_bias: bool,
    packed: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """One step: input [B, I], h, c [B, H] or None -> h' and, of a cell that has one, c'."""
    if needs_gradients(input, h, c, *weights):
        return apply_function(CellFunction, cell, has_bias, input, h, c, *weights)[:-1]
    return tuple(torch.ops.seqattn.cell_fwd.default(_NUMBER[cell], input, h, c, weights, packed, has_bias, False))
