"""Greedy and beam search against brute force, over step functions given as tables."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seqattn_kernels import native
from seqattn_kernels.decoding import Hypothesis, beam_search, greedy_search, select_state
from seqattn_kernels.decoding.beam import _grow
from seqattn_kernels.functional import additive_attention, prepare_keys
from seqattn_kernels.ops import search
from tests.compare import assert_same_bits

pytestmark = pytest.mark.usefixtures("device")


class Table:
    """A language model whose next token depends on the whole prefix, by a random table for each sentence."""

    def __init__(self, batch: int, vocabulary: int, length: int, seed: int, source: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.length = vocabulary, length
        self.nodes = sum((vocabulary + 1) ** t for t in range(length + 1)) + 1
        host: dict[str, Any] = {"generator": generator, "device": "cpu"}
        here = torch.get_default_device()
        self.logits = 2 * torch.randn(batch, self.nodes, vocabulary, dtype=torch.float64, **host).to(here)
        self.log_probs = self.logits.log_softmax(-1)
        self.weights = torch.rand(batch, self.nodes, source, **host).softmax(-1).to(here)
        self.calls: list[int] = []

    def begin(self) -> dict[str, Any]:
        batch = len(self.log_probs)
        return {"sentence": torch.arange(batch), "node": torch.zeros(batch, dtype=torch.long), "first": True}

    def step(self, tokens: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any], Tensor]:
        self.calls.append(len(tokens))
        node = state["node"] if state["first"] else self.child(state["node"], tokens)
        return (
            self.log_probs[state["sentence"], node],
            {"sentence": state["sentence"], "node": node, "first": False},
            self.weights[state["sentence"], node],
        )

    def child(self, node: Any, token: Any) -> Any:
        return node * (self.vocabulary + 1) + token + 1

    def score(self, sentence: int, tokens: tuple[int, ...]) -> float:
        node, total = 0, 0.0
        for token in tokens:
            total += self.log_probs[sentence, node, token].item()
            node = self.child(node, token)
        return total

    def path_weights(self, sentence: int, tokens: list[int]) -> Tensor:
        node, rows = 0, []
        for token in tokens:
            rows.append(self.weights[sentence, node])
            node = self.child(node, token)
        return torch.stack(rows) if rows else torch.zeros(0, self.weights.size(2))


def normalise(total: float, length: int, kind: str, alpha: float) -> float:
    return total / {"wu": ((5 + length) / 6) ** alpha, "average": length, "none": 1}[kind]


def brute_force(table: Table, sentence: int, end: int | None, kind: str, alpha: float) -> list[tuple[float, list[int]]]:
    """Every finished sequence of at most `length` tokens, or without an end token every one of `length`, best first."""
    found = []
    words = [w for w in range(table.vocabulary) if w != end]
    if end is None:
        for tokens in itertools.product(words, repeat=table.length):
            found.append((normalise(table.score(sentence, tokens), table.length, kind, alpha), list(tokens)))
    else:
        for n in range(table.length):
            for tokens in itertools.product(words, repeat=n):
                total = table.score(sentence, (*tokens, end))
                found.append((normalise(total, n + 1, kind, alpha), list(tokens)))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("end", [None, 0, 2])
@pytest.mark.parametrize(("kind", "alpha"), [("wu", 0.6), ("wu", 0.0), ("wu", 2.0), ("average", 0.6), ("none", 0.6)])
def test_a_beam_of_all_sequences_finds_the_optimum(end: int | None, kind: Any, alpha: float) -> None:
    table = Table(batch=5, vocabulary=3, length=4, seed=1)
    found = beam_search(
        table.step, table.begin(), start=0, end=end, max_length=4, beam=3**4, n_best=7, length_penalty=kind, alpha=alpha
    )
    assert len(found) == 5
    for sentence, hypotheses in enumerate(found):
        expected = brute_force(table, sentence, end, kind, alpha)[:7]
        assert [h.tokens for h in hypotheses] == [tokens for _, tokens in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for score, _ in expected])
        assert all(h.finished == (end is not None) for h in hypotheses)


@pytest.mark.parametrize("end", [None, 1])
@pytest.mark.parametrize("beam", [1, 2, 3, 5, 8])
def test_beam_search_against_a_plain_one(end: int | None, beam: int) -> None:
    table = Table(batch=4, vocabulary=4, length=5, seed=2)
    found = beam_search(table.step, table.begin(), start=0, end=end, max_length=5, beam=beam, n_best=beam)
    for sentence in range(4):
        expected = plain_beam_search(table, sentence, end, beam)
        assert [h.tokens for h in found[sentence]] == [tokens for _, tokens, _ in expected]
        assert [h.score for h in found[sentence]] == pytest.approx([score for score, _, _ in expected])
        assert [h.finished for h in found[sentence]] == [finished for _, _, finished in expected]


def plain_beam_search(table: Table, sentence: int, end: int | None, beam: int) -> list[tuple[float, list[int], bool]]:
    """One sentence, lists and sorting, without the early stop by a bound (n_best = beam leaves it nothing to cut)."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, list[int], bool]] = []
    for length in range(1, table.length + 1):
        grown = [(table.score(sentence, (*t, w)), (*t, w)) for _, t in live for w in range(table.vocabulary)]
        grown.sort(key=lambda pair: -pair[0])
        for total, tokens in grown[:beam]:
            if tokens[-1] == end:
                finished.append((normalise(total, length, "wu", 0.6), list(tokens[:-1]), True))
        live = [pair for pair in grown if pair[1][-1] != end][:beam]
        if len(finished) >= beam:
            break
    finished.sort(key=lambda item: -item[0])
    if length == table.length:
        finished += [(normalise(total, length, "wu", 0.6), list(tokens), False) for total, tokens in live]
    return finished[:beam]


