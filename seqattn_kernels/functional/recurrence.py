"""RNN, GRU and LSTM over whole sequences, as functions of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from seqattn_kernels import backends, ops, reference
from seqattn_kernels.reference.recurrence import BATCH_FIRST, GATES, PACKED, TIME_MAJOR

Weights = Sequence[Tensor]
PackedWeights = Sequence[Sequence[Tensor]]  # for each layer, what ops.pack_recurrence made


def lstm(
    input: Tensor | PackedSequence,
    hx: Sequence[Tensor] | None,
    weights: Weights,
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    return_all_states: bool = False,
    packed_weights: PackedWeights | None = None,
    backend: str | None = None,
) -> Any:
    """Long short-term memory (Hochreiter and Schmidhuber, 1997) over whole sequences, as ``torch.nn.LSTM`` defines it.

    Args:
        input: [T, B, I]; [B, T, I] with ``batch_first``; [T, I] for one sequence; or a ``PackedSequence``.
        hx: None for zeros, or (h_0 [L * D, B, P or H], c_0 [L * D, B, H]) with D directions; without B when unbatched.
        weights: of each layer and direction w_ih [4H, I], w_hh [4H, P or H], b_ih [4H], b_hh [4H], w_hr [P, H], in the
            order of torch.nn, absent ones left out. Gates in the order i, f, g, o.
        dropout: probability of zeroing an output between layers when ``training``.
        lengths: integer tensor [B] on any device, in any order, zeros allowed: steps past a sequence's length give zero
            outputs, and its final states are those of its last step (h_0, c_0 where the length is 0).
        return_all_states: also return the last layer's cell state of every step.
        packed_weights: what ``pack_weights`` made of these very weights. Inference only; the caller vouches that the
            weights have not changed since.
        backend: "cpu", "cuda", "cuda_stepwise", "torch" or "reference"; None chooses.

    Returns:
        output [T, B, D * (P or H)] (laid out as the input), (h_n [L * D, B, P or H], c_n [L * D, B, H]), and with
        ``return_all_states`` the cell states [T, B, D * H]. float32 and float64 compute in their own precision
        (on a GPU, products of float32 in tf32 where ``torch.backends.cudnn.allow_tf32``), bfloat16 and float16 in
        float32; on a GPU only products are of the dtype, rounded as h is, while sums and c are float32.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or type; the message names it.
        RuntimeError: ``backend`` was asked for by name and can't serve.
    """
    return _run(
        "lstm", input, hx, weights, num_layers, bias, batch_first, dropout, training, bidirectional, proj_size, lengths,
        return_all_states, packed_weights, backend,
    )  # fmt: skip


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Weights,
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    return_all_states: bool = False,
    packed_weights: PackedWeights | None = None,
    backend: str | None = None,
) -> Any:
    """Gated recurrent unit (Cho et al., 2014) over whole sequences, as ``torch.nn.GRU`` defines it.

    Arguments as for `lstm`; ``hx`` is h_0 [L * D, B, H] or None, weights hold gates in the order r, z, n.

    Returns:
        output [T, B, D * H], h_n [L * D, B, H], and with ``return_all_states`` the states of the last layer at every
        step, which are its output.
    """
    return _run(
        "gru", input, hx, weights, num_layers, bias, batch_first, dropout, training, bidirectional, 0, lengths,
        return_all_states, packed_weights, backend,
    )  # fmt: skip


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Weights,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    return_all_states: bool = False,
    packed_weights: PackedWeights | None = None,
    backend: str | None = None,
) -> Any:
    """Elman's network (1990) over whole sequences, as ``torch.nn.RNN`` defines it; ``nonlinearity`` "tanh" or "relu".

    Arguments and results as for `gru`.
    """
    return _run(
        _rnn_cell_name(nonlinearity), input, hx, weights, num_layers, bias, batch_first, dropout, training,
        bidirectional, 0, lengths, return_all_states, packed_weights, backend,
    )  # fmt: skip


def pack_weights(
    cell: str,
    weights: Weights,
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    dtype: torch.dtype | None = None,
) -> PackedWeights | None:
    """What the native kernels make of the weights before they can run, to be made once and passed to every call.

    cell: "lstm", "gru", "rnn_tanh" or "rnn_relu". None where no native kernel would use it. The result goes stale with
    any change of the weights, which nothing detects here: `seqattn_kernels.frozen` does.

    dtype: None, or torch.bfloat16 to round float32 weights w_ih and w_hh to it. What they are multiplied with, the
    input and the last step's h, is then rounded as well (to nearest even); sums, gates, states, biases, w_hr and
    results stay float32. For whole sequences without gradients; a single step takes none of these.

    Raises:
        ValueError: ``dtype`` is another one, or bfloat16 with weights that are not float32.
    """
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype: expected None or torch.bfloat16, got {dtype}")
    if dtype is not None and any(w.dtype != torch.float32 for w in weights):
        found = next(w.dtype for w in weights if w.dtype != torch.float32)
        raise ValueError(f"weights: expected torch.float32 to round to bfloat16, got {found}")
    request = backends.Request(cell, weights[0].device, weights[0].dtype, 1, 1, 1, False)
    if backends.choose(backends.RECURRENCE, request) != "cpu":
        return None
    per_layer = len(weights) // num_layers
    return [
        ops.recurrence.pack_recurrence(
            cell, [_widen(w) for w in weights[i * per_layer : (i + 1) * per_layer]], bias, dtype is not None
        )
        for i in range(num_layers)
    ]


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"


def _widen(t: Any) -> Any:
    """float16 and bfloat16 as float32, what the native kernels compute in."""
    return t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t


def _cast(t: Any, dtype: torch.dtype) -> Any:
    """As autocast casts: float64 and integers stay."""
    return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def _check_lengths(lengths: Any, batch: int, steps: int) -> Tensor:
    _check_tensor("lengths", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer tensor, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected [B] with B={batch} (from input), got {list(lengths.shape)}")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
        least, most = lengths.min().item(), lengths.max().item()
        if least < 0 or most > steps:
            raise ValueError(f"lengths: expected values from 0 to {steps} (steps of input), got {least} to {most}")
    return lengths


class _Layout:
    """How the data lie, and what is needed to hand results back the way the input came."""

    def __init__(self, input: Any, batch_first: bool, lengths: Any) -> None:
        self.packed = isinstance(input, PackedSequence)
        self.unbatched = False
        self.sizes: Tensor | None = None
        self.kind = PACKED if self.packed else BATCH_FIRST if batch_first else TIME_MAJOR
        if self.packed:
            if lengths is not None:
                raise ValueError("lengths: expected None beside a PackedSequence, which has its own, got a tensor")
            self.data, self.sizes, self.sorted_indices, self.unsorted_indices = input
            if self.data.dim() != 2:
                raise ValueError(f"input: expected packed rows [N, I], got {list(self.data.shape)}")
            self.batch = int(self.sizes[0]) if len(self.sizes) else 0
            return
        _check_tensor("input", input)
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected 2 or 3 dimensions, got {list(input.shape)}")
        self.unbatched = input.dim() == 2
        self.data = input.unsqueeze(0 if batch_first else 1) if self.unbatched else input
        batch, steps = self.data.shape[:2] if batch_first else self.data.shape[1::-1]
        self.batch = batch
        if lengths is not None:
            if self.unbatched:
                raise ValueError("lengths: expected None with one unbatched sequence, got a tensor")
            self.sizes = _check_lengths(lengths, batch, steps)

    def states_in(self, name: str, state: Any, layers: int, size: int) -> Tensor | None:
        """An initial state as [layers, batch, size], in the order the data are in."""
        if state is None:
            return None
        _check_tensor(name, state)
        if self.unbatched:
            if state.dim() != 2:
                raise ValueError(f"{name}: expected [{layers}, {size}] with unbatched input, got {list(state.shape)}")
            state = state.unsqueeze(1)
        if state.shape != (layers, self.batch, size):
            raise ValueError(f"{name}: expected [{layers}, {self.batch}, {size}], got {list(state.shape)}")
        if state.dtype != self.data.dtype or state.device != self.data.device:
            raise ValueError(
                f"{name}: expected {self.data.dtype} on {self.data.device} (from input), got {state.dtype} on "
                f"{state.device}"
            )
        if self.packed and self.sorted_indices is not None:
            return state.index_select(1, self.sorted_indices)
        return state

    def rows_out(self, rows: Tensor) -> Any:
        if self.packed:
            return PackedSequence(rows, self.sizes, self.sorted_indices, self.unsorted_indices)
        return rows.squeeze(0 if self.kind == BATCH_FIRST else 1) if self.unbatched else rows

    def states_out(self, state: Tensor) -> Tensor:
        if self.packed and self.unsorted_indices is not None:
            return state.index_select(1, self.unsorted_indices)
        return state.squeeze(1) if self.unbatched else state


def _check_weights(
    cell: str, weights: Weights, num_layers: int, bias: bool, proj_size: int, data: Tensor, autocast: bool
) -> None:
    count = len(weights)
    directions = count // num_layers // (2 + 2 * bool(bias) + bool(proj_size)) if num_layers > 0 else 0
    if count != num_layers * directions * (2 + 2 * bool(bias) + bool(proj_size)):
        raise ValueError(f"weights: expected {num_layers} layers of full directions, got {count} tensors")
    first = weights[0]
    if data.shape[-1] != first.shape[-1]:
        raise ValueError(f"input: expected last dimension {first.shape[-1]} (from weights), got {list(data.shape)}")
    if data.dtype != first.dtype and not autocast:
        raise ValueError(f"input: expected {first.dtype} (from weights), got {data.dtype}")
    if data.device != first.device:
        raise ValueError(f"input: expected device {first.device} (from weights), got {data.device}")


def _run(
    cell: str,
    input: Any,
    hx: Any,
    weights: Weights,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    proj_size: int,
    lengths: Tensor | None,
    return_all_states: bool,
    packed_weights: PackedWeights | None,
    backend: str | None,
) -> Any:
    layout = _Layout(input, batch_first, lengths)
    data = layout.data
    dtype = data.dtype
    on_cuda = data.is_cuda
    cast_to: torch.dtype | None = None
    if _autocasts(data):
        # Autocast runs cuDNN's function in float16, whatever dtype it was asked for. On a CPU all is computed in
        # float32, which is more than torch does; the dtype of the results follows torch.
        by_cudnn = on_cuda and torch.backends.cudnn.enabled
        dtype = torch.float16 if by_cudnn else torch.get_autocast_dtype(data.device.type)
        cast_to = dtype if on_cuda else torch.float32
        if cell == "gru" and not on_cuda:
            dtype = hx.dtype if isinstance(hx, Tensor) else data.dtype
    directions = 2 if bidirectional else 1
    hidden = weights[0].shape[0] // GATES[cell]
    extras = (
        "lengths=" if lengths is not None else "return_all_states=" if return_all_states and cell == "lstm" else None
    )
    if on_cuda and extras is None and torch._C._functorch.maybe_current_level() is not None:
        extras = "transform of torch.func"  # cuDNN looks for the memory of its arguments
    rows = data.shape[0] if layout.packed else data.shape[0] * data.shape[1]
    training_step = torch.is_grad_enabled() and (data.requires_grad or any(w.requires_grad for w in weights))
    request = backends.Request(
        cell,
        data.device,
        cast_to or data.dtype,
        rows,
        layout.batch,
        hidden,
        training_step,
        extras,
        directions,
        bool(proj_size),
        layout.packed,
        training_step and not training,
    )
    name = backends.choose(backends.RECURRENCE, request, backend)
    if cast_to is not None:
        data = layout.data = _cast(data, cast_to)
        if not (on_cuda and name == "torch"):  # which casts them for itself, into one piece of memory
            weights = [_cast(w, cast_to) for w in weights]
        if hx is not None:
            hx = _cast(hx, cast_to) if isinstance(hx, Tensor) else [_cast(h, cast_to) for h in hx]
    _check_weights(cell, weights, num_layers, bias, proj_size, data, cast_to is not None)
    h0 = c0 = None
    if hx is not None:
        if cell == "lstm":
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                raise TypeError(f"hx: expected (h_0, c_0), got {type(hx).__name__}")
            h0 = layout.states_in("h_0", hx[0], num_layers * directions, proj_size or hidden)
            c0 = layout.states_in("c_0", hx[1], num_layers * directions, hidden)
        else:
            h0 = layout.states_in("hx", hx, num_layers * directions, hidden)
    if packed_weights is not None and training_step and any(w.requires_grad for w in weights):
        raise RuntimeError("packed_weights: expected None while gradients of the weights are recorded")
    if name == "torch":
        return _run_torch(
            cell, layout, data, h0, c0, weights, num_layers, bias, dropout, training, bidirectional, return_all_states
        )

    native_kernels = name in ("cpu", "cuda", "cuda_stepwise")
    if name == "cpu":
        data, h0, c0, weights = _widen(data), _widen(h0), _widen(c0), [_widen(w) for w in weights]
    sizes = layout.sizes
    if sizes is not None and native_kernels:
        sizes = sizes.to("cpu" if name == "cpu" else sizes.device, torch.int64)
    if sizes is not None and not sizes.is_contiguous():
        sizes = sizes.contiguous()

    per_layer = len(weights) // num_layers
    finals: list[Tensor] = []
    final_cells: list[Any] = []
    states = None
    kind = layout.kind
    dropping = training and dropout > 0 and num_layers > 1
    if dropping and kind == BATCH_FIRST:
        # torch draws its masks over time-major outputs; the same seed must give the same numbers.
        data, kind = data.transpose(0, 1), TIME_MAJOR
    for layer in range(num_layers):
        own = weights[layer * per_layer : (layer + 1) * per_layer]
        h = None if h0 is None else h0[layer * directions : (layer + 1) * directions]
        c = None if c0 is None else c0[layer * directions : (layer + 1) * directions]
        if native_kernels:
            packed = packed_weights[layer] if packed_weights is not None else ()
            last = return_all_states and layer == num_layers - 1
            data, h_n, c_n, states = ops.recurrence.recurrence(
                cell, data, sizes, kind, h, c, own, bias, last, packed, name == "cuda_stepwise"
            )
        else:
            data, h_n, c_n, states = reference.recurrence.recurrence(cell, data, sizes, kind, h, c, own, bias)
        finals.append(h_n)
        final_cells.append(c_n)
        if dropping and layer < num_layers - 1:
            data = drop(data, dropout, True)
    if kind != layout.kind:
        data = data.transpose(0, 1)
        states = None if states is None else states.transpose(0, 1)

    output = layout.rows_out(data.to(dtype))
    h_n = layout.states_out(_stack(finals).to(dtype))
    if cell != "lstm":
        return (output, h_n, output) if return_all_states else (output, h_n)
    result = (h_n, layout.states_out(_stack(final_cells).to(dtype)))
    if not return_all_states:
        return output, result
    assert states is not None
    return output, result, layout.rows_out(states.to(dtype))


def _stack(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)


def _autocasts(data: Tensor) -> bool:
    """Whether torch's own function would run under autocast."""
    if not torch._C._is_any_autocast_enabled() or not data.is_floating_point():
        return False
    return torch.is_autocast_enabled(data.device.type) and data.dtype != torch.float64


