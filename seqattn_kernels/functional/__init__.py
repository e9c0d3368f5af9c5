"""The operators as functions: checked arguments, a choice of backend, gradients."""

from seqattn_kernels.functional.attention import (
    PreparedKeys,
    additive_attention,
    concat_attention,
    dot_attention,
    feature_attention,
    general_attention,
    prepare_keys,
)
from seqattn_kernels.functional.cells import gru_cell, lstm_cell, rnn_cell
from seqattn_kernels.functional.decoder import attention_decoder
from seqattn_kernels.functional.decoder_loop import DecoderMemory, DecoderState
from seqattn_kernels.functional.decoder_run import DecoderOutput
from seqattn_kernels.functional.recurrence import gru, lstm, pack_weights, rnn

__all__ = [
    "DecoderMemory",
    "DecoderOutput",
    "DecoderState",
    "PreparedKeys",
    "additive_attention",
    "attention_decoder",
    "concat_attention",
    "dot_attention",
    "feature_attention",
    "general_attention",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "pack_weights",
    "prepare_keys",
    "rnn",
    "rnn_cell",
]