def test_the_early_stop_changes_no_result() -> None:
    """n_best=1 may stop before n_best=beam does; the best hypothesis is the same, and steps are saved."""
    saved = 0
    for seed in range(10):
        one, all_ = Table(6, 4, 6, seed), Table(6, 4, 6, seed)
        options: dict[str, Any] = dict(start=0, end=3, max_length=6, beam=6, length_penalty="average")
        first = beam_search(one.step, one.begin(), n_best=1, **options)
        every = beam_search(all_.step, all_.begin(), n_best=6, **options)
        assert [h[0].tokens for h in first] == [h[0].tokens for h in every]
        saved += sum(all_.calls) - sum(one.calls)
    assert saved > 0


@pytest.mark.parametrize("end", [None, 1])
def test_a_beam_of_one_is_greedy_search(end: int | None) -> None:
    table = Table(batch=7, vocabulary=5, length=6, seed=3)
    greedy = greedy_search(table.step, table.begin(), start=0, end=end, max_length=6)
    beam = beam_search(table.step, table.begin(), start=0, end=end, max_length=6, beam=1)
    assert len({len(h.tokens) for h in greedy}) > 1 or end is None
    for sentence, (g, (b,)) in enumerate(zip(greedy, beam, strict=True)):
        assert (g.tokens, g.finished) == (b.tokens, b.finished)
        whole = (*g.tokens, end) if g.finished and end is not None else tuple(g.tokens)
        assert g.log_prob == pytest.approx(b.log_prob) == pytest.approx(table.score(sentence, whole))
        assert g.alignment is not None
        assert b.alignment is not None
        assert torch.equal(g.alignment, b.alignment)


@pytest.mark.parametrize("end", [None, 0])
def test_alignments_are_those_of_each_hypothesis(end: int | None) -> None:
    table = Table(batch=3, vocabulary=4, length=5, seed=4)
    found = beam_search(table.step, table.begin(), start=0, end=end, max_length=5, beam=4, n_best=4)
    for sentence, hypotheses in enumerate(found):
        for h in hypotheses:
            assert h.alignment is not None
            assert h.alignment.shape == (len(h.tokens), 4)
            assert torch.equal(h.alignment, table.path_weights(sentence, h.tokens))


