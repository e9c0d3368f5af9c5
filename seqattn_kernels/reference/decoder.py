"""The attentional decoder in plain torch: a loop in which each step attends and updates the cells.

Shapes: input [B, T, I], keys [B, S, A], values [B, S, D], h0 and c0 [L, B, H], context0 [B, D], attentional0 [B, M],
history0 [B, C, S].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqattn_kernels.reference.attention import (
    additive_scores,
    attended,
    dot_scores,
    location_features,
    masked_softmax,
    without_unattended,
)
from seqattn_kernels.reference.recurrence import cell_step

ORDERS = ("bahdanau", "luong", "between")
SCORES = ("additive", "dot")
ACTIVATIONS = ("tanh", "none")
HISTORIES = ("none", "last", "both", "sum")


@dataclass(frozen=True)
class Spec:
    """What kind of decoder, beside its tensors.

    cell: a name of `reference.recurrence.CELLS`; has_bias: whether its weights come with biases.
    score: "additive" or "dot" (times `scale`), of the query projection of h.
    order: "bahdanau" attends with h of the step before and then updates the cells; "luong" the other way round;
    "between": the first layer updates and attends with its new h, the second sees that h and then the context.
    input_at, context_at, attentional_at: where the columns of the input, of the context (but in "bahdanau" of the step
    before) and of the attentional vector of the step before begin in w_ih of the first layer; -1: not fed.
    output_context_at, output_hidden_at: the same in the output projection, whose result goes through `activation`.
    history: which earlier weights additive scores know of: "none", the "last", "both" the last and the sum of all, or
    that "sum"; history_gradient: whether gradients reach those steps through it.
    """

    cell: str = "gru"
    has_bias: bool = True
    score: str = "additive"
    scale: float = 1.0
    order: str = "bahdanau"
    input_at: int = 0
    context_at: int = -1
    attentional_at: int = -1
    output_context_at: int = 0
    output_hidden_at: int = 0
    activation: str = "tanh"
    history: str = "none"
    history_gradient: bool = True

    @property
    def knows_sum(self) -> bool:
        return self.history in ("both", "sum")


def extend_history(spec: Spec, history: Tensor, weights: Tensor, fertility: Tensor | None = None) -> Tensor:
    """The channels [B, C, S] after a step with these weights [B, S]."""
    channels = [] if spec.history == "sum" else [weights]
    if spec.knows_sum:
        channels.append(history[:, -1] + (weights if fertility is None else weights / fertility))
    return torch.stack(channels, 1)


Results = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


def attention_decoder(
    spec: Spec,
    input: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    context0: Tensor | None,
    attentional0: Tensor | None,
    weights: Sequence[Tensor],
    w_query: Tensor | None,
    b_query: Tensor | None,
    v: Tensor | None,
    w_output: Tensor | None,
    b_output: Tensor | None,
    history0: Tensor | None = None,
    w_conv: Tensor | None = None,
    w_feature: Tensor | None = None,
    fertility: Tensor | None = None,
) -> Results:
    """All steps of a decoder of L layers; weights: of each layer w_ih, w_hh, and b_ih, b_hh with a bias.

    With a history of C channels, scores have the term ``w_feature`` [A, F] of the convolution of the channels by
    ``w_conv`` [F, C, window], and the sum is of weights / ``fertility`` [B, S].

    -> h of all layers and steps [L, B, T, H], last c [L, B, H] of an LSTM, contexts [B, T, D], weights [B, T, S],
    attentional vectors act(w_output [context; h] + b_output) [B, T, M] where there is an output projection.
    """
    batch, steps = input.shape[:2]
    each = 4 if spec.has_bias else 2
    layers = [weights[i : i + each] for i in range(0, len(weights), each)]
    hidden = layers[0][1].shape[1]
    zeros = input.new_zeros(batch, hidden)
    h = [zeros] * len(layers) if h0 is None else list(h0.unbind(0))
    c: list[Tensor | None] = [None] * len(layers)
    if spec.cell == "lstm":
        c = [zeros] * len(layers) if c0 is None else list(c0.unbind(0))
    context = values.new_zeros(batch, values.shape[2]) if context0 is None else context0
    attentional = attentional0
    if w_output is not None and attentional is None:
        attentional = values.new_zeros(batch, w_output.shape[0])

    attend = attended(keys, lengths, mask)
    keys, values = without_unattended(keys, attend), without_unattended(values, attend)

    history = history0
    if spec.history != "none" and history is None:
        history = keys.new_zeros(batch, 2 if spec.history == "both" else 1, keys.shape[1])

    def look(query: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal history
        if w_query is not None:
            query = linear(query, w_query, b_query)
        query = query.unsqueeze(1)
        features = term = None
        if history is not None and w_conv is not None and w_feature is not None:
            features = location_features(history if spec.history_gradient else history.detach(), w_conv)
            term = w_feature.t()
        scores = dot_scores(query, keys, spec.scale) if v is None else additive_scores(query, keys, v, features, term)
        found = masked_softmax(scores, attend, mask)
        if history is not None:
            history = extend_history(spec, history, found.squeeze(1), fertility)
        return (found @ values).squeeze(1), found.squeeze(1)

    outputs: list[list[Tensor]] = [[], [], [], []]
    for t in range(steps):
        if spec.order == "bahdanau":
            context, found = look(h[-1])
        parts = {spec.input_at: input[:, t], spec.context_at: context, spec.attentional_at: attentional}
        parts.pop(-1, None)
        below = torch.cat([part for _, part in sorted(parts.items()) if part is not None], 1)
        for n, own in enumerate(layers):
            h[n], c[n] = cell_step(spec.cell, below, h[n], c[n], own, spec.has_bias)
            below = h[n]
            if spec.order == "between" and n == 0:
                context, found = look(below)
                below = torch.cat([below, context], 1)
        if spec.order == "luong":
            context, found = look(h[-1])
        if w_output is not None:
            pair = [context, h[-1]] if spec.output_context_at == 0 else [h[-1], context]
            attentional = linear(torch.cat(pair, 1), w_output, b_output)
            attentional = attentional.tanh() if spec.activation == "tanh" else attentional
            outputs[3].append(attentional)
        for kept, new in zip(outputs, (torch.stack(h), context, found), strict=False):
            kept.append(new)

    def all_steps(kept: list[Tensor], *shape: int) -> Tensor:
        return torch.stack(kept, -2) if kept else input.new_zeros(*shape)

    last = torch.stack([x for x in c if x is not None]) if spec.cell == "lstm" else None
    return (
        all_steps(outputs[0], len(layers), batch, 0, hidden),
        last,
        all_steps(outputs[1], batch, 0, values.shape[2]),
        all_steps(outputs[2], batch, 0, keys.shape[1]),
        None if w_output is None else all_steps(outputs[3], batch, 0, w_output.shape[0]),
    )
