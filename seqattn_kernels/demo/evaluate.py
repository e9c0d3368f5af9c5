"""Transcribing words, and how wrong the transcriptions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seqattn_kernels.decoding import Hypothesis, beam_search, greedy_search
from seqattn_kernels.demo.data import END, MAX_PHONEMES, START, Pronunciations
from seqattn_kernels.demo.model import G2P


def transcribe(
    model: G2P, data: Pronunciations, words: Sequence[str], *, beam: int | None = None, batch_size: int = 100
) -> list[Hypothesis]:
    """The most probable pronunciation of each word, by greedy search, or by beam search with a width."""
    hypotheses: dict[int, Hypothesis] = {}
    order = sorted(range(len(words)), key=lambda i: len(words[i]))

    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chunk = order[begin : begin + batch_size]
            step, state, memory = model.searcher(*data.encode_words([words[i] for i in chunk]))
            options: dict[str, Any] = {"start": START, "end": END, "max_length": MAX_PHONEMES + 2, "memory": memory}
            if beam is None:
                found = greedy_search(step, state, **options)
            else:
                found = [best for best, *_ in beam_search(step, state, beam=beam, **options)]
            hypotheses.update(zip(chunk, found, strict=True))
    return [hypotheses[i] for i in range(len(words))]


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@dataclass(frozen=True)
class ErrorRates:
    """phoneme: edits over phonemes of the reference; word: share of words with any edit."""

    phoneme: float
    word: float


def error_rates(data: Pronunciations, words: Sequence[str], hypotheses: Sequence[Hypothesis]) -> ErrorRates:
    """Against the dictionary; of several pronunciations of a word the one that fits best counts."""
    edits = phonemes = wrong = 0
    for word, hypothesis in zip(words, hypotheses, strict=True):
        ours = data.phonemes.decode(hypothesis.tokens)
        best, length = min((edit_distance(ours, variant), len(variant)) for variant in data.dictionary[word])
        edits, phonemes, wrong = edits + best, phonemes + length, wrong + (best > 0)
    return ErrorRates(edits / phonemes, wrong / len(words))