@pytest.mark.parametrize("beam", [None, 1, 4])
def test_memory_is_what_stays(beam: int | None) -> None:
    """The number of the sentence as memory and not as state: the same hypotheses."""
    table = Table(batch=6, vocabulary=4, length=5, seed=5)

    def step(tokens: Tensor, state: dict[str, Any], memory: list[Tensor]) -> tuple[Tensor, Any, Tensor]:
        log_probs, state, weights = table.step(tokens, state | {"sentence": memory[0]})
        return log_probs, {"node": state["node"], "first": False}, weights

    whole = table.begin()
    parts = {"node": whole["node"], "first": True}
    options: dict[str, Any] = dict(start=0, end=3, max_length=5)
    if beam is None:
        expected = greedy_search(table.step, whole, **options)
        got = greedy_search(step, parts, memory=[whole["sentence"]], **options)
    else:
        expected = [h for h, *_ in beam_search(table.step, whole, beam=beam, **options)]
        got = [h for h, *_ in beam_search(step, parts, memory=[whole["sentence"]], beam=beam, **options)]
    assert [(h.tokens, h.log_prob) for h in got] == [(h.tokens, h.log_prob) for h in expected]


def test_sentences_do_not_disturb_each_other() -> None:
    table = Table(batch=6, vocabulary=4, length=5, seed=5)
    options: dict[str, Any] = dict(start=0, end=3, max_length=5, beam=3, n_best=2)
    together = beam_search(table.step, table.begin(), **options)
    for sentence in range(6):
        state = {"sentence": torch.tensor([sentence]), "node": torch.zeros(1, dtype=torch.long), "first": True}
        (alone,) = beam_search(table.step, state, **options)
        assert [h.tokens for h in alone] == [h.tokens for h in together[sentence]]


def test_finished_sentences_leave_the_batch() -> None:
    """Sentence b ends after b + 1 tokens: the step is called with fewer and fewer rows."""
    calls = []

    def step(tokens: Tensor, state: tuple[Tensor, int]) -> tuple[Tensor, tuple[Tensor, int]]:
        left, count = state
        calls.append(len(tokens))
        logits = torch.stack([-10.0 * left, 10.0 * left - 5], dim=1)
        return logits.log_softmax(1), (left - 1, count + 1)

    hypotheses = greedy_search(step, (torch.arange(4.0), 0), start=1, end=0, max_length=9, batch_dim=(0, None))
    assert [len(h.tokens) for h in hypotheses] == [0, 1, 2, 3]
    assert calls == [4, 3, 2, 1]


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


class Custom:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def select(self, index: Tensor) -> Custom:
        return Custom(self.rows[index])


