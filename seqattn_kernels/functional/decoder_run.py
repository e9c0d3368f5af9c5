"""Running a decoder: its memory and first state, and which backend takes its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqattn_kernels import backends, native, ops, reference
from seqattn_kernels.functional.attention import PreparedKeys, prepare_keys
from seqattn_kernels.functional.decoder_loop import (
    Decoder,
    DecoderMemory,
    DecoderState,
    Feed,
    describe,
    run_steps,
    step,
)
from seqattn_kernels.functional.masks import resolve
from seqattn_kernels.ops.autograd import forward_mode
from seqattn_kernels.reference.attention import attended, without_unattended

_WIDE = (torch.float32, torch.float64)


class DecoderOutput(NamedTuple):
    """output [B, T, M] (attentional vectors) or [B, T, H] (h of the last layer), the state after the last step, weights
    [B, T, S], contexts [B, T, D]."""

    output: Tensor
    state: DecoderState
    weights: Tensor
    contexts: Tensor


def make_memory(
    decoder: Decoder,
    keys: Tensor | PreparedKeys,
    values: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    fertility: Tensor | None = None,
) -> DecoderMemory:
    """Checked keys, values and masks; keys of additive scores prepared where that serves later steps."""
    plain = keys.keys if isinstance(keys, PreparedKeys) else keys
    if not isinstance(plain, Tensor) or plain.dim() != 3:
        raise ValueError(f"keys: expected [B, S, A], got {describe(plain)}")
    if values.dim() != 3 or values.shape[:2] != plain.shape[:2]:
        raise ValueError(
            f"values: expected [B, S, D] with B={plain.shape[0]}, S={plain.shape[1]} (from keys), "
            f"got {list(values.shape)}"
        )
    width = decoder.hidden_size if decoder.w_query is None else decoder.w_query.shape[0]
    if decoder.attend is None and plain.shape[2] != width:
        raise ValueError(f"keys: expected [B, S, A] with A={width} (from the query), got {list(plain.shape)}")
    if fertility is not None and (not decoder.spec.knows_sum or fertility.shape != plain.shape[:2]):
        expected = f"[B, S] = {list(plain.shape[:2])}" if decoder.spec.knows_sum else "None without a sum of weights"
        raise ValueError(f"fertility: expected {expected}, got {list(fertility.shape)}")
    if lengths is not None or mask is not None:
        if mask is not None and mask.dim() == 3 and mask.shape[1] == 1:
            mask = mask.squeeze(1)
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"mask: expected [B, S] with B={plain.shape[0]}, S={plain.shape[1]}, got {list(mask.shape)}"
            )
        lengths, mask = resolve(plain.shape[0], None, plain.shape[1], values.device, lengths, mask)
        lengths = None if lengths is None else lengths.contiguous()
    if mask is not None:
        # Once for all steps: what stands where nobody attends must not spread (0 * NaN is NaN).
        attend = attended(plain, lengths, mask)
        values = without_unattended(values, attend)
        if isinstance(keys, Tensor):
            keys = without_unattended(keys, attend)
    return DecoderMemory(keys, values, lengths, mask, fertility)


def begin(
    decoder: Decoder, memory: DecoderMemory, given: Tensor | Sequence[Tensor] | None = None, history: Any = None
) -> DecoderState:
    """The state before the first step; given: None for zeros, h_0 [B, H] or [L, B, H], or (h_0, c_0)."""
    values = memory.values
    batch, layers = values.shape[0], len(decoder.layers)
    shape = (layers, batch, decoder.hidden_size)
    has_cell = decoder.spec.cell == "lstm"
    pair: Sequence[Any] = given if isinstance(given, (tuple, list)) else (given, None)
    if len(pair) != 2 or (has_cell and given is not None and not isinstance(given, (tuple, list))):
        raise TypeError(f"state: expected (h_0, c_0), got {describe(given)}")
    if not has_cell and pair[1] is not None:
        raise TypeError("state: expected h_0 alone, got (h_0, c_0)")

    def state_of(name: str, t: Any) -> Tensor:
        if t is None:
            return values.new_zeros(shape)
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {describe(t)}")
        if t.dim() == 2 and layers == 1:
            t = t.unsqueeze(0)
        if t.shape != shape:
            raise ValueError(f"{name}: expected [L, B, H] = {list(shape)}, got {list(t.shape)}")
        return t

    spec = decoder.spec
    if spec.history != "none" and history is None:
        history = values.new_zeros(batch, 2 if spec.history == "both" else 1, values.shape[1])
    return DecoderState(
        state_of("h_0", pair[0]),
        state_of("c_0", pair[1]) if has_cell else None,
        values.new_zeros(batch, values.shape[2]),
        None if decoder.w_output is None else values.new_zeros(batch, decoder.w_output.shape[0]),
        memory,
        None,
        history,
    )


def why_not(decoder: Decoder, input: Tensor, state: DecoderState, *, sampling: bool = False) -> str | None:
    """None where the native operator can run all steps, else why it can't and the steps are composed."""
    name = "cuda" if input.is_cuda else "cpu"
    (backend,) = (b for b in backends.DECODER if b.name == name)
    return backend.why_not(_request(decoder, input, state, sampling))


