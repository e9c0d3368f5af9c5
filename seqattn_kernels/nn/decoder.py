"""The attentional decoder as a module: whole sequences, single steps, free running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqattn_kernels.functional import DecoderOutput, DecoderState
from seqattn_kernels.functional.attention import PreparedKeys
from seqattn_kernels.functional.decoder import CELL_NAMES, SCORES, make_decoder, one_of, project_concat_keys
from seqattn_kernels.functional.decoder_loop import Decoder, step
from seqattn_kernels.functional.decoder_run import (
    Generated,
    begin,
    generate,
    generate_by_steps,
    make_memory,
    pack,
    pack_weights,
    packed_decoder,
    packed_step,
    run_decoder,
    why_not,
)
from seqattn_kernels.functional.masks import attended_keys, resolve
from seqattn_kernels.functional.weighting import SOFTMAX
from seqattn_kernels.nn.alignment import CoverageAttention, LocationSensitiveAttention
from seqattn_kernels.nn.attention import AdditiveAttention, ConcatAttention, DotAttention, GeneralAttention
from seqattn_kernels.nn.cells import GRUCell, LSTMCell, RNNCell
from seqattn_kernels.nn.freezing import Freezable

_REMEMBERING: dict[str, Any] = {"location": LocationSensitiveAttention, "coverage": CoverageAttention}
_PROJECTING: dict[str, Any] = {"additive": AdditiveAttention, "concat": ConcatAttention, **_REMEMBERING}
State = DecoderState | Tensor | Sequence[Tensor] | None


class AttentionDecoder(Freezable):
    """A recurrent decoder with attention (Bahdanau, Cho, Bengio, 2014; Luong, Pham, Manning, 2015).

    Args:
        input_size: I, features of a step's input, say of an embedding.
        hidden_size: H.
        key_size: K, features of the keys, as the encoder gives them.
        value_size: D, features of the values; key_size by default.
        cell: "rnn", "rnn_relu", "gru" or "lstm"; num_layers, bias: as of torch.nn's.
        score: "additive", "dot" (key_size must be hidden_size), "general", "concat", "location" (location-sensitive) or
            "coverage"; or a module called as ``score(query [B, H], keys, values, lengths=..., mask=...) -> context
            [B, D], weights [B, S]``. One that has ``initial(keys)`` remembers: it is called with what that gave, and
            then with what its ``next_history(history, weights)`` makes of it, before ``values``.
        attention_size: A of all but "dot" and "general"; hidden_size by default.
        score_options: arguments more for the module of the score, say of `nn.LocationSensitiveAttention`.
        order: "bahdanau" (attend with h of the step before, then update the cells), "luong" (the reverse) or "between"
            (the first cell updates and attends with its new h, the second sees that h, then the context: Tacotron 2).
        feedback: what the first cell sees beside the input: "context" (but in "bahdanau" of the step before),
            "attentional" (the attentional vector of the step before: input feeding), "both" or "none".
        concat: the order in which the first cell's input is put together.
        output_size: M of the attentional vector ``activation(output_proj([context; h]))``, which then is the output;
            None: no such vector, the output is h.
        output_bias, output_concat, activation ("tanh" or "none"): of the attentional vector.
        dropout, hidden_dropout, output_dropout, zoneout: as in `functional.attention_decoder`.

    Parameters: ``cells.0.weight_ih`` and so on, as torch.nn's cells have them; ``attention``'s, as the module of its
    score has them; ``output_proj.weight``, ``output_proj.bias``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        key_size: int,
        value_size: int | None = None,
        *,
        cell: str = "gru",
        num_layers: int = 1,
        bias: bool = True,
        score: str | nn.Module = "additive",
        attention_size: int | None = None,
        score_options: Mapping[str, Any] | None = None,
        order: str = "bahdanau",
        feedback: str = "context",
        concat: Sequence[str] = ("input", "context", "attentional"),
        output_size: int | None = None,
        output_bias: bool = True,
        output_concat: Sequence[str] = ("context", "hidden"),
        activation: str = "tanh",
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        zoneout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        one_of("cell", cell, CELL_NAMES)
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        value_size = key_size if value_size is None else value_size
        attention_size = hidden_size if attention_size is None else attention_size
        self.input_size, self.hidden_size, self.key_size, self.value_size = (
            input_size,
            hidden_size,
            key_size,
            value_size,
        )
        self.cell, self.num_layers, self.bias, self.order, self.feedback = cell, num_layers, bias, order, feedback
        self.concat, self.output_concat, self.activation = tuple(concat), tuple(output_concat), activation
        self.dropout, self.hidden_dropout = dropout, hidden_dropout
        self.output_dropout, self.zoneout = output_dropout, zoneout
        self.attention: nn.Module
        if isinstance(score, nn.Module):
            self.score, self.attention = "module", score
            for name, kind in _REMEMBERING.items():
                self.score = name if type(score) is kind else self.score
        else:
            one_of("score", score, SCORES)
            self.score = score
            options = {**factory, **(score_options or {})}
            if score in _PROJECTING:
                self.attention = _PROJECTING[score](hidden_size, key_size, attention_size, **options)
            elif score == "general":
                self.attention = GeneralAttention(hidden_size, key_size, **options)
            else:
                self.attention = DotAttention(**(score_options or {}))
        if getattr(self.attention, "weighting", SOFTMAX) != SOFTMAX:
            self.score = "module"
        width = input_size
        width += value_size if feedback in ("context", "both") else 0
        width += (output_size or 0) if feedback in ("attentional", "both") else 0
        sizes = [width, hidden_size + (value_size if order == "between" else 0)]
        sizes = (sizes + [hidden_size] * num_layers)[:num_layers]
        self.cells = nn.ModuleList(_cell(cell, size, hidden_size, bias, factory) for size in sizes)
        self.output_proj = None
        if output_size is not None:
            self.output_proj = nn.Linear(value_size + hidden_size, output_size, bias=output_bias, **factory)
        self._parts()  # refuses what doesn't fit together

    def _weight_names(self) -> Sequence[str]:
        return "attention", "cells", "output_proj"

    def _read_weights(self) -> Sequence[Tensor | None]:
        # A score of one's own is composed, so that nothing is packed. Buffers: parametrizations may have them.
        return () if self.score == "module" else [*self.parameters(), *self.buffers()]

    def _pack_weights(self, weights: Sequence[Tensor | None]) -> Any:
        return pack_weights(self._parts())

    def _parts_packed_within(self) -> Iterable[nn.Module]:
        return self.cells

    def _packed(self) -> Tensor | None:
        """All weights as the native kernels read them where they are frozen."""
        return self._weights()[1] if self._frozen is not None else None

    def _parts(self) -> Decoder:
        """The decoder of the parameters as they are now."""
        attention: Any = self.attention
        w_query = b_query = v = None
        scale: float = 1.0
        attend = None
        history: dict[str, Any] = {}
        if self.score in ("additive", *_REMEMBERING):
            w_query, b_query, v = attention.query_proj.weight, attention.query_proj.bias, attention.v
            if self.score == "location":
                history = {"w_conv": attention.conv.weight, "w_feature": attention.feature_proj.weight}
                history["history_gradient"] = attention.history_gradient
            elif self.score == "coverage":
                history = {"w_feature": attention.coverage_weight}
        elif self.score == "concat":
            w_query, b_query, v = attention.weight[:, : self.hidden_size], attention.bias, attention.v
        elif self.score == "general":
            w_query = attention.weight.t()
        elif self.score == "dot":
            given = attention.scale
            scale = self.hidden_size**-0.5 if given is True else 1.0 if given in (None, False) else given
        else:
            attend = self._attend
        weights = [getattr(layer, name) for layer in self.cells for name in _weight_names(self.bias)]
        training = self.training
        return make_decoder(
            weights,
            cell=self.cell,
            bias=self.bias,
            score=self.score if attend is None else "dot",
            w_query=w_query,
            b_query=b_query,
            v=v,
            scale=scale,
            order=self.order,
            feedback=self.feedback,
            concat=self.concat,
            w_output=None if self.output_proj is None else self.output_proj.weight,
            b_output=None if self.output_proj is None else self.output_proj.bias,
            output_concat=self.output_concat,
            activation=self.activation,
            sizes=(self.input_size, self.value_size),
            dropout=self.dropout if training else 0.0,
            hidden_dropout=self.hidden_dropout if training else 0.0,
            output_dropout=self.output_dropout if training else 0.0,
            zoneout=self.zoneout,
            training=training,
            attend=attend,
            **history,
        )

    def _attend(self, query: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, Any]:
        memory, history, attention = state.memory, state.history, self.attention
        masks: dict[str, Any] = {"lengths": memory.lengths, "mask": memory.mask}
        if history is None:
            return *attention(query, memory.keys, memory.values, **masks), None
        if isinstance(attention, CoverageAttention):
            coverage, fertility = history
            context, weights = attention(query, memory.keys, coverage, memory.values, **masks)
            return context, weights, (attention.next_coverage(coverage, weights, fertility), fertility)
        context, weights = attention(query, memory.keys, history, memory.values, **masks)
        return context, weights, attention.next_history(history, weights)  # type: ignore[operator]

    def _history(self, keys: Tensor | PreparedKeys) -> Any:
        attention: Any = self.attention
        if not hasattr(attention, "initial") or not isinstance(keys, Tensor):
            return None
        if isinstance(attention, CoverageAttention):
            return attention.initial(keys), attention.fertility(keys)
        return attention.initial(keys)

    def _keys(self, keys: Tensor | PreparedKeys, lengths: Tensor | None, mask: Tensor | None) -> Tensor | PreparedKeys:
        if isinstance(keys, PreparedKeys) or self.score in ("dot", "general"):
            return keys
        attention: Any = self.attention
        if self.score == "module":
            if not hasattr(attention, "prepare_keys"):
                return keys
            lengths, mask = resolve(keys.shape[0], None, keys.shape[1], keys.device, lengths, mask)
            return attention.prepare_keys(attended_keys(keys, lengths, mask))
        if self.score == "concat":
            return project_concat_keys(keys, attention.weight, self.hidden_size, lengths, mask)
        lengths, mask = resolve(keys.shape[0], None, keys.shape[1], keys.device, lengths, mask)
        return attention.key_proj(attended_keys(keys, lengths, mask))

    def _begin(
        self,
        decoder: Decoder,
        keys: Tensor | PreparedKeys,
        values: Tensor | None,
        state: Any,
        lengths: Tensor | None,
        mask: Tensor | None,
    ) -> DecoderState:
        if values is None:
            if isinstance(keys, PreparedKeys):
                raise ValueError("values: expected [B, S, D] with prepared keys, got None")
            values = keys
        if isinstance(keys, Tensor) and (keys.dim() != 3 or keys.shape[2] != self.key_size):
            raise ValueError(f"keys: expected [B, S, K] with K={self.key_size}, got {list(keys.shape)}")
        if values.dim() != 3 or values.shape[2] != self.value_size:
            raise ValueError(f"values: expected [B, S, D] with D={self.value_size}, got {list(values.shape)}")
        if isinstance(keys, PreparedKeys) and hasattr(self.attention, "initial"):
            raise TypeError("keys: expected a tensor [B, S, K] of a score that remembers, got PreparedKeys")
        fertility = None
        if self.score == "coverage" and self.attention.fertility_weight is not None:
            assert isinstance(keys, Tensor)
            resolved = resolve(keys.shape[0], None, keys.shape[1], keys.device, lengths, mask)
            fertility = self.attention.fertility(attended_keys(keys, *resolved))  # type: ignore[operator]
        memory = make_memory(decoder, self._keys(keys, lengths, mask), values, lengths, mask, fertility)
        return begin(decoder, memory, state, self._history(keys) if self.score == "module" else None)

    def forward(
        self,
        input: Tensor,
        keys: Tensor | PreparedKeys | None = None,
        values: Tensor | None = None,
        *,
        state: State = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        feed: Callable[[Tensor], Tensor] | None = None,
        teacher: Tensor | None = None,
        backend: str | None = None,
    ) -> DecoderOutput:
        """All steps of input [B, T, I] with keys [B, S, K] and values [B, S, D] (the keys by default).

        state: None for zeros, h_0 [B, H] or [L, B, H], (h_0, c_0) of an LSTM, or a DecoderState, which brings its own
        keys and values. lengths: integer [B]; mask: [B, S].
        feed, teacher: scheduled sampling (Bengio et al., 2015). Where `teacher`, boolean [T] or [B, T], is False, from
        the second step on, the input is ``feed(output of the step before [B, M or H])`` [B, I].

        Returns DecoderOutput: output [B, T, M or H], state, weights [B, T, S], contexts [B, T, D].
        """
        decoder, packed = self._parts(), self._packed()
        if isinstance(state, DecoderState):
            if keys is not None:
                raise ValueError("keys: expected None with a DecoderState, which has its own")
            return run_decoder(decoder, input, state, feed=feed, teacher=teacher, packed=packed, backend=backend)
        if keys is None:
            raise ValueError("keys: expected [B, S, K], got None")
        began = self._begin(decoder, keys, values, state, lengths, mask)
        return run_decoder(decoder, input, began, feed=feed, teacher=teacher, packed=packed, backend=backend)

    def why_not(self, input: Tensor, state: DecoderState) -> str | None:
        """None where one native operator runs all steps of `input` from `state`, else why they are composed."""
        return why_not(self._parts(), input, state)

    def begin(
        self,
        keys: Tensor | PreparedKeys,
        values: Tensor | None = None,
        *,
        state: State = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> DecoderState:
        """The state before the first `step`; arguments as of `forward`.

        Keys are projected and prepared once. Without gradients the weights are read once too: a later change of the
        module's parameters shows in the next `begin`, not in steps that go on from here. While the module is frozen
        (`seqattn_kernels.frozen`), its weights are read and packed once for every `begin` and `forward`.
        """
        decoder, packed = self._parts(), self._packed()
        began = self._begin(decoder, keys, values, state, lengths, mask)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return began
        return pack(decoder, began, packed)

    def step(self, input: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """One step: input [B, I] -> output [B, M or H], the state after it (its `weights` [B, S] are this step's)."""
        decoder = packed_decoder(state)
        if decoder is not None:
            return packed_step(decoder, input, state)
        self._packed()  # refuses gradients of frozen weights
        return step(self._parts(), input, state.own_memory())

    @torch.no_grad()
    def generate(
        self,
        state: DecoderState,
        embedding: nn.Embedding | Tensor,
        predict: nn.Linear | None = None,
        *,
        start: int | Tensor,
        end: int | None,
        max_length: int,
    ) -> Generated:
        """Greedy decoding: the input of each step is the embedding of the most probable word of the step before.

        One native operator runs all of it where `why_not` gives no reason against that.

        state: from `begin`. embedding: nn.Embedding or its table [V, I]. predict: nn.Linear from the output to the
        logits of V words; None where the output holds them. start: the first word, or [B]. end: the word that ends a
        row, or None. max_length: words at most, the end included.

        Returns words [B, T] with T the longest row, lengths [B] (end included), finished [B], the sums of the words'
        log-probabilities [B], weights [B, T, S]. Raises ValueError for arguments that don't fit, RuntimeError where
        logits are NaN.
        """
        table = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
        if table.dim() != 2 or table.shape[1] != self.input_size:
            raise ValueError(f"embedding: expected [V, I] with I={self.input_size}, got {list(table.shape)}")
        vocabulary, width = table.shape[0], self.hidden_size
        if self.output_proj is not None:
            width = self.output_proj.out_features
        made = (width, width) if predict is None else (predict.out_features, predict.in_features)
        if made != (vocabulary, width):
            raise ValueError(f"predict: expected from {width} (output) to V={vocabulary} (embedding), got {predict}")
        if max_length < 0:
            raise ValueError(f"max_length: expected at least 0, got {max_length}")
        if end is not None and not 0 <= end < vocabulary:
            raise ValueError(f"end: expected a word below V={vocabulary} or None, got {end}")
        if not isinstance(start, Tensor):
            start = torch.full((state.batch_size,), start, device=table.device)
        if start.shape != (state.batch_size,) or start.is_floating_point():
            raise ValueError(f"start: expected integers [B] with B={state.batch_size}, got {list(start.shape)}")
        if start.device.type == "cpu" and start.numel() and not 0 <= int(start.min()) <= int(start.max()) < vocabulary:
            raise ValueError(f"start: expected words in [0, {vocabulary}), got {start.tolist()}")
        w_predict, b_predict = (None, None) if predict is None else (predict.weight, predict.bias)
        if state.packed is not None and state.decoder is not None:
            run, decoder = generate, state.decoder
        else:
            run, decoder, state = generate_by_steps, self._parts(), state.own_memory()
        return run(decoder, state, table, w_predict, b_predict, start.long(), end, max_length)

    def run_freely(
        self,
        input: Tensor,
        state: DecoderState,
        feed: Callable[[Tensor], Tensor],
        *,
        max_length: int,
        stop: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[DecoderOutput, Tensor]:
        """Steps that feed themselves: the next input is ``feed(output)``, until every row has stopped.

        input: [B, I], the first. stop: output [B, M or H] -> boolean [B], True where this output was a row's last.
        max_length: steps at most. Returns a DecoderOutput of T <= max_length steps and how many of them belong to each
        row, [B]; what a row gives after its last is no longer its own.
        """
        if max_length < 0:
            raise ValueError(f"max_length: expected at least 0, got {max_length}")
        outputs, weights, contexts = [], [], []
        lengths = torch.full((state.batch_size,), max_length, device=input.device)
        going = torch.ones_like(lengths, dtype=torch.bool)
        for t in range(max_length):
            output, state = self.step(input, state)
            outputs.append(output)
            weights.append(state.weights)
            contexts.append(state.context)
            if stop is not None:
                ends = going & stop(output)
                lengths = torch.where(ends, t + 1, lengths)
                going = going & ~ends
                if not bool(going.any()):
                    break
            input = feed(output)
        if not outputs:
            return run_decoder(self._parts(), input.new_zeros(len(input), 0, self.input_size), state), lengths
        stacked = (torch.stack(x, 1) for x in (outputs, weights, contexts))  # type: ignore[arg-type]
        output, found, context = stacked
        return DecoderOutput(output, state, found, context), lengths

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, {self.key_size}, value_size={self.value_size}, "
            f"cell={self.cell!r}, order={self.order!r}, feedback={self.feedback!r}"
        )


def _weight_names(bias: bool) -> tuple[str, ...]:
    return ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if bias else ("weight_ih", "weight_hh")


def _cell(kind: str, input_size: int, hidden_size: int, bias: bool, factory: dict[str, Any]) -> nn.Module:
    if kind == "lstm":
        return LSTMCell(input_size, hidden_size, bias=bias, **factory)
    if kind == "gru":
        return GRUCell(input_size, hidden_size, bias=bias, **factory)
    nonlinearity = "relu" if kind == "rnn_relu" else "tanh"
    return RNNCell(input_size, hidden_size, bias=bias, nonlinearity=nonlinearity, **factory)
