"""RNN, GRU and LSTM: torch.nn's modules with another forward.

Constructors, parameters, state dicts and attributes are torch.nn's own, and no attribute is added: an instance that
torch.nn built becomes one of these by having its class changed, which is what ``accelerate`` does.

Inputs and results are those of torch.nn (dense, unbatched or ``PackedSequence``), with two options more:

lengths:
    Integer tensor [B] on any device, in any order, zeros allowed, for dense batched input: sequence b ends after
    ``lengths[b]`` steps. Outputs past the end are zero, and the final states are those of the last step (the initial
    states where the length is 0; a reverse direction starts at the last step).
return_all_states:
    Also return the states of every step of the last layer: cell states for LSTM, hidden states otherwise, laid out as
    the output is.

``torch.compile`` treats them as it treats torch.nn's: its graph breaks around them (``fullgraph=True`` raises) until
``torch._dynamo.config.allow_rnn`` is True; then each is a few operators in the graph, whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from seqattn_kernels import functional
from seqattn_kernels.nn.freezing import Freezable


class _Recurrent(Freezable, RNNBase):
    """What the three share."""

    def _weight_names(self) -> Sequence[str]:
        return self._flat_weights_names

    def _pack_weights(self, weights: Sequence[Any]) -> Any:
        return self._pack(weights, None)

    def _pack_bfloat16(self, weights: Sequence[Any]) -> Any:
        return self._pack(weights, torch.bfloat16)

    def _pack(self, weights: Sequence[Any], dtype: torch.dtype | None) -> Any:
        return functional.pack_weights(
            self.mode.lower(),
            weights,
            num_layers=self.num_layers,
            bias=self.bias,
            bidirectional=self.bidirectional,
            dtype=dtype,
        )


class LSTM(_Recurrent, torch.nn.LSTM):
    """``torch.nn.LSTM``, faster: the same arguments, parameters, results and state dict.

    ``forward(input, hx=None, *, lengths=None, return_all_states=False)`` returns ``output, (h_n, c_n)``, and the cell
    states of every step after them if ``return_all_states``. See Hochreiter and Schmidhuber (1997),
    "Long short-term memory".
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        weights, packed_weights = self._weights()
        return functional.lstm(
            input,
            hx,
            weights,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            lengths=lengths,
            return_all_states=return_all_states,
            packed_weights=packed_weights,
        )


class GRU(_Recurrent, torch.nn.GRU):
    """``torch.nn.GRU``, faster: the same arguments, parameters, results and state dict.

    ``forward(input, hx=None, *, lengths=None, return_all_states=False)`` returns ``output, h_n``, and the states of
    every step after them if ``return_all_states``. See Cho et al. (2014), "Learning phrase representations using RNN
    encoder-decoder"; as in torch.nn, the reset gate is applied after the product with W_hn.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        weights, packed_weights = self._weights()
        return functional.gru(
            input,
            hx,
            weights,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            lengths=lengths,
            return_all_states=return_all_states,
            packed_weights=packed_weights,
        )


class RNN(_Recurrent, torch.nn.RNN):
    """``torch.nn.RNN`` (tanh or relu), faster: the same arguments, parameters, results and state dict.

    ``forward(input, hx=None, *, lengths=None, return_all_states=False)`` returns ``output, h_n``, and the states of
    every step after them if ``return_all_states``. See Elman (1990), "Finding structure in time".
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        weights, packed_weights = self._weights()
        return functional.rnn(
            input,
            hx,
            weights,
            # Not self.nonlinearity: checkpoints of older torch versions lack it.
            nonlinearity="relu" if self.mode == "RNN_RELU" else "tanh",
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            lengths=lengths,
            return_all_states=return_all_states,
            packed_weights=packed_weights,
        )