def _run_torch(
    cell: str,
    layout: _Layout,
    data: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    num_layers: int,
    bias: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    return_all_states: bool,
) -> Any:
    """torch's own function: cuDNN on a GPU, oneDNN or plain operators on a CPU."""
    directions = 2 if bidirectional else 1
    if h0 is None:
        output_size = weights[1].shape[1]
        h0 = data.new_zeros(num_layers * directions, layout.batch, output_size)
    hx: Any = h0
    if cell == "lstm":
        hidden = weights[0].shape[0] // GATES[cell]
        hx = (h0, c0 if c0 is not None else data.new_zeros(num_layers * directions, layout.batch, hidden))
    if data.is_cuda:
        # cuDNN gathers the weights through views, and has a backward in training mode alone, which without dropout
        # computes the same.
        weights = [w.contiguous() for w in weights]
        if not training and torch.is_grad_enabled() and any(t.requires_grad for t in (data, hx[0], *weights)):
            training, dropout = True, 0.0
    call = getattr(torch._VF, cell)
    settings = (list(weights), bool(bias), num_layers, float(dropout), training, bidirectional)
    if layout.packed:
        output, *states = call(data, layout.sizes, hx, *settings)
    else:
        output, *states = call(data, hx, *settings, layout.kind == BATCH_FIRST)
    output = layout.rows_out(output)
    states = [layout.states_out(s) for s in states]
    if cell == "lstm":
        return output, tuple(states)
    return (output, states[0], output) if return_all_states else (output, states[0])
