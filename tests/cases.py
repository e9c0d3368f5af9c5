"""The sizes, kinds and dtypes that tests draw from."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Below, at and past the width of a vector register, and sizes no block divides.
ODD_SIZES = (1, 3, 7, 16, 63, 257)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RecurrentKind:
    """One cell: how torch.nn builds it and what our functions call it."""

    name: str
    gates: int
    module: Callable[..., nn.RNNBase]
    cell: Callable[..., nn.RNNCellBase]
    function: str  # in seqattn_kernels.functional; its cell is <function>_cell
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def has_cell_state(self) -> bool:
        return self.name == "lstm"

    def stock(self, input_size: int, hidden_size: int, **options: Any) -> nn.RNNBase:
        """torch.nn's module."""
        return self.module(input_size, hidden_size, **dict(self.options), **options)

    def stock_cell(self, input_size: int, hidden_size: int, **options: Any) -> nn.RNNCellBase:
        """torch.nn's single-step cell."""
        return self.cell(input_size, hidden_size, **dict(self.options), **options)

    def run(self, *args: Any, **options: Any) -> Any:
        """Our function over a sequence."""
        return self._function(self.function)(*args, **dict(self.options), **options)

    def step(self, *args: Any, **options: Any) -> Any:
        """Our function for one step."""
        return self._function(f"{self.function}_cell")(*args, **dict(self.options), **options)

    def state(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | tuple[Tensor, Tensor]:
        """A random initial state of the shape of h (an LSTM's c alike)."""
        h = torch.randn(*shape, dtype=dtype) / 2
        return (h, torch.randn(*shape, dtype=dtype)) if self.has_cell_state else h

    @staticmethod
    def _function(name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module("seqattn_kernels.functional"), name)


KINDS: dict[str, RecurrentKind] = {
    kind.name: kind
    for kind in (
        RecurrentKind("lstm", 4, nn.LSTM, nn.LSTMCell, "lstm"),
        RecurrentKind("gru", 3, nn.GRU, nn.GRUCell, "gru"),
        RecurrentKind("rnn_tanh", 1, nn.RNN, nn.RNNCell, "rnn"),
        RecurrentKind("rnn_relu", 1, nn.RNN, nn.RNNCell, "rnn", (("nonlinearity", "relu"),)),
    )
}

# (B, T, I, H) of small sequences: single elements, tails of every vector width, an even one.
SEQUENCES: tuple[tuple[int, int, int, int], ...] = (
    (1, 1, 1, 1),
    (1, 5, 3, 7),
    (2, 3, 16, 16),
    (3, 7, 5, 63),
    (7, 4, 63, 33),
    (9, 2, 17, 257),
    (4, 6, 32, 64),
)

# (B, T, S, A, D) of attention: one query, one key, tails, an even one.
ATTENTIONS: tuple[tuple[int, int, int, int, int], ...] = (
    (1, 1, 1, 1, 1),
    (2, 1, 5, 3, 7),
    (3, 4, 17, 16, 16),
    (2, 7, 33, 63, 5),
    (2, 3, 16, 257, 63),
)