def _request(decoder: Decoder, input: Tensor, state: DecoderState, sampling: bool) -> backends.DecoderRequest:
    mask = state.memory.mask
    beyond_reference = {
        "scores by a module of one's own": decoder.attend is not None,
        "dropout": bool(decoder.dropout or decoder.hidden_dropout or decoder.output_dropout),
        "zoneout": bool(decoder.zoneout),
        "inputs that depend on outputs": sampling,
    }
    beyond_native = {
        "a mask that is added to the scores": mask is not None and mask.dtype != torch.bool,
        "sequences without a step": input.shape[1] == 0,
        f"more than {ops.decoder.MAX_LAYERS} layers": len(decoder.layers) > ops.decoder.MAX_LAYERS,
    }
    composed = next((reason for reason, holds in beyond_reference.items() if holds), None)
    unserved = composed or next((reason for reason, holds in beyond_native.items() if holds), None)
    cuda_unserved = None
    if input.device.type == "cuda" and unserved is None:
        cuda_unserved = ops.decoder_cuda.why_not(decoder.spec, _tensors(decoder, input, state), decoder.weights)
    return backends.DecoderRequest(input.device, input.dtype, unserved, composed, cuda_unserved)


def run_decoder(
    decoder: Decoder,
    input: Tensor,
    state: DecoderState,
    *,
    feed: Feed | None = None,
    teacher: Tensor | None = None,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> DecoderOutput:
    """All steps of input [B, T, I] from a state, by the backend that serves.

    packed: what `pack_weights` made of the decoder, whose weights are as they were then.
    """
    state = state.own_memory()
    _check_input(decoder, input, state)
    if (feed is None) != (teacher is None):
        raise ValueError("feed, teacher: expected both or neither, got one")
    name = backends.choose(backends.DECODER, _request(decoder, input, state, feed is not None), backend)
    if name == "composed":
        return DecoderOutput(*run_steps(decoder, input, state, feed=feed, teacher=teacher))
    if isinstance(state.memory.keys, PreparedKeys) and torch.is_grad_enabled():
        state.memory.keys.check_unchanged()
    dtype = input.dtype
    if name == "cpu" and dtype in _WIDE:
        found: Any = _native(decoder, input, state, packed)
    elif name == "cuda":
        return _finish(
            decoder,
            state,
            *ops.decoder_cuda.attention_decoder(decoder.spec, _tensors(decoder, input, state), decoder.weights),
        )
    else:
        t, weights = _tensors(decoder, input, state), decoder.weights
        if dtype not in _WIDE:
            t = ops.decoder.Tensors(*(_widen(x) for x in t))  # type: ignore[arg-type]
            weights = [w.float() for w in weights]
        if name == "cpu":
            found = ops.decoder.attention_decoder(decoder.spec, t, weights)
        else:
            found = reference.decoder.attention_decoder(decoder.spec, *t[:9], weights, *t[9:])
    results: Any = found if dtype in _WIDE else [t if t is None else t.to(dtype) for t in found]
    return _finish(decoder, state, *results)


def _finish(
    decoder: Decoder,
    state: DecoderState,
    hidden: Tensor,
    c_n: Tensor | None,
    contexts: Tensor,
    attention: Tensor,
    attentional: Any,
) -> DecoderOutput:
    end = DecoderState(
        hidden[:, :, -1],
        c_n,
        contexts[:, -1],
        None if attentional is None else attentional[:, -1],
        state.memory,
        None,
        _history_after(decoder, state, attention),
        state.packed,
        state.decoder,
    )
    return DecoderOutput(hidden[-1] if attentional is None else attentional, end, attention, contexts)


def _history_after(decoder: Decoder, state: DecoderState, weights: Tensor) -> Tensor | None:
    """What the score knows after steps of weights [B, T, S]."""
    spec = decoder.spec
    if spec.history == "none":
        return None
    channels = [] if spec.history == "sum" else [weights[:, -1]]
    if spec.knows_sum:
        total = weights.sum(1) if weights.shape[1] > 1 else weights[:, 0]
        fertility = state.memory.fertility
        if fertility is not None:
            fertility = fertility if state.owners is None else fertility.index_select(0, state.owners)
            total = total / fertility
        channels.append(state.history[:, -1] + total)
    return torch.stack(channels, 1)


def pack_weights(decoder: Decoder) -> Tensor | None:
    """The weights as the native kernels read them, or None where these don't serve the decoder."""
    first = decoder.weights[0]
    wide = first.device.type == "cpu" and first.dtype in _WIDE
    if decoder.attend is not None or not wide or len(decoder.layers) > ops.decoder.MAX_LAYERS:
        return None
    if native.why_not() is not None:
        return None
    return ops.decoder.pack_decoder(
        decoder.spec.cell,
        decoder.weights,
        decoder.spec.has_bias,
        decoder.w_query,
        decoder.b_query,
        decoder.w_output,
        decoder.b_output,
        decoder.w_conv,
        decoder.w_feature,
    )


def pack(decoder: Decoder, state: DecoderState, packed: Tensor | None = None) -> DecoderState:
    """The state with keys and weights as the native kernels read them, for many steps without gradients.

    packed: what `pack_weights` made of the decoder, whose weights are as they were then; None: made here.
    """
    values = state.memory.values
    if values.device.type != "cpu" or values.dtype not in _WIDE or not values.shape[1]:
        return state
    if why_not(decoder, values[:, :1], state) is not None:
        return state
    memory = state.memory
    if decoder.v is not None:
        decoder = replace(decoder, v=decoder.v.detach().clone())
        if isinstance(memory.keys, Tensor) and decoder.spec.history == "none":
            memory = replace(memory, keys=prepare_keys(memory.keys))
    if packed is None:
        packed = pack_weights(decoder)
    return replace(state, memory=memory, packed=packed, decoder=decoder)


def packed_decoder(state: DecoderState) -> Decoder | None:
    """The decoder whose weights the state holds packed, where a step may go on from them."""
    return None if state.packed is None or torch.is_grad_enabled() or forward_mode() else state.decoder


def packed_step(decoder: Decoder, input: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
    """One step of a state that `pack` made: input [B, I] -> output [B, M or H], the state after it. No gradients."""
    if input.dim() != 2:
        raise ValueError(f"input: expected [B, I], got {list(input.shape)}")
    input = input.unsqueeze(1)
    try:
        hidden, c_n, contexts, weights, attentional = _native(decoder, input, state, state.packed)
    except (RuntimeError, TypeError):
        _check_input(decoder, input, state.own_memory())
        raise
    context = contexts.squeeze(1)
    output = hidden[-1, :, 0] if attentional is None else attentional.squeeze(1)
    after = DecoderState(
        hidden.squeeze(2),
        c_n,
        context,
        output if decoder.spec.attentional_at >= 0 else None,  # one that isn't fed back is never reordered
        state.memory,
        weights.squeeze(1),
        _history_after(decoder, state, weights),
        state.packed,
        decoder,
        state.owners,
    )
    return output, after


class Generated(NamedTuple):
    """words [B, T]; how many of them are each row's, the end included [B]; whether it came to its end [B]; sums of
    log-probabilities [B]; weights [B, T, S]. What comes after a row's own words means nothing."""

    words: Tensor
    lengths: Tensor
    finished: Tensor
    log_probs: Tensor
    weights: Tensor


def generate(
    decoder: Decoder,
    state: DecoderState,
    embedding: Tensor,
    w_predict: Tensor | None,
    b_predict: Tensor | None,
    start: Tensor,
    end: int | None,
    max_length: int,
) -> Generated:
    """Greedy decoding of a state that `pack` made, in one operator."""
    memory = state.memory
    packed_keys = memory.keys.packed if isinstance(memory.keys, PreparedKeys) else None
    words, lengths, log_probs, weights = ops.decoder.generate(
        decoder.spec,
        _tensors(decoder, embedding, state),
        decoder.weights,
        w_predict,
        b_predict,
        start,
        end,
        max_length,
        packed_keys=packed_keys,
        packed=state.packed,
        owners=state.owners,
    )
    longest = int(lengths.max()) if len(lengths) else 0
    words, weights = words[:, :longest], weights[:, :longest]
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    if end is not None and longest:
        finished = words.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1) == end
    return Generated(words, lengths, finished, log_probs, weights)


def generate_by_steps(
    decoder: Decoder,
    state: DecoderState,
    embedding: Tensor,
    w_predict: Tensor | None,
    b_predict: Tensor | None,
    start: Tensor,
    end: int | None,
    max_length: int,
) -> Generated:
    """The same a step at a time, on any device."""
    words, found, log_probs = [], [], state.memory.values.new_zeros(len(start))
    lengths = torch.zeros_like(start)
    finished = torch.zeros_like(start, dtype=torch.bool)
    word = start
    for _ in range(max_length if len(start) else 0):
        output, state = step(decoder, embedding[word], state)
        logits = output if w_predict is None else torch.nn.functional.linear(output, w_predict, b_predict)
        best, word = logits.max(1)
        log_probs = log_probs + torch.where(finished, 0, best - logits.logsumexp(1))
        lengths = lengths + ~finished
        words.append(word)
        found.append(state.weights)
        if end is not None:
            finished = finished | (word == end)
            if bool(finished.all()):
                break
    if bool(log_probs.isnan().any()):
        raise RuntimeError("logits: expected numbers, got NaN, or no finite one, in a step")
    if not words:
        empty = state.memory.values.new_zeros(len(start), 0, state.memory.values.shape[1])
        return Generated(start.new_zeros(len(start), 0), lengths, finished, log_probs, empty)
    return Generated(torch.stack(words, 1), lengths, finished, log_probs, torch.stack(found, 1))  # type: ignore[arg-type]


def _native(
    decoder: Decoder, input: Tensor, state: DecoderState, packed: Tensor | None
) -> tuple[Tensor, Any, Tensor, Tensor, Any]:
    memory = state.memory
    packed_keys = memory.keys.packed if isinstance(memory.keys, PreparedKeys) else None
    return ops.decoder.attention_decoder(
        decoder.spec,
        _tensors(decoder, input, state),
        decoder.weights,
        packed_keys=packed_keys,
        packed=packed,
        owners=state.owners,
    )


def _tensors(decoder: Decoder, input: Tensor, state: DecoderState) -> ops.decoder.Tensors:
    memory, spec = state.memory, decoder.spec
    return ops.decoder.Tensors(
        input,
        memory.plain_keys(),
        memory.values,
        memory.lengths,
        memory.mask,
        state.h,
        state.c,
        state.context if spec.order != "bahdanau" and spec.context_at >= 0 else None,
        state.attentional if spec.attentional_at >= 0 else None,
        decoder.w_query,
        decoder.b_query,
        decoder.v,
        decoder.w_output,
        decoder.b_output,
        state.history if spec.history != "none" else None,
        decoder.w_conv,
        decoder.w_feature,
        memory.fertility,
    )


def _check_input(decoder: Decoder, input: Tensor, state: DecoderState) -> None:
    spec, first = decoder.spec, decoder.weights[0]
    values = state.memory.values
    width = first.shape[1]
    width -= values.shape[2] if spec.context_at >= 0 else 0
    width -= 0 if spec.attentional_at < 0 or decoder.w_output is None else decoder.w_output.shape[0]
    if input.dim() != 3 or input.shape[0] != values.shape[0] or input.shape[2] != width:
        raise ValueError(
            f"input: expected [B, T, I] with B={values.shape[0]} (from values), I={width} (from weights), "
            f"got {list(input.shape)}"
        )
    named = {"weights": first, "values": values, "keys": state.memory.plain_keys(), "h_0": state.h}
    for name, t in named.items():
        if t.device != input.device:
            raise ValueError(f"{name}: expected device {input.device} (from input), got {t.device}")
        if t.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"{name}: expected {input.dtype} (from input), got {t.dtype}")


def _widen(t: Tensor | None) -> Tensor | None:
    return t.float() if t is not None and t.is_floating_point() else t
