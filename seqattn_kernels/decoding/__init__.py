"""Greedy and beam search and sampling over any step function, batched, on the device the step runs on.

A step function maps the tokens of N hypotheses and a state to what comes next:

    step(tokens, state) -> (log_probs, state)            tokens [N] int64, log_probs [N, V]
    step(tokens, state) -> (log_probs, state, weights)   weights [N, S]: attention, traced back into alignments

The state is a tensor or a nested tuple, list or dict of tensors, None, plain values that need no reordering, or
anything with a method `select(index)` (its `batch_size` and `device` are used where it has them). Its tensors have the
hypotheses in dimension `batch_dim`: one number for all of them, or a structure of numbers like the state's own, with
None for a tensor that is the same for all hypotheses. An LSTM's `(h, c)` beside an encoder's output is
`batch_dim=((1, 1), 0)`.

What stays the same through all steps of a sentence, such as an encoder's output, is better given as `memory`: then the
step is called as `step(tokens, state, memory)`, and memory is only touched where sentences leave the batch. It has the
form of a state, with the sentences in dimension 0 of its tensors.
"""

from __future__ import annotations

from seqattn_kernels.decoding.beam import beam_search
from seqattn_kernels.decoding.common import Hypothesis, LengthPenalty, Step, select_state
from seqattn_kernels.decoding.greedy import greedy_search
from seqattn_kernels.decoding.sampling import sample_search

__all__ = [
    "Hypothesis",
    "LengthPenalty",
    "Step",
    "beam_search",
    "greedy_search",
    "sample_search",
    "select_state",
]
