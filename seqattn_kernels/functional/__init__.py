"""The operators as functions: checked arguments, a choice of backend, gradients."""

from seqattn_kernels.functional.cells import gru_cell, lstm_cell, rnn_cell
from seqattn_kernels.functional.recurrence import gru, lstm, pack_weights, rnn

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "pack_weights", "rnn", "rnn_cell"]
