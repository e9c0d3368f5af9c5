"""The operators as functions: checked arguments, a choice of backend, gradients."""

from seqattn_kernels.functional.alignment import local_attention, monotonic_attention, predict_position
from seqattn_kernels.functional.attention import (
    PreparedKeys,
    additive_attention,
    concat_attention,
    multi_head_additive_attention,
    prepare_keys,
)
from seqattn_kernels.functional.cells import gru_cell, lstm_cell, rnn_cell
from seqattn_kernels.functional.custom import register_score, score_attention
from seqattn_kernels.functional.decoder import attention_decoder
from seqattn_kernels.functional.decoder_loop import DecoderMemory, DecoderState
from seqattn_kernels.functional.decoder_run import DecoderOutput
from seqattn_kernels.functional.location import coverage_attention, coverage_loss, fertility, location_attention
from seqattn_kernels.functional.pooling import feature_attention, pooling_attention
from seqattn_kernels.functional.products import cosine_attention, dot_attention, general_attention
from seqattn_kernels.functional.recurrence import gru, lstm, pack_weights, rnn
from seqattn_kernels.functional.weighting import Weighting, entmax15, masked_softmax, sparsemax

__all__ = [
    "DecoderMemory",
    "DecoderOutput",
    "DecoderState",
    "PreparedKeys",
    "Weighting",
    "additive_attention",
    "attention_decoder",
    "concat_attention",
    "cosine_attention",
    "coverage_attention",
    "coverage_loss",
    "dot_attention",
    "entmax15",
    "feature_attention",
    "fertility",
    "general_attention",
    "gru",
    "gru_cell",
    "local_attention",
    "location_attention",
    "lstm",
    "lstm_cell",
    "masked_softmax",
    "monotonic_attention",
    "multi_head_additive_attention",
    "pack_weights",
    "pooling_attention",
    "predict_position",
    "prepare_keys",
    "register_score",
    "rnn",
    "rnn_cell",
    "score_attention",
    "sparsemax",
]
