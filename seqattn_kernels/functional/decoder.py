"""The attentional decoder as a function: a loop in which every step attends and updates the cells.

One native operator runs all steps where it can (`why_not` says why it can't); everything else runs step by step on the
package's cells and attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels.functional.attention import PreparedKeys
from seqattn_kernels.functional.decoder_loop import Decoder, DecoderState, describe
from seqattn_kernels.functional.decoder_run import DecoderOutput, begin, make_memory, run_decoder
from seqattn_kernels.functional.masks import attended_keys, resolve
from seqattn_kernels.reference.decoder import ACTIVATIONS, ORDERS, Spec
from seqattn_kernels.reference.recurrence import GATES

CELL_NAMES = {"rnn": "rnn_tanh", "rnn_tanh": "rnn_tanh", "rnn_relu": "rnn_relu", "gru": "gru", "lstm": "lstm"}
SCORES = ("additive", "dot", "general", "concat", "location", "coverage")
FEEDBACKS = {"context": (True, False), "attentional": (False, True), "both": (True, True), "none": (False, False)}


def attention_decoder(
    input: Tensor,
    keys: Tensor | PreparedKeys,
    values: Tensor,
    weights: Sequence[Tensor],
    *,
    cell: str = "gru",
    bias: bool = True,
    score: str = "additive",
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    v: Tensor | None = None,
    conv_weight: Tensor | None = None,
    feature_weight: Tensor | None = None,
    fertility: Tensor | None = None,
    history_gradient: bool = True,
    scale: float = 1.0,
    order: str = "bahdanau",
    feedback: str = "context",
    concat: Sequence[str] = ("input", "context", "attentional"),
    output_weight: Tensor | None = None,
    output_bias: Tensor | None = None,
    output_concat: Sequence[str] = ("context", "hidden"),
    activation: str = "tanh",
    state: DecoderState | Tensor | Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    output_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> DecoderOutput:
    """A recurrent decoder with attention, all steps, teacher-forced.

    With order "bahdanau" (Bahdanau, Cho, Bengio, 2014) a step attends with h of the step before and then updates the
    cells; with "luong" (Luong, Pham, Manning, 2015) it updates the cells and then attends with their new h; with
    "between" (Tacotron 2: Shen et al., 2018) the first layer updates and attends with its new h, and the second layer
    sees that h and the context, in this order.

    Args:
        input: [B, T, I], the inputs of all steps, say embeddings of the tokens before.
        keys: [B, S, A], projected already for "additive", "location" and "coverage" scores (or prepared), as they are
            for the others.
        values: [B, S, D].
        weights: of each layer w_ih, w_hh, and b_ih, b_hh with ``bias``; torch's layout and gate order. The first layer
            takes the parts named in ``concat``, those after it the h of the layer below (and the second, in the order
            "between", the context).
        cell: "rnn" (tanh), "rnn_relu", "gru" or "lstm".
        score: with h [B, H] of the last layer (in the order "between" of the first),
            "additive": ``v . tanh(query_weight h + query_bias + key)``, query_weight [A, H], v [A];
            "dot": ``scale * (h . key)``, after ``query_weight`` [A, H] where it is given;
            "general": ``h query_weight key``, query_weight [H, A];
            "concat": ``v . tanh(query_weight [h; key] + query_bias)``, query_weight [A, H + K], v [A];
            "location" (Chorowski et al., 2015): additive with the term ``feature_weight f``, feature_weight [A, F],
            where f is the convolution by ``conv_weight`` [F, C, W], W odd, of the last weights (C = 1) or of the last
            and the sum of all earlier ones (C = 2);
            "coverage" (Tu et al., 2016; See, Liu, Manning, 2017): additive with the term ``feature_weight`` [A] times
            the sum of all earlier weights, each divided by the key's ``fertility`` [B, S] where that is given.
        history_gradient: of "location" and "coverage": whether gradients flow into earlier steps through their weights.
        feedback: what the first layer sees beside the input: "context" (but in "bahdanau" that of the step before),
            "attentional" (the attentional vector of the step before: input feeding), "both" or "none".
        concat: the order of the parts of the first layer's input; parts that aren't fed are passed over.
        output_weight, output_bias: [M, D + H], [M]: the attentional vector ``activation(output_weight [context; h] +
            output_bias)``, in the order of ``output_concat``; it then is the output.
        activation: "tanh" or "none".
        state: None for zeros; h_0 [B, H] or [L, B, H]; (h_0, c_0) of an LSTM; or the state that another call returned.
        lengths: integer [B], zeros allowed: only the first ``lengths[b]`` keys are attended to.
        mask: [B, S] boolean, True where to attend, or floating and added to the scores.
        dropout, hidden_dropout, output_dropout: probabilities, when ``training``: between layers; of h of every layer,
            that the next step and all else then sees (Tacotron 2); of the attentional vector.
        zoneout: probability with which a unit keeps h and c of the step before (Krueger et al., 2016); without
            ``training``, its expectation.
        backend: "cpu" or "cuda" (all steps in one operator), "composed" (a step at a time from the package's operators)
            or "reference" (plain torch); None chooses. What "cuda" takes is in docs/decoder_on_cuda.md.

    Returns:
        DecoderOutput(output, state, weights, contexts). A row that may attend to nothing has zero weights and contexts.
        Memory for gradients is O(B * T * (H + D + S)) with "cpu" and "cuda": scores are computed again.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or type; the message names it.
        RuntimeError: ``backend`` was asked for by name and can't serve.
    """
    if not isinstance(input, Tensor) or input.dim() != 3:
        raise ValueError(f"input: expected [B, T, I], got {describe(input)}")
    one_of("score", score, SCORES)
    if not isinstance(values, Tensor) or values.dim() != 3:
        raise ValueError(f"values: expected [B, S, D], got {describe(values)}")
    w_query, b_query = query_weight, query_bias
    if score == "general":
        _expect_shape("query_weight", query_weight, "[H, A]", 2)
        w_query = query_weight.t()  # type: ignore[union-attr]
    elif score == "concat":
        _expect_shape("query_weight", query_weight, "[A, H + K]", 2)
        assert query_weight is not None
        hidden = query_weight.shape[1] - keys.shape[2]
        if isinstance(keys, Tensor):
            keys = project_concat_keys(keys, query_weight, hidden, lengths, mask)
        w_query = query_weight[:, :hidden]
    decoder = make_decoder(
        weights,
        cell=cell,
        bias=bias,
        score=score,
        w_query=w_query,
        b_query=b_query,
        v=v,
        w_conv=conv_weight,
        w_feature=feature_weight,
        history_gradient=history_gradient,
        scale=scale,
        order=order,
        feedback=feedback,
        concat=concat,
        w_output=output_weight,
        b_output=output_bias,
        output_concat=output_concat,
        activation=activation,
        sizes=(input.shape[2], values.shape[2]),
        dropout=dropout if training else 0.0,
        hidden_dropout=hidden_dropout if training else 0.0,
        output_dropout=output_dropout if training else 0.0,
        zoneout=zoneout,
        training=training,
    )
    if isinstance(state, DecoderState):
        began = state
    else:
        began = begin(decoder, make_memory(decoder, keys, values, lengths, mask, fertility), state)
    return run_decoder(decoder, input, began, backend=backend)


def project_concat_keys(
    keys: Tensor, weight: Tensor, hidden: int, lengths: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The part of a "concat" score that keys [B, S, K] have in it, from weight [A, H + K]."""
    lengths, mask = resolve(keys.shape[0], None, keys.shape[1], keys.device, lengths, mask)
    return F.linear(attended_keys(keys, lengths, mask), weight[:, hidden:])


def make_decoder(
    weights: Sequence[Tensor],
    *,
    cell: str,
    bias: bool,
    score: str,
    w_query: Tensor | None,
    b_query: Tensor | None,
    v: Tensor | None,
    scale: float,
    order: str,
    feedback: str,
    concat: Sequence[str],
    w_output: Tensor | None,
    b_output: Tensor | None,
    output_concat: Sequence[str],
    activation: str,
    sizes: tuple[int, int],
    w_conv: Tensor | None = None,
    w_feature: Tensor | None = None,
    history_gradient: bool = True,
    **more: Any,
) -> Decoder:
    """A decoder of checked parts. sizes: I and D; the rest as in `attention_decoder`."""
    one_of("cell", cell, CELL_NAMES)
    one_of("order", order, ORDERS)
    one_of("feedback", feedback, FEEDBACKS)
    one_of("activation", activation, ACTIVATIONS)
    name = CELL_NAMES[cell]
    each = 4 if bias else 2
    if not weights or len(weights) % each:
        raise ValueError(f"weights: expected {each} tensors for each layer, got {len(weights)}")
    input_size, value_size = sizes
    hidden = weights[1].shape[1]
    takes_context, takes_attentional = FEEDBACKS[feedback]
    if takes_attentional and w_output is None:
        raise ValueError(f"output_weight: expected a tensor with feedback={feedback!r}, got None")
    if score not in ("dot", "general") and v is None:
        raise ValueError(f"v: expected [A] with score={score!r}, got None")
    if score in ("dot", "general") and v is not None:
        raise ValueError(f"v: expected None with score={score!r}, got {list(v.shape)}")
    history, w_conv, w_feature = _history_of(score, v, w_conv, w_feature)
    output_size = 0 if w_output is None else w_output.shape[0]
    width = {
        "input": input_size,
        "context": value_size if takes_context else None,
        "attentional": output_size if takes_attentional else None,
    }
    if sorted(concat) != sorted(width):
        raise ValueError(f"concat: expected an order of {sorted(width)}, got {list(concat)}")
    if sorted(output_concat) != ["context", "hidden"]:
        raise ValueError(f"output_concat: expected an order of ['context', 'hidden'], got {list(output_concat)}")
    places, at = dict.fromkeys(width, -1), 0
    for part in concat:
        size = width[part]
        if size is not None:
            places[part] = at
            at += size
    context_first = output_concat[0] == "context"
    gates = GATES[name] * hidden
    widths = [at, hidden + (value_size if order == "between" else 0)]
    for n in range(0, len(weights), each):
        layer, wide = weights[n : n + each], widths[n // each] if n // each < 2 else hidden
        _expect_shape(f"weights[{n}]", layer[0], f"[G * H, I] = [{gates}, {wide}]", 2, gates, wide)
        _expect_shape(f"weights[{n + 1}]", layer[1], f"[G * H, H] = [{gates}, {hidden}]", 2, gates, hidden)
        for i, b in enumerate(layer[2:], n + 2):
            _expect_shape(f"weights[{i}]", b, f"[G * H] = [{gates}]", 1, gates)
    if w_query is not None:
        _expect_shape("query_weight", w_query, f"a matrix of H={hidden} columns", 2, None, hidden)
    elif b_query is not None:
        raise ValueError("query_bias: expected None without query_weight")
    if w_output is not None:
        _expect_shape(
            "output_weight", w_output, f"[M, D + H] with D={value_size}, H={hidden}", 2, None, value_size + hidden
        )
    elif b_output is not None:
        raise ValueError("output_bias: expected None without output_weight")
    spec = Spec(
        name,
        bias,
        "dot" if v is None else "additive",
        float(scale),
        order,
        places["input"],
        places["context"],
        places["attentional"],
        0 if context_first else hidden,
        value_size if context_first else 0,
        activation,
        history,
        history_gradient,
    )
    for option in ("dropout", "hidden_dropout", "output_dropout", "zoneout"):
        if not 0 <= more.get(option, 0.0) <= 1:
            raise ValueError(f"{option}: expected a probability, got {more[option]}")
    return Decoder(spec, tuple(weights), w_query, b_query, v, w_output, b_output, w_conv, w_feature, **more)


def _history_of(
    score: str, v: Tensor | None, w_conv: Tensor | None, w_feature: Tensor | None
) -> tuple[str, Tensor | None, Tensor | None]:
    """Which earlier weights the score knows of, the convolution [F, C, W] and the weights [A, F] of its features."""
    if score not in ("location", "coverage"):
        for name, given in (("conv_weight", w_conv), ("feature_weight", w_feature)):
            if given is not None:
                raise ValueError(f"{name}: expected None with score={score!r}, got {list(given.shape)}")
        return "none", None, None
    assert v is not None
    size = v.shape[0]
    if score == "coverage":
        if w_conv is not None:
            raise ValueError(f"conv_weight: expected None with score='coverage', got {list(w_conv.shape)}")
        _expect_shape("feature_weight", w_feature, f"[A] = [{size}]", 1, size)
        assert w_feature is not None
        return "sum", w_feature.new_ones(1, 1, 1), w_feature.unsqueeze(1)
    _expect_shape("conv_weight", w_conv, "[F, C, W]", 3)
    assert w_conv is not None
    filters, channels, window = w_conv.shape
    if window % 2 == 0 or channels not in (1, 2):
        raise ValueError(f"conv_weight: expected [F, C, W] with C 1 or 2 and W odd, got {list(w_conv.shape)}")
    _expect_shape("feature_weight", w_feature, f"[A, F] = [{size}, {filters}]", 2, size, filters)
    return "both" if channels == 2 else "last", w_conv, w_feature


def one_of(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def _expect_shape(name: str, t: Any, shape: str, rank: int, *sizes: int | None) -> None:
    right = isinstance(t, Tensor) and t.dim() == rank
    if not right or any(size is not None and size != got for size, got in zip(sizes, t.shape, strict=False)):
        raise ValueError(f"{name}: expected {shape}, got {describe(t)}")
