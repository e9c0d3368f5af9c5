"""RNNCell, GRUCell and LSTMCell: torch.nn's single steps with another forward.

As in ``recurrent.py`` no attribute is added, so that an instance built by torch.nn can change its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from seqattn_kernels import functional
from seqattn_kernels.nn.freezing import Freezable


class _Cell(Freezable, RNNCellBase):
    """What the three share."""

    def _weight_names(self) -> Sequence[str]:
        return "weight_ih", "weight_hh", "bias_ih", "bias_hh"

    def _read_weights(self) -> Sequence[Tensor | None]:
        parameters = self._parameters
        try:  # written out, in a third of the time: a step is a few microseconds
            return parameters["weight_ih"], parameters["weight_hh"], parameters["bias_ih"], parameters["bias_hh"]
        except KeyError:
            return super()._read_weights()

    def _kind(self) -> str:
        """What `functional.pack_weights` calls the cell."""
        raise NotImplementedError

    def _pack_weights(self, weights: Sequence[Tensor | None]) -> Any:
        given = [weight for weight in weights if weight is not None]
        packed = functional.pack_weights(self._kind(), given, bias=len(given) == 4)
        return None if packed is None else packed[0]


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell``, faster: the same arguments, parameters, results and state dict.

    ``forward(input, (h, c)=None)`` with input [B, I] or [I] returns ``h, c``, each [B, H] or [H].
    """

    def _kind(self) -> str:
        return "lstm"

    def forward(self, input: Tensor, hx: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        weights, packed_weights = self._weights()
        return functional.lstm_cell(input, hx, *weights, packed_weights=packed_weights)


class GRUCell(_Cell, torch.nn.GRUCell):
    """``torch.nn.GRUCell``, faster: the same arguments, parameters, results and state dict.

    ``forward(input, h=None)`` with input [B, I] or [I] returns the next h, [B, H] or [H].
    """

    def _kind(self) -> str:
        return "gru"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        weights, packed_weights = self._weights()
        return functional.gru_cell(input, hx, *weights, packed_weights=packed_weights)


class RNNCell(_Cell, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` (tanh or relu), faster: the same arguments, parameters, results and state dict.

    ``forward(input, h=None)`` with input [B, I] or [I] returns the next h, [B, H] or [H].
    """

    def _kind(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        weights, packed_weights = self._weights()
        return functional.rnn_cell(input, hx, *weights, nonlinearity=self.nonlinearity, packed_weights=packed_weights)
