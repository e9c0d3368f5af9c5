"""RNN, GRU and LSTM for one step, as functions of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqattn_kernels import backends, native, ops, reference
from seqattn_kernels.functional.recurrence import _autocasts, _cast, _check_tensor, _rnn_cell_name, _widen
from seqattn_kernels.ops.autograd import forward_mode
from seqattn_kernels.reference.recurrence import GATES


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed_weights: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`, as ``torch.nn.LSTMCell`` defines it.

    input: [B, I] or [I]; hx: (h, c), each [B, H] or [H], or None for zeros; w_ih [4H, I], w_hh [4H, H], b_* [4H].
    packed_weights, backend: as in `lstm`. Returns (h, c). Raises as `lstm` does.
    """
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise TypeError(f"hx: expected (h, c), got {type(hx).__name__}")
    h, c = (None, None) if hx is None else hx
    h_new, c_new = _run("lstm", input, h, c, w_ih, w_hh, b_ih, b_hh, packed_weights, backend)
    return h_new, c_new


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed_weights: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of `gru`, as ``torch.nn.GRUCell`` defines it; arguments as for `lstm_cell`, ``hx`` is h. Returns h."""
    return _run("gru", input, hx, None, w_ih, w_hh, b_ih, b_hh, packed_weights, backend)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    packed_weights: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of `rnn`, as ``torch.nn.RNNCell`` defines it; arguments as for `gru_cell`. Returns h."""
    return _run(_rnn_cell_name(nonlinearity), input, hx, None, w_ih, w_hh, b_ih, b_hh, packed_weights, backend)[0]


def _run(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    packed_weights: Sequence[Tensor] | None,
    backend: str | None,
) -> Sequence[Tensor]:
    """The next h and, of a cell that has one, c."""
    chosen_here = backend is None and not forward_mode()
    if chosen_here:
        states = ops.recurrence.direct_step(cell, False, packed_weights, input, h, c, w_ih, w_hh, b_ih, b_hh)
        if states is not None:
            return states
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih, b_hh: expected both or neither, got one")
    if chosen_here and _is_plain(input):
        # A step is a few microseconds: the operator's own checks serve here, and Python's only say it better.
        weights = (w_ih, w_hh) if b_ih is None or b_hh is None else (w_ih, w_hh, b_ih, b_hh)
        try:
            if not input.is_cpu:
                return _torch_step(cell, input, h, c, weights)
            return ops.recurrence.cell_step(cell, input, h, c, weights, b_ih is not None, packed_weights or ())
        except (RuntimeError, TypeError, AttributeError):
            _check(input, h, c, list(weights), GATES[cell])
            raise
    return _run_checked(cell, input, h, c, w_ih, w_hh, b_ih, b_hh, packed_weights, backend)


def _is_plain(input: Any) -> bool:
    """What needs no more than one operator: ours on a CPU; on a GPU torch's, which is one kernel after two products."""
    return (
        native.extension is not None
        and isinstance(input, Tensor)
        and input.dim() == 2
        and (input.is_cuda or (input.is_cpu and input.dtype in (torch.float32, torch.float64)))
        and not torch._C._is_any_autocast_enabled()
    )


def _torch_step(cell: str, x: Tensor, h: Any, c: Any, weights: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """torch's own step; x [B, I]."""
    if h is None or (c is None and cell == "lstm"):
        zeros = x.new_zeros(x.shape[0], weights[1].shape[1])
        h, c = zeros if h is None else h, zeros if c is None else c
    result = getattr(torch._VF, f"{cell}_cell")(x, (h, c) if cell == "lstm" else h, *weights)
    return result if cell == "lstm" else (result, None)


def _check(input: Any, h: Any, c: Any, weights: Sequence[Tensor], gates: int) -> None:
    """Raise what is wrong with the arguments of a step, if anything is."""
    _check_tensor("input", input)
    if input.dim() not in (1, 2):
        raise ValueError(f"input: expected [B, I] or [I], got {list(input.shape)}")
    first = weights[0]
    if input.shape[-1] != first.shape[1]:
        raise ValueError(f"input: expected last dimension {first.shape[1]} (from w_ih), got {list(input.shape)}")
    if input.dtype != first.dtype or input.device != first.device:
        raise ValueError(
            f"input: expected {first.dtype} on {first.device} (from w_ih), got {input.dtype} on {input.device}"
        )
    expected = (*input.shape[:-1], first.shape[0] // gates)
    for name, state in (("h", h), ("c", c)):
        if state is None:
            continue
        _check_tensor(name, state)
        if state.shape != expected:
            raise ValueError(
                f"{name}: expected {list(expected)} (B from input, H from weights), got {list(state.shape)}"
            )
        if state.dtype != input.dtype or state.device != input.device:
            raise ValueError(
                f"{name}: expected {input.dtype} on {input.device} (from input), got {state.dtype} on {state.device}"
            )


def _run_checked(
    cell: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    packed_weights: Sequence[Tensor] | None,
    backend: str | None,
) -> tuple[Tensor, Any]:
    _check_tensor("input", input)
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    dtype = input.dtype
    training = torch.is_grad_enabled() and (input.requires_grad or any(w.requires_grad for w in weights))
    hidden, batch = w_ih.shape[0] // GATES[cell], input.shape[0] if input.dim() == 2 else 1
    request = backends.Request(cell, input.device, dtype, batch, batch, hidden, training, sequence=False)
    name = backends.choose(backends.RECURRENCE, request, backend)
    if _autocasts(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        # On a CPU all is computed in float32, which is more than torch does; the dtype of the results follows torch.
        cast_to = dtype if input.is_cuda else torch.float32
        if not (input.is_cuda or cell.startswith("rnn")):
            dtype = (input if h is None else h).dtype
        input, h, c = (_cast(t, cast_to) for t in (input, h, c))
        weights = [_cast(w, cast_to) for w in weights]
    _check(input, h, c, weights, GATES[cell])
    x = input
    if input.dim() == 1:
        x, h, c = x.unsqueeze(0), None if h is None else h.unsqueeze(0), None if c is None else c.unsqueeze(0)

    if packed_weights is not None and training and any(w.requires_grad for w in weights):
        raise RuntimeError("packed_weights: expected None while gradients of the weights are recorded")
    if name in ("cpu", "cuda", "cuda_stepwise"):
        if name == "cpu" and x.dtype not in (torch.float32, torch.float64):
            x, h, c, weights = _widen(x), _widen(h), _widen(c), [_widen(w) for w in weights]
        states = ops.recurrence.cell_step(cell, x, h, c, weights, len(weights) == 4, packed_weights or ())
        h_new, c_new = states if cell == "lstm" else (states[0], None)
    elif name == "torch":
        h_new, c_new = _torch_step(cell, x, h, c, weights)
    else:
        zeros = x.new_zeros(x.shape[0], hidden)
        c_in = None if cell != "lstm" else zeros if c is None else c
        h_new, c_new = reference.recurrence.cell_step(
            cell, x, zeros if h is None else h, c_in, weights, len(weights) == 4
        )
    if input.dim() == 1:
        h_new, c_new = h_new.squeeze(0), None if c_new is None else c_new.squeeze(0)
    if h_new.dtype != dtype:
        h_new, c_new = h_new.to(dtype), None if c_new is None else c_new.to(dtype)
    return h_new, c_new
