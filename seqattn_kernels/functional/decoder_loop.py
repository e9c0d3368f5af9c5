"""A decoder's parts, memory and state, and its loop of steps composed of cells and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels.functional.attention import PreparedKeys, additive_attention
from seqattn_kernels.functional.cells import gru_cell, lstm_cell, rnn_cell
from seqattn_kernels.functional.location import location_attention
from seqattn_kernels.functional.products import dot_attention
from seqattn_kernels.ops.autograd import needs_gradients
from seqattn_kernels.reference.attention import (
    attended,
    dot_scores,
    location_features,
    scores_of_rows,
    without_unattended,
)
from seqattn_kernels.reference.decoder import Spec, extend_history


@dataclass(frozen=True)
class DecoderMemory:
    """What a decoder attends to: keys, values [B, S, D], lengths [B], mask [B, S], fertility of the keys [B, S]."""

    keys: Tensor | PreparedKeys
    values: Tensor
    lengths: Tensor | None = None
    mask: Tensor | None = None
    fertility: Tensor | None = None

    def select(self, index: Tensor) -> DecoderMemory:
        """The memory of the rows `index` [N]."""
        keys = self.keys.select(index) if isinstance(self.keys, PreparedKeys) else self.keys.index_select(0, index)
        lengths = None if self.lengths is None else self.lengths.index_select(0, index.to(self.lengths.device))
        mask = None if self.mask is None else self.mask.index_select(0, index)
        fertility = None if self.fertility is None else self.fertility.index_select(0, index)
        return DecoderMemory(keys, self.values.index_select(0, index), lengths, mask, fertility)

    def plain_keys(self) -> Tensor:
        return self.keys.keys if isinstance(self.keys, PreparedKeys) else self.keys


@dataclass(frozen=True)
class DecoderState:
    """A decoder between two steps.

    h [L, B, H], c [L, B, H] of an LSTM, context [B, D], attentional vector [B, M]; weights [B, S] of the last step,
    where it was one alone; what a score that remembers keeps, channels [B, C, S] of location and coverage; the memory;
    and, where decoding began without gradients, the decoder of that moment, its weights as the native kernels read
    them, and the row of the memory that each row attends to (None: its own), so that the memory itself is never copied.
    """

    h: Tensor
    c: Tensor | None
    context: Tensor
    attentional: Tensor | None
    memory: DecoderMemory
    weights: Tensor | None = None
    history: Any = None
    packed: Tensor | None = None
    decoder: Decoder | None = None
    owners: Tensor | None = None

    def select(self, index: Tensor) -> DecoderState:
        """The state of the rows `index` [N] int64, in that order."""

        def rows(t: Tensor | None, dim: int = 0) -> Any:
            return None if t is None else t.index_select(dim, index)

        return DecoderState(
            rows(self.h, 1),
            rows(self.c, 1),
            rows(self.context),
            rows(self.attentional),
            self.memory if self.packed is not None else self.memory.select(index),
            rows(self.weights),
            _map(rows, self.history),
            self.packed,
            self.decoder,
            None if self.packed is None else index if self.owners is None else self.owners.index_select(0, index),
        )

    def own_memory(self) -> DecoderState:
        """The same with a row of memory for each row."""
        if self.owners is None:
            return self
        return replace(self, memory=self.memory.select(self.owners), owners=None)

    def detach(self) -> DecoderState:
        """The same without a past, for truncated backpropagation through time."""

        def cut(t: Tensor | None) -> Any:
            return None if t is None else t.detach()

        return replace(
            self,
            h=self.h.detach(),
            c=cut(self.c),
            context=self.context.detach(),
            attentional=cut(self.attentional),
            weights=cut(self.weights),
            history=_map(cut, self.history),
        )

    @property
    def batch_size(self) -> int:
        return self.h.shape[1]

    @property
    def device(self) -> torch.device:
        return self.h.device


def _map(f: Callable[[Tensor | None], Any], history: Any) -> Any:
    return tuple(f(t) for t in history) if isinstance(history, tuple) else f(history)


# query [B, H], state -> context [B, D], weights [B, S], and what the score remembers from now on
Attend = Callable[[Tensor, DecoderState], tuple[Tensor, Tensor, Any]]


@dataclass(frozen=True)
class Decoder:
    """A decoder's spec and tensors; dropouts are 0 but in training. attend: scores the spec has no name for."""

    spec: Spec
    weights: Sequence[Tensor]
    w_query: Tensor | None = None
    b_query: Tensor | None = None
    v: Tensor | None = None
    w_output: Tensor | None = None
    b_output: Tensor | None = None
    w_conv: Tensor | None = None
    w_feature: Tensor | None = None
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    zoneout: float = 0.0
    training: bool = False
    attend: Attend | None = None

    @property
    def layers(self) -> list[Sequence[Tensor]]:
        each = 4 if self.spec.has_bias else 2
        return [self.weights[i : i + each] for i in range(0, len(self.weights), each)]

    @property
    def attention_weights(self) -> tuple[Tensor | None, ...]:
        return self.w_query, self.b_query, self.v, self.w_conv, self.w_feature

    @property
    def hidden_size(self) -> int:
        return self.weights[1].shape[1]

    def look(self, query: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, Any]:
        """One look at the memory: query [B, H] -> context [B, D], weights [B, S], what the score remembers."""
        if self.attend is not None:
            return self.attend(query, state)
        memory = state.memory
        if self.w_query is not None:
            query = F.linear(query, self.w_query, self.b_query)
        masks: Any = {"lengths": memory.lengths, "mask": memory.mask}
        if self.spec.history != "none":
            assert self.v is not None
            assert self.w_conv is not None
            assert self.w_feature is not None
            context, weights = location_attention(
                query, memory.keys, self.v, state.history, self.w_conv, self.w_feature, memory.values,
                history_gradient=self.spec.history_gradient, **masks,
            )  # fmt: skip
            return context, weights, extend_history(self.spec, state.history, weights, memory.fertility)
        if self.v is not None:
            return *additive_attention(query, memory.keys, self.v, memory.values, **masks), None
        return *dot_attention(query, memory.plain_keys(), memory.values, scale=self.spec.scale, **masks), None

    def update(self, layer: Sequence[Tensor], x: Tensor, h: Tensor, c: Any) -> tuple[Tensor, Any]:
        """One cell: x [B, I] -> h, c."""
        if self.spec.cell == "lstm":
            return lstm_cell(x, (h, c), *layer)
        if self.spec.cell == "gru":
            return gru_cell(x, h, *layer), None
        return rnn_cell(x, h, *layer, nonlinearity=self.spec.cell.removeprefix("rnn_")), None

    def keep(self, new: Tensor, old: Tensor) -> Tensor:
        """Zoneout: some units stay what they were."""
        if not self.zoneout:
            return new
        if not self.training:
            return torch.lerp(new, old, self.zoneout)
        return torch.where(torch.rand_like(new) < self.zoneout, old, new)