def test_select_state_reaches_into_every_structure() -> None:
    x = torch.arange(6.0)
    index = torch.tensor([4, 4, 0])
    state = {
        "lstm": (x.view(1, 6, 1), x.view(1, 6, 1) + 10),
        "memory": [x, x + 1],
        "pair": Pair(x + 2, x + 3),
        "custom": Custom(x + 4),
        "shared": x,
        "nothing": None,
        "count": 3,
        "scalar": torch.tensor(2.0),
    }
    dims = dict.fromkeys(state, 0) | {"lstm": (1, 1), "shared": None}
    got = select_state(state, index, dims)
    expected = torch.tensor([4.0, 4, 0])
    assert torch.equal(got["lstm"][0].flatten(), expected)
    assert torch.equal(got["lstm"][1].flatten(), expected + 10)
    assert isinstance(got["memory"], list)
    assert torch.equal(got["memory"][1], expected + 1)
    assert isinstance(got["pair"], Pair)
    assert torch.equal(got["pair"].c, expected + 3)
    assert torch.equal(got["custom"].rows, expected + 4)
    assert got["shared"] is x
    assert got["nothing"] is None
    assert got["count"] == 3
    assert got["scalar"].item() == 2
    with pytest.raises(ValueError, match=r"batch_dim: expected 2 entries \(from the state\), got 3"):
        select_state((x, x), index, (0, 0, 0))
    with pytest.raises(ValueError, match="batch_dim: expected the state's keys"):
        select_state({"a": x}, index, {"b": 0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prepared_keys_are_a_state(dtype: torch.dtype) -> None:
    keys, v = torch.randn(3, 5, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    index = torch.tensor([2, 0, 0, 1])
    query = torch.randn(4, 8, dtype=dtype)
    selected = select_state({"keys": prepare_keys(keys)}, index)["keys"]
    for got, expected in zip(
        additive_attention(query, selected, v), additive_attention(query, keys[index], v), strict=True
    ):
        assert got is not None
        assert expected is not None
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["wu", "average", "none"])
def test_beam_wider_than_the_vocabulary(kind: Any) -> None:
    table = Table(batch=3, vocabulary=2, length=3, seed=6)
    found = beam_search(
        table.step, table.begin(), start=0, end=1, max_length=3, beam=50, n_best=50, length_penalty=kind
    )
    for sentence, hypotheses in enumerate(found):
        finished = [h for h in hypotheses if h.finished]
        assert [h.tokens for h in finished] == [tokens for _, tokens in brute_force(table, sentence, 1, kind, 0.6)]
        assert [h.tokens for h in hypotheses if not h.finished] == [[0, 0, 0]]


def uniform(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    return torch.full((len(tokens), 4), math.log(0.25)), state


def test_no_length_gives_empty_hypotheses() -> None:
    assert (
        greedy_search(uniform, None, start=0, end=1, max_length=0, batch_size=2)
        == [Hypothesis([], 0.0, 0.0, False)] * 2
    )
    assert (
        beam_search(uniform, None, start=0, end=1, max_length=0, batch_size=2)
        == [[Hypothesis([], 0.0, 0.0, False)]] * 2
    )


def test_no_sentences_give_no_hypotheses() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert greedy_search(uniform, None, start=empty, end=1, max_length=3) == []
    assert beam_search(uniform, None, start=empty, end=1, max_length=3) == []


@pytest.mark.parametrize("beam", [None, 1, 4])
def test_a_sentence_without_any_possible_token_still_gets_a_hypothesis(beam: int | None) -> None:
    def step(tokens: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.full((len(tokens), 3), -math.inf)
        logits[:, 1] = torch.where(count < 2, math.log(0.5), -math.inf)
        return logits, count + 1

    state = torch.tensor([0, 2])
    if beam is None:
        first, second = greedy_search(step, state, start=0, end=2, max_length=5)
    else:
        [first], [second] = beam_search(step, state, start=0, end=2, max_length=5, beam=beam)
    assert (first.tokens, first.finished) == ([1, 1], False)
    assert first.log_prob == pytest.approx(2 * math.log(0.5))
    assert (second.tokens, second.finished, second.log_prob) == ([], False, 0)


def test_a_memory_that_grows_pads_the_alignments() -> None:
    def step(tokens: Tensor, length: int) -> tuple[Tensor, int, Tensor]:
        return uniform(tokens, None)[0], length + 1, torch.full((len(tokens), length), 1 / length)

    expected = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    (greedy,) = greedy_search(step, 1, start=0, end=None, max_length=3, batch_size=1)
    ((beam,),) = beam_search(step, 1, start=0, end=None, max_length=3, batch_size=1, beam=2)
    assert greedy.alignment is not None
    assert torch.equal(greedy.alignment, expected)
    assert beam.alignment is not None
    assert torch.equal(beam.alignment, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_log_probabilities(dtype: torch.dtype) -> None:
    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.tensor([[1.0, 2.0, 0.5]]).log_softmax(1).to(dtype).expand(len(tokens), 3), state

    (greedy,) = greedy_search(step, None, start=0, end=2, max_length=200, batch_size=1)
    ((beam,),) = beam_search(step, None, start=0, end=2, max_length=200, batch_size=1, beam=1)
    expected = 200 * torch.tensor([1.0, 2.0, 0.5]).log_softmax(0)[1].to(dtype).item()
    assert greedy.log_prob == pytest.approx(expected, rel=1e-4)
    assert beam.log_prob == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda n: torch.full((n, 4), math.nan), ValueError, "step: expected log-probabilities, got NaN"),
        (lambda n: torch.full((n, 4), 3.0), ValueError, "got 3 > 0; apply log_softmax"),
        (lambda n: torch.full((n, 4), math.inf), ValueError, "got inf > 0"),
        (lambda n: torch.zeros(n), ValueError, r"step: expected log_probs \[N, V\] with N=\d+ \(from tokens\), got"),
        (lambda n: torch.zeros(n + 1, 4), ValueError, r"step: expected log_probs \[N, V\] with N="),
        (lambda n: torch.zeros(n, 4, dtype=torch.long), TypeError, "floating-point tensor, got .* of torch.int64"),
        (lambda n: [0.0] * n, TypeError, "floating-point tensor, got list"),
    ],
)
def test_bad_log_probabilities(search: Any, answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(lambda tokens, state: (answer(len(tokens)), state), None, start=0, end=1, max_length=3, batch_size=2)


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_bad_steps(search: Any) -> None:
    def call(step: Any) -> None:
        search(step, None, start=0, end=1, max_length=3, batch_size=2)

    with pytest.raises(TypeError, match=r"step: expected \(log_probs, state\) or .*, got Tensor"):
        call(lambda tokens, state: uniform(tokens, state)[0])
    with pytest.raises(ValueError, match=r"step: expected weights \[N, S\] with N=\d+ \(from tokens\), got \[7\]"):
        call(lambda tokens, state: (*uniform(tokens, state), torch.zeros(7)))


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": -1}, "max_length: expected at least 0, got -1"),
        ({"end": -1}, "end: expected a token's number or None, got -1"),
        ({"end": 4}, r"end: expected a token below V=4 \(from log_probs\), got 4"),
        ({"batch_size": None}, "batch_size: expected a number"),
        ({"start": torch.zeros(2, 1, dtype=torch.long)}, r"start: expected \[B\] of integers, got \[2, 1\]"),
        ({"start": torch.zeros(2)}, r"start: expected \[B\] of integers, got \[2\] of torch.float32"),
        ({"start": torch.zeros(3, dtype=torch.long)}, r"batch_size: expected B=3 \(from start\), got 2"),
        ({"state": torch.zeros(5, 1)}, r"the state: expected B=2 \(from batch_size\), got 5"),
    ],
)
def test_bad_arguments(search: Any, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"state": None, "start": 0, "end": 1, "max_length": 3, "batch_size": 2} | options
    with pytest.raises(ValueError, match=message):
        search(uniform, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam: expected at least 1, got 0"),
        ({"n_best": 6}, r"n_best: expected 1 to 5 \(from beam\), got 6"),
        ({"n_best": 0}, r"n_best: expected 1 to 5 \(from beam\), got 0"),
        ({"length_penalty": "google"}, "length_penalty: expected 'wu', 'average' or 'none', got 'google'"),
        ({"alpha": -1.0}, "alpha: expected at least 0, got -1.0"),
        ({"alpha": math.nan}, "alpha: expected at least 0, got nan"),
    ],
)
def test_bad_beam_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(uniform, None, start=0, end=1, max_length=3, batch_size=2, **options)


