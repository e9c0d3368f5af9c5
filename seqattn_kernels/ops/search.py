"""The operator of a beam search's step."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import native
from seqattn_kernels.ops.fakes import register_fake

Grown = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_DTYPES = (torch.float32, torch.float64)

if native.extension is not None:

    @register_fake("seqattn::beam_grow")
    def _(log_probs, scores, end):
        number = torch.empty_like(scores, dtype=torch.long)
        return torch.empty_like(scores), number, number.clone(), torch.empty_like(scores), number.clone()


def serves(log_probs: Tensor, scores: Tensor) -> bool:
    """Whether `beam_grow` takes them."""
    return (
        native.extension is not None
        and log_probs.device.type == "cpu"
        and log_probs.dtype in _DTYPES
        and scores.dtype == log_probs.dtype
    )


def beam_grow(log_probs: Tensor, scores: Tensor, end: int | None) -> Grown:
    """The best continuations of prefixes with log-probabilities `scores` [A, K] by words `log_probs` [A * K, V].

    -> of the K best that go on, best first: log-probabilities, parents and words [A, K], -inf where there are fewer; of
    those among the K best that end: log-probabilities and parents [A, K], -inf at the others' places.
    """
    return torch.ops.seqattn.beam_grow.default(log_probs, scores, -1 if end is None else end)