Feed = Callable[[Tensor], Tensor]  # outputs of a step [B, M or H] -> inputs of the next [B, I]


def step(decoder: Decoder, input: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
    """One step from cells and attention: input [B, I] -> output [B, M or H], the state after it."""
    spec, layers = decoder.spec, decoder.layers
    one = len(layers) == 1

    def each(t: Tensor) -> list[Any]:
        return [t.squeeze(0)] if one else list(t.unbind(0))  # the gradient of unbind is a kernel, of squeeze a view

    h = each(state.h)
    c: list[Any] = [None] * len(h) if state.c is None else each(state.c)
    context, weights, attentional, history = state.context, state.weights, state.attentional, state.history
    if spec.order == "bahdanau":
        context, weights, history = decoder.look(h[-1], state)
    parts: dict[int, Any] = {
        spec.input_at: input,
        spec.context_at: context,
        spec.attentional_at: attentional,
    }
    parts.pop(-1, None)
    below = input if len(parts) == 1 else torch.cat([parts[at] for at in sorted(parts)], 1)
    for n, layer in enumerate(layers):
        h_new, c_new = decoder.update(layer, below, h[n], c[n])
        h_new = decoder.keep(h_new, h[n])
        if c_new is not None:
            c_new = decoder.keep(c_new, c[n])
        if decoder.hidden_dropout:
            h_new = F.dropout(h_new, decoder.hidden_dropout)
        h[n], c[n] = h_new, c_new
        below = h_new
        if spec.order == "between" and n == 0:
            context, weights, history = decoder.look(h_new, state)
            below = torch.cat([h_new, context], 1)
        if decoder.dropout and n + 1 < len(h):
            below = F.dropout(below, decoder.dropout)
    if spec.order == "luong":
        context, weights, history = decoder.look(h[-1], state)
    output = h[-1]
    if decoder.w_output is not None:
        pair = [context, output] if spec.output_context_at == 0 else [output, context]
        output = F.linear(torch.cat(pair, 1), decoder.w_output, decoder.b_output)
        if spec.activation == "tanh":
            output = output.tanh()
        if decoder.output_dropout:
            output = F.dropout(output, decoder.output_dropout)
        attentional = output
    new = DecoderState(
        h[0].unsqueeze(0) if one else torch.stack(h),
        None if state.c is None else c[0].unsqueeze(0) if one else torch.stack(c),
        context,
        attentional,
        state.memory,
        weights,
        history,
        state.packed,
        state.decoder,
    )
    return output, new


def attends_by_stock(device: torch.device, gradients: bool) -> bool:
    """Whether a loop of steps attends by torch's own operators instead of the package's.

    On a GPU a composed step waits for the host. With gradients the package's attention, an autograd Function above a
    kernel, cost the host more than the few operators it replaces: 1.4 ms a step where the stock loop took 0.8 (H200,
    (B, T, S, H) = (64, 100, 100, 512)); as CUDA graphs, without a host, both took 0.15.
    """
    return device.type == "cuda" and gradients


def stock_attention(decoder: Decoder, memory: DecoderMemory) -> Attend:
    """What `Decoder.look` finds in this memory, in torch's own operators; masks are prepared once for all steps."""
    keys, values, mask = memory.plain_keys(), memory.values, memory.mask
    attend = attended(keys, memory.lengths, mask)
    hidden = None if attend is None else ~attend
    if hidden is not None:
        # What stands where nobody attends must not spread: 0 * NaN is NaN.
        keys, values = (without_unattended(t, attend) for t in (keys, values))
    added = mask.unsqueeze(1) if mask is not None and mask.is_floating_point() else None
    spec, rows = decoder.spec, None if decoder.v is None else decoder.v.unsqueeze(0)

    def look(query: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, Any]:
        if decoder.w_query is not None:
            query = F.linear(query, decoder.w_query, decoder.b_query)
        history, query = state.history, query.unsqueeze(1)
        if rows is None:
            scores = dot_scores(query, keys, spec.scale)
        else:
            inner = query + keys
            if history is not None and decoder.w_conv is not None and decoder.w_feature is not None:
                seen = history if spec.history_gradient else history.detach()
                inner = inner + F.linear(location_features(seen, decoder.w_conv), decoder.w_feature)
            scores = scores_of_rows(inner, rows)
        if added is not None:
            scores = scores + added
        if hidden is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
        context = torch.bmm(weights, values).squeeze(1)
        weights = weights.squeeze(1)
        if history is not None:
            history = extend_history(spec, history, weights, memory.fertility)
        return context, weights, history

    return look


def run_steps(
    decoder: Decoder,
    input: Tensor,
    state: DecoderState,
    *,
    feed: Feed | None = None,
    teacher: Tensor | None = None,
) -> tuple[Tensor, DecoderState, Tensor, Tensor]:
    """All steps of input [B, T, I]: outputs [B, T, M or H], the last state, weights [B, T, S], contexts [B, T, D].

    teacher: boolean [T] or [B, T]; where it is False, and from the second step on, `feed` makes the input of the
    output of the step before.
    """
    batch, steps = input.shape[:2]
    if decoder.attend is None:
        memory = state.memory
        given = input, memory.plain_keys(), memory.values, state.h, state.c, state.context, state.history
        gradients = needs_gradients(*given, *decoder.weights, *decoder.attention_weights)
        if attends_by_stock(input.device, gradients):
            decoder = replace(decoder, attend=stock_attention(decoder, memory))
    outputs: list[Tensor] = []
    weights: list[Any] = []
    contexts: list[Tensor] = []
    for t in range(steps):
        x = input[:, t]
        if t and feed is not None and teacher is not None:
            forced = teacher[..., t]
            x = torch.where(forced.reshape(-1, 1), x, feed(outputs[-1]).to(x.dtype))
        output, state = step(decoder, x, state)
        outputs.append(output)
        weights.append(state.weights)
        contexts.append(state.context)
    if not steps:
        values = state.memory.values
        width = decoder.hidden_size if decoder.w_output is None else decoder.w_output.shape[0]
        sizes = width, values.shape[1], values.shape[2]
        output, found, context = (input.new_zeros(batch, 0, size) for size in sizes)
        return output, state, found, context
    return torch.stack(outputs, 1), state, torch.stack(weights, 1), torch.stack(contexts, 1)


def describe(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
