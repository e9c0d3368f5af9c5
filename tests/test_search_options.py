"""What narrows or widens a search: rules for tokens, coverage, groups, exact stops, sampling."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from seqattn_kernels.decoding import beam_search, greedy_search, sample_search
from tests.test_decoding import Table, normalise

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def allowed(tokens: tuple[int, ...], end: int, min_length: int, ngram: int) -> bool:
    """Whether a finished sequence, end token included, follows the rules."""
    if len(tokens) < min_length:
        return False
    grams = [tokens[i : i + ngram] for i in range(len(tokens) - ngram + 1)] if ngram else []
    return len(set(grams)) == len(grams)


def finished_sequences(table: Table, end: int, length: int) -> list[tuple[int, ...]]:
    words = [w for w in range(table.vocabulary) if w != end]
    return [(*t, end) for n in range(length) for t in itertools.product(words, repeat=n)]


def coverage(table: Table, sentence: int, tokens: tuple[int, ...], beta: float, source: int) -> float:
    """Of all looks, the one that gave the end token included."""
    weights = table.path_weights(sentence, list(tokens)).sum(0)[:source]
    return beta * weights.clamp(max=1).log().sum().item()


@pytest.mark.parametrize(("min_length", "ngram"), [(0, 1), (0, 2), (3, 0), (4, 2), (5, 3), (1, 0)])
@pytest.mark.parametrize("stop", ["beam", "bound"])
def test_rules_against_brute_force(min_length: int, ngram: int, stop: Any) -> None:
    table = Table(batch=4, vocabulary=3, length=5, seed=11)
    options: dict[str, Any] = {
        "start": 0,
        "end": 1,
        "max_length": 5,
        "min_length": min_length,
        "no_repeat_ngram": ngram,
    }
    found = beam_search(table.step, table.begin(), beam=3**5, stop=stop, **options)
    for sentence, (best,) in enumerate(found):
        legal = [t for t in finished_sequences(table, 1, 5) if allowed(t, 1, min_length, ngram)]
        scores = {t: normalise(table.score(sentence, t), len(t), "wu", 0.6) for t in legal}
        expected = max(scores, key=lambda t: scores[t])
        assert tuple(best.tokens) == expected[:-1]
        assert best.score == pytest.approx(scores[expected])


@pytest.mark.parametrize(("min_length", "ngram"), [(0, 1), (0, 2), (6, 0), (6, 3)])
def test_rules_of_greedy_search_and_sampling(min_length: int, ngram: int) -> None:
    table = Table(batch=40, vocabulary=4, length=6, seed=12)
    options: dict[str, Any] = {
        "start": 0,
        "end": 2,
        "max_length": 6,
        "min_length": min_length,
        "no_repeat_ngram": ngram,
    }
    greedy = greedy_search(table.step, table.begin(), **options)
    for sentence, h in enumerate(greedy):
        prefix: tuple[int, ...] = ()
        for token in (*h.tokens, *([2] if h.finished else [])):
            legal = [w for w in range(4) if allowed((*prefix, w), 2, min_length if w == 2 else 0, ngram)]
            assert token == max(legal, key=lambda w: table.score(sentence, (*prefix, w)))
            prefix = (*prefix, token)
    for h in itertools.chain.from_iterable(sample_search(table.step, table.begin(), samples=3, **options)):
        whole = (*h.tokens, 2) if h.finished else tuple(h.tokens)
        assert allowed(whole, 2, min_length if h.finished else 0, ngram)


def test_rules_that_leave_nothing_end_the_hypothesis() -> None:
    table = Table(batch=2, vocabulary=2, length=5, seed=13)
    options: dict[str, Any] = {"start": 0, "end": None, "max_length": 5, "no_repeat_ngram": 1}
    for h in greedy_search(table.step, table.begin(), **options):
        assert sorted(h.tokens) == [0, 1]
        assert not h.finished
    for (h,) in beam_search(table.step, table.begin(), beam=3, **options):
        assert sorted(h.tokens) == [0, 1]
        assert not h.finished


@pytest.mark.parametrize("stop", ["beam", "bound"])
@pytest.mark.parametrize("beta", [0.2, 3.0])
def test_coverage_against_brute_force(beta: float, stop: Any) -> None:
    table = Table(batch=5, vocabulary=3, length=4, seed=14)
    lengths = torch.tensor([4, 3, 1, 2, 4])
    found = beam_search(
        table.step, table.begin(), start=0, end=0, max_length=4, beam=3**4, n_best=4, coverage_penalty=beta,
        source_lengths=lengths, stop=stop,
    )  # fmt: skip
    changed = 0
    for sentence, hypotheses in enumerate(found):
        plain = {t: normalise(table.score(sentence, t), len(t), "wu", 0.6) for t in finished_sequences(table, 0, 4)}
        scores = {t: s + coverage(table, sentence, t, beta, int(lengths[sentence])) for t, s in plain.items()}
        expected = sorted(scores, key=lambda t: -scores[t])[:4]
        assert [(*h.tokens, 0) for h in hypotheses] == expected
        assert [h.score for h in hypotheses] == pytest.approx([scores[t] for t in expected], abs=1e-5)
        changed += expected[0] != max(plain, key=lambda t: plain[t])
    assert changed or beta < 1


@pytest.mark.parametrize("kind", ["wu", "average", "none"])
@pytest.mark.parametrize("coverage_penalty", [0.0, 0.5])
def test_stopping_at_the_bound_is_exact(kind: Any, coverage_penalty: float) -> None:
    """The same n best as when nothing stops early, with fewer steps."""
    saved = 0
    for seed in range(5):
        stopped, whole = Table(2, 4, 6, seed), Table(2, 4, 6, seed)
        options: dict[str, Any] = {
            "start": 0, "end": 3, "max_length": 6, "beam": 4, "length_penalty": kind,
            "coverage_penalty": coverage_penalty,
        }  # fmt: skip
        best = beam_search(stopped.step, stopped.begin(), n_best=2, stop="bound", **options)
        every = never_stopping(whole, n_best=2, **options)
        assert [[(h.tokens, h.finished) for h in hs] for hs in best] == every
        saved += sum(whole.calls) - sum(stopped.calls)
    assert saved > 0 or (coverage_penalty and kind == "average")  # there the bound is far above what comes


def never_stopping(table: Table, n_best: int, **options: Any) -> list[list[tuple[list[int], bool]]]:
    """One sentence at a time, in lists: all `max_length` steps, then the best."""
    beam, end, kind, beta = options["beam"], options["end"], options["length_penalty"], options["coverage_penalty"]
    results = []
    for sentence in range(len(table.log_probs)):
        live, done = [(0.0, ())], []
        for n in range(1, options["max_length"] + 1):
            table.calls.append(beam)
            grown = [(table.score(sentence, (*t, w)), (*t, w)) for _, t in live for w in range(table.vocabulary)]
            grown.sort(key=lambda pair: -pair[0])
            for total, t in grown[:beam]:
                if t[-1] == end:
                    covered = coverage(table, sentence, t, beta, 4) if beta else 0.0
                    done.append((normalise(total, n, kind, 0.6) + covered, list(t[:-1])))
            live = [pair for pair in grown if pair[1][-1] != end][:beam]
        done.sort(key=lambda pair: -pair[0])
        rest = [
            (normalise(total, n, kind, 0.6) + (coverage(table, sentence, t, beta, 4) if beta else 0.0), list(t))
            for total, t in live
        ]
        rest.sort(key=lambda pair: -pair[0])
        results.append([*((t, True) for _, t in done), *((t, False) for _, t in rest)][:n_best])
    return results


@pytest.mark.parametrize("diversity", [0.0, 0.7, 50.0])
def test_groups(diversity: float) -> None:
    """Against a search of one group after the other, in lists."""
    table = Table(batch=5, vocabulary=5, length=4, seed=15)
    found = beam_search(
        table.step, table.begin(), start=0, end=None, max_length=4, beam=6, groups=3, diversity=diversity, n_best=6,
        length_penalty="none",
    )  # fmt: skip
    for sentence, hypotheses in enumerate(found):
        groups: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] for _ in range(3)]
        for _ in range(4):
            taken: Counter[int] = Counter()
            for g, live in enumerate(groups):
                grown = [(table.score(sentence, (*t, w)), (*t, w)) for _, t in live for w in range(5)]
                grown.sort(key=lambda pair: -(pair[0] - diversity * taken[pair[1][-1]]))
                groups[g] = grown[:2]
                taken.update(t[-1] for _, t in groups[g])
        expected = sorted(itertools.chain.from_iterable(groups), key=lambda pair: -pair[0])
        assert [h.score for h in hypotheses] == pytest.approx([score for score, _ in expected])
        assert sorted(h.tokens for h in hypotheses) == sorted(list(t) for _, t in expected)


def test_samples_follow_the_distribution() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return log_probs.expand(len(tokens), -1), state

    def shares(**options: Any) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        (found,) = sample_search(
            step, None, start=0, end=None, max_length=1, samples=4000, batch_size=1, generator=generator, **options
        )
        counts = Counter(h.tokens[0] for h in found)
        for h in found[:20]:
            assert h.log_prob == pytest.approx(log_probs[0, h.tokens[0]].item())
        return [counts[w] / 4000 for w in range(4)]

    assert shares() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    squares = [p * p for p in (0.5, 0.25, 0.15, 0.1)]
    assert shares(temperature=0.5) == pytest.approx([s / sum(squares) for s in squares], abs=0.03)
    assert shares(temperature=0) == [1, 0, 0, 0]
    assert shares(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert shares(top_k=9) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert shares(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert shares(top_p=0.76) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.03)
    assert shares(top_p=1e-9) == [1, 0, 0, 0]
    assert shares(top_k=3, top_p=0.5) == [1, 0, 0, 0]


def test_samples_are_those_of_their_sentences() -> None:
    table = Table(batch=6, vocabulary=4, length=5, seed=16)
    options: dict[str, Any] = {"start": 0, "end": 1, "max_length": 5}
    found = sample_search(table.step, table.begin(), samples=7, **options)
    assert [len(hs) for hs in found] == [7] * 6
    for sentence, hypotheses in enumerate(found):
        for h in hypotheses:
            whole = (*h.tokens, 1) if h.finished else tuple(h.tokens)
            assert h.log_prob == pytest.approx(table.score(sentence, whole))
            assert h.alignment is not None
            assert torch.equal(h.alignment, table.path_weights(sentence, h.tokens))
    cold = sample_search(table.step, table.begin(), temperature=0, **options)
    greedy = greedy_search(table.step, table.begin(), **options)
    assert [h[0].tokens for h in cold] == [h.tokens for h in greedy]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("search", ["greedy", "beam", "sample"])
def test_searches_stay_on_the_device(search: str, device: str) -> None:
    logits = torch.randn(4, 5, 7, device=device).log_softmax(-1)

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert tokens.device == state.device == logits.device
        return logits[state[:, 0], tokens % 5], state, torch.ones(len(tokens), 3, device=device)

    state = torch.arange(4, device=device).unsqueeze(1)
    options: dict[str, Any] = {"start": 0, "end": 3, "max_length": 6, "no_repeat_ngram": 2, "min_length": 2}
    if search == "greedy":
        assert len(greedy_search(step, state, **options)) == 4
    elif search == "beam":
        found = beam_search(step, state, beam=4, groups=2, coverage_penalty=0.1, n_best=2, **options)
        assert [len(hs) for hs in found] == [2] * 4
    else:
        assert [len(hs) for hs in sample_search(step, state, samples=2, top_k=3, top_p=0.9, **options)] == [2] * 4


@pytest.mark.parametrize("search", [greedy_search, beam_search, sample_search])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 4}, r"min_length: expected 0 to 3 \(from max_length\), got 4"),
        ({"min_length": -1}, "min_length: expected 0 to 3"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: expected at least 0, got -1"),
    ],
)
def test_bad_rules(search: Any, options: dict[str, Any], message: str) -> None:
    table = Table(1, 3, 3, 0)
    with pytest.raises(ValueError, match=message):
        search(table.step, table.begin(), **{"start": 0, "end": 1, "max_length": 3} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected at least 0"),
        ({"temperature": math.nan}, "temperature: expected at least 0"),
        ({"top_k": 0}, "top_k: expected at least 1 or None, got 0"),
        ({"top_p": 0.0}, "top_p: expected a number above 0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0 and at most 1"),
    ],
)
def test_bad_sampling(options: dict[str, Any], message: str) -> None:
    table = Table(1, 3, 3, 0)
    with pytest.raises(ValueError, match=message):
        sample_search(table.step, table.begin(), **{"start": 0, "end": 1, "max_length": 3} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, r"groups: expected a divisor of 5 \(beam\), got 2"),
        ({"groups": 0}, "groups: expected a divisor"),
        ({"groups": 5, "diversity": -0.1}, "diversity: expected at least 0, got -0.1"),
        ({"stop": "early"}, "stop: expected 'beam' or 'bound', got 'early'"),
        ({"coverage_penalty": -1.0}, "coverage_penalty: expected at least 0"),
        ({"coverage_penalty": 1.0, "source_lengths": torch.ones(3)}, r"source_lengths: expected \[B\] with B=1"),
    ],
)
def test_bad_beams(options: dict[str, Any], message: str) -> None:
    table = Table(1, 3, 3, 0)
    with pytest.raises(ValueError, match=message):
        beam_search(table.step, table.begin(), **{"start": 0, "end": 1, "max_length": 3} | options)


def test_coverage_needs_weights() -> None:
    table = Table(1, 3, 3, 0)
    with pytest.raises(ValueError, match="coverage_penalty: expected a step that returns weights"):
        beam_search(
            lambda t, s: table.step(t, s)[:2], table.begin(), start=0, end=1, max_length=3, coverage_penalty=1.0
        )


@pytest.mark.parametrize("samples", [1, 3])
def test_sampling_without_length_or_probability(samples: int) -> None:
    table = Table(2, 3, 3, 0)
    for hypotheses in sample_search(table.step, table.begin(), start=0, end=1, max_length=0, samples=samples):
        assert [h.tokens for h in hypotheses] == [[]] * samples

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.full((len(tokens), 3), -math.inf), state

    found = sample_search(step, None, start=0, end=1, max_length=3, batch_size=2, samples=samples)
    assert all(h.tokens == [] and not h.finished and h.log_prob == 0 for hs in found for h in hs)