@pytest.mark.skipif(native.why_not() is not None, reason="the native kernels were not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "beam", "words"), [(1, 1, 1), (3, 5, 70), (2, 7, 3), (9, 2, 1000)])
@pytest.mark.parametrize("end", [None, 0])
def test_the_operator_grows_as_torch_does(batch, beam, words, end, dtype, monkeypatch) -> None:
    scores = torch.randn(batch, beam, dtype=dtype)
    scores[0, beam // 2 :] = -math.inf  # empty places
    log_probs = torch.randn(batch * beam, words, dtype=dtype).log_softmax(1)
    log_probs[0] = -math.inf
    found = _grow(log_probs, scores, 1, 0.5, end)
    torch.library.opcheck(
        torch.ops.seqattn.beam_grow.default,
        (log_probs, scores, -1 if end is None else end),
        test_utils=("test_schema", "test_faketensor"),
    )
    monkeypatch.setattr(search, "serves", lambda *_: False)
    expected = _grow(log_probs, scores, 1, 0.5, end)
    for at in (0, 3):
        assert_same_bits(found[at], expected[at])
    alive, ended = expected[0] > -math.inf, expected[3] > -math.inf  # where a place is empty, anything may stand
    for at, there in ((1, alive), (2, alive), (4, ended)):
        assert torch.equal(found[at][there], expected[at][there])
