"""Running freely: greedy decoding in one operator, searches over a decoder's steps."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels.decoding import beam_search
from seqattn_kernels.functional import DecoderState
from tests.compare import assert_close_to_float64
from tests.test_decoder import DEVICES, make, to


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("cell", "score", "order", "feedback", "output", "activation"),
    [
        ("gru", "additive", "bahdanau", "context", None, "tanh"),
        ("lstm", "general", "luong", "attentional", 9, "tanh"),
        ("rnn", "concat", "luong", "both", 23, "none"),
        ("gru", "coverage", "bahdanau", "context", None, "tanh"),
    ],
)
def test_generating(cell, score, order, feedback, output, activation, device) -> None:
    """Against a loop over steps; without `predict` the attentional vector holds the logits."""
    decoder, given = make(cell, score, order, feedback, output, 2, size=(9, 1, 20, 6, 17, 9, 5), activation=activation)
    decoder, given = decoder.to(device).requires_grad_(False), to(given, device, torch.float64)
    embedding = torch.nn.Embedding(23, 6, device=device, dtype=torch.float64).requires_grad_(False)
    predict = None
    if activation == "tanh":
        predict = torch.nn.Linear(output or 17, 23, device=device, dtype=torch.float64).requires_grad_(False)
        predict.weight.mul_(8)
    start = torch.arange(9, device=device)
    with torch.no_grad():
        state = decoder.begin(given["keys"], given["values"], lengths=given["lengths"])
        free = decoder.generate(state, embedding, predict, start=start, end=None, max_length=7)
        # A word that some rows come to, not all of them at once.
        end = Counter(free.words[:, 1:-1].flatten().tolist()).most_common(1)[0][0]
        found = decoder.generate(state, embedding, predict, start=start, end=end, max_length=7)
        word, expected, log_probs, weights = start, [], 0.0, []
        for _ in range(7):
            logits, state = decoder.step(embedding(word), state)
            logits = logits if predict is None else predict(logits)
            word = logits.argmax(1)
            expected.append(word)
            log_probs = log_probs + logits.log_softmax(1).max(1).values
            weights.append(state.weights)
    assert torch.equal(free.words, torch.stack(expected, 1))
    assert (free.lengths == 7).all()
    assert not free.finished.any()
    assert_close_to_float64((free.log_probs, free.weights), (log_probs, torch.stack(weights, 1)))
    assert found.finished.any()
    for b in range(9):
        row = free.words[b].tolist()
        length = row.index(end) + 1 if end in row else 7
        assert int(found.lengths[b]) == length
        assert bool(found.finished[b]) == (end in row)
        assert found.words[b, :length].tolist() == row[:length]
    assert found.words.shape[1] == int(found.lengths.max())


@pytest.mark.parametrize("score", ["additive", "coverage"])
def test_generating_nothing_or_from_nan(score: str) -> None:
    decoder, given = make(score=score)
    embedding = torch.randn(6, 4, dtype=torch.float64)
    predict = torch.nn.Linear(17, 6, dtype=torch.float64)
    with torch.no_grad():
        state = decoder.begin(given["keys"], given["values"])
        nothing = decoder.generate(state, embedding, predict, start=0, end=1, max_length=0)
        assert nothing.words.shape == (3, 0)
        assert nothing.weights.shape == (3, 0, 7)
        assert not nothing.finished.any()
        empty = decoder.begin(given["keys"][:0], given["values"][:0])
        assert decoder.generate(empty, embedding, predict, start=0, end=1, max_length=3).lengths.shape == (0,)
        sources = decoder.begin(given["keys"], given["values"], lengths=torch.zeros(3, dtype=torch.long))
        found = decoder.generate(sources, embedding, predict, start=0, end=None, max_length=3)
        assert (found.weights == 0).all()
        assert found.log_probs.isfinite().all()
        predict.weight.data[2] = torch.nan
        with pytest.raises(RuntimeError, match="logits: expected numbers, got NaN"):
            decoder.generate(state, embedding, predict, start=0, end=1, max_length=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"embedding": torch.zeros(6, 5)}, r"embedding: expected \[V, I\] with I=4, got \[6, 5\]"),
        ({"predict": torch.nn.Linear(16, 6)}, r"predict: expected from 17 \(output\) to V=6"),
        ({"predict": None}, r"predict: expected from 17 \(output\) to V=6"),
        ({"max_length": -1}, "max_length: expected at least 0, got -1"),
        ({"end": 6}, "end: expected a word below V=6 or None, got 6"),
        ({"start": 6}, r"start: expected words in \[0, 6\)"),
        ({"start": torch.zeros(2, dtype=torch.long)}, r"start: expected integers \[B\] with B=3, got \[2\]"),
    ],
)
def test_bad_generating(wrong: dict[str, Any], message: str) -> None:
    decoder, given = make()
    decoder.float()
    given = to(given, "cpu", torch.float32)
    options = {"embedding": torch.randn(6, 4), "predict": torch.nn.Linear(17, 6), "start": 0, "end": 1, "max_length": 3}
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        decoder.generate(decoder.begin(given["keys"], given["values"]), **options | wrong)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["additive", "dot", "location"])
def test_searching_with_a_decoder(score: str, device: str) -> None:
    """The state is reordered by the search; a beam of all sequences finds what scoring each of them finds."""
    options = {"score_options": {"filters": 2, "kernel_size": 3}} if score == "location" else {}
    decoder, given = make("gru", score, "luong", "attentional", 6, size=(3, 1, 7, 4, 17, 9, 5), **options)
    decoder, given = decoder.to(device), to(given, device, torch.float64)
    embedding = 3 * torch.randn(3, 4, device=device, dtype=torch.float64)
    predict = 3 * torch.randn(3, 6, device=device, dtype=torch.float64)

    def step(words: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState, Tensor]:
        output, state = decoder.step(embedding[words], state)
        return (output @ predict.t()).log_softmax(1), state, state.weights

    with torch.no_grad():
        state = decoder.begin(given["keys"], given["values"], lengths=given["lengths"])
        found = beam_search(step, state, start=0, end=None, max_length=4, beam=3**4, length_penalty="none")
        words = torch.tensor(list(itertools.product(range(3), repeat=4)), device=device)
        inputs = torch.cat([torch.zeros_like(words[:, :1]), words[:, :-1]], 1)
        for b, (best,) in enumerate(found):
            rows = {name: given[name][b : b + 1].expand(81, *given[name].shape[1:]) for name in ("keys", "values")}
            out = decoder(embedding[inputs], **rows, lengths=given["lengths"][b].expand(81))
            log_probs = (out.output @ predict.t()).log_softmax(-1).gather(2, words.unsqueeze(2)).sum((1, 2))
            assert best.tokens == words[log_probs.argmax()].tolist()
            assert best.log_prob == pytest.approx(log_probs.max().item())
            assert_close_to_float64(best.alignment, out.weights[log_probs.argmax()])
