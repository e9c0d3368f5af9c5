"""What the recurrent operators mean: plain torch, forward only, differentiated by autograd.

Every function works on one layer and takes its weights in torch.nn's layout and gate order. They are written to be
read, and serve as the fallback, the oracle of the tests and the derivative of second order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

TIME_MAJOR, BATCH_FIRST, PACKED = 0, 1, 2

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w_ih, w_hh, b_ih, b_hh of one direction


def rnn_tanh(x: Tensor, h: Tensor, c: Any, weights: Weights) -> tuple[Tensor, None]:
    w_ih, w_hh, b_ih, b_hh = weights
    return torch.tanh(linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)), None


def rnn_relu(x: Tensor, h: Tensor, c: Any, weights: Weights) -> tuple[Tensor, None]:
    w_ih, w_hh, b_ih, b_hh = weights
    return torch.relu(linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)), None


def gru(x: Tensor, h: Tensor, c: Any, weights: Weights) -> tuple[Tensor, None]:
    w_ih, w_hh, b_ih, b_hh = weights
    x_r, x_z, x_n = linear(x, w_ih, b_ih).chunk(3, -1)
    h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, -1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return n + z * (h - n), None


def lstm(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = weights
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


Cell = Callable[[Tensor, Tensor, Any, Weights], tuple[Tensor, Tensor | None]]
CELLS: dict[str, Cell] = {"rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu, "gru": gru, "lstm": lstm}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def cell_step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Sequence[Tensor], has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """One step. x: [B, I]; h: [B, H or projection]; c: [B, H] or None; weights of one direction. -> h', c'."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = (rest[0], rest[1]) if has_bias else (None, None)
    w_hr = rest[-1] if len(rest) == (3 if has_bias else 1) else None
    h_new, c_new = CELLS[cell](x, h, c, (w_ih, w_hh, b_ih, b_hh))
    return (h_new if w_hr is None else linear(h_new, w_hr)), c_new


def _unpack(rows: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, I] of a packed sequence -> padded [T, B, I], lengths [B], places of the rows in the padded one."""
    steps, batch = len(batch_sizes), int(batch_sizes[0]) if len(batch_sizes) else 0
    active = torch.arange(batch)[None, :] < batch_sizes[:, None]
    places = active.reshape(-1).nonzero().squeeze(1).to(rows.device)
    padded = rows.new_zeros(steps * batch, rows.shape[-1]).index_copy(0, places, rows)
    return padded.view(steps, batch, rows.shape[-1]), active.sum(0).to(rows.device), places


def recurrence(
    cell: str,
    input: Tensor,
    sizes: Tensor | None,
    layout: int,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, all directions and steps.

    input: [T, B, I], [B, T, I] or packed rows [N, I], by `layout`; sizes: lengths [B] (None: full) or batch sizes [T].
    h0, c0: [D, B, H] or None for zeros; weights: D times (w_ih, w_hh, b_ih, b_hh, w_hr), absent ones left out.
    -> output [..., D * H], h_n, c_n, cell states [..., D * H] (both None without a cell state).
    """
    lengths, places = sizes, None
    x = input.transpose(0, 1) if layout == BATCH_FIRST else input
    if layout == PACKED:
        assert sizes is not None
        x, lengths, places = _unpack(input, sizes)
    steps, batch = x.shape[:2]
    if lengths is not None:
        lengths = lengths.to(x.device)
    hidden = weights[1].shape[0] // GATES[cell]
    projected = weights[1].shape[1] != hidden
    per_direction = 2 + 2 * has_bias + projected
    outputs, finals, cells, final_cells = [], [], [], []
    for d in range(len(weights) // per_direction):
        own = weights[d * per_direction : (d + 1) * per_direction]
        h = x.new_zeros(batch, own[1].shape[1]) if h0 is None else h0[d]
        c = None if cell != "lstm" else x.new_zeros(batch, hidden) if c0 is None else c0[d]
        out: list[Tensor] = [h] * steps
        states: list[Tensor] = [h] * steps
        for t in reversed(range(steps)) if d else range(steps):
            h_new, c_new = cell_step(cell, x[t], h, c, own, has_bias)
            if lengths is None:
                out[t], h, c = h_new, h_new, c_new
            else:
                valid = (lengths > t)[:, None]
                h = torch.where(valid, h_new, h)
                out[t] = torch.where(valid, h_new, torch.zeros_like(h_new))
                c = None if c is None or c_new is None else torch.where(valid, c_new, c)
            if c is not None:
                states[t] = c if lengths is None else torch.where(valid, c, torch.zeros_like(c))
        outputs.append(torch.stack(out) if steps else x.new_zeros(0, batch, h.shape[-1]))
        finals.append(h)
        if c is not None:
            cells.append(torch.stack(states) if steps else x.new_zeros(0, batch, hidden))
            final_cells.append(c)

    def lay_out(values: list[Tensor]) -> Tensor:
        padded = torch.cat(values, -1)
        if places is not None:
            return padded.reshape(steps * batch, -1).index_select(0, places)
        return padded.transpose(0, 1) if layout == BATCH_FIRST else padded

    c_n = torch.stack(final_cells) if cells else None
    return lay_out(outputs), torch.stack(finals), c_n, lay_out(cells) if cells else None
