"""The examples: each model and its twin of stock modules have the same parameters, results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples import captioning, classifier, language_model, speech, tacotron2, translation, tutorial
from tests.compare import assert_close_to_float64, gradients

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def words(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape)


def tacotron(kind: Callable[..., nn.Module]) -> nn.Module:
    return kind(
        mels=5, memory=12, prenet=7, hidden=16, attention=9, filters=4, kernel_size=5, prenet_dropout=0.0
    ).eval()


# Stock, ours, what makes one, its arguments.
EXAMPLES: dict[str, tuple[Any, Any, Callable[[Any], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "translation": (
        translation.StockTranslator,
        translation.Translator,
        lambda kind: kind(11, 11),
        lambda: (words(5, 9), torch.tensor([9, 4, 1, 7, 9]), words(5, 6)),
    ),
    "input feeding": (
        translation.StockInputFeeding,
        translation.InputFeeding,
        lambda kind: kind(11, 11),
        lambda: (words(5, 9), torch.tensor([9, 4, 1, 7, 9]), words(5, 6)),
    ),
    "speech": (
        speech.StockRecognizer,
        speech.Recognizer,
        lambda kind: kind(13, 11),
        lambda: (torch.randn(3, 30, 13), torch.tensor([30, 9, 21]), words(3, 5)),
    ),
    "tacotron 2": (
        tacotron2.StockTacotronDecoder,
        tacotron2.TacotronDecoder,
        tacotron,
        lambda: (torch.randn(3, 6, 5), torch.randn(3, 8, 12), torch.tensor([8, 3, 5])),
    ),
    "captioning": (
        captioning.StockCaptioner,
        captioning.Captioner,
        lambda kind: kind(17, 11),
        lambda: (torch.randn(4, 17, 3, 5), words(4, 6)),
    ),
    "language model": (
        language_model.StockLanguageModel,
        language_model.LanguageModel,
        lambda kind: kind(11),
        lambda: (words(4, 9),),
    ),
    "classifier": (
        classifier.StockClassifier,
        classifier.Classifier,
        lambda kind: kind(11, 3),
        lambda: (words(5, 9), torch.tensor([2, 9, 1, 5, 7])),
    ),
    "tutorial": (tutorial.StockTutorial, tutorial.Tutorial, lambda kind: kind(), lambda: (torch.randn(6, 20, 1),)),
}


def pair(name: str, device: str = "cpu") -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    stock_kind, our_kind, make, arguments = EXAMPLES[name]
    stock, ours = make(stock_kind).to(device), make(our_kind).to(device)
    ours.load_state_dict(stock.state_dict())
    return stock, ours, tuple(t.to(device) for t in arguments())


def run(model: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Any, list[Tensor]]:
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in arguments]
    found = model(*leaves)
    parameters = [p for _, p in sorted(model.named_parameters())]
    return found, gradients(found, [t for t in leaves if t.requires_grad] + parameters)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_twins_agree(name: str, device: str) -> None:
    stock, ours, arguments = pair(name, device)
    found = run(ours, arguments)
    wide = tuple(t.double() if t.is_floating_point() else t for t in arguments)
    assert_close_to_float64(found, run(stock.double(), wide))


@pytest.mark.parametrize("name", EXAMPLES)
def test_parameters_have_the_same_names(name: str) -> None:
    stock, ours, _ = pair(name)
    assert {n: p.shape for n, p in stock.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
def test_translations(device: str) -> None:
    """A beam search over the stock twin's step finds the same as ours; greedy search is the best word at each step."""
    stock, ours, (source, lengths, _) = pair("translation", device)
    found = ours.translate(source, lengths, start=0, end=1, beam=4)
    with torch.no_grad():
        for b, best in enumerate(found):
            assert best.alignment.shape == (len(best.tokens), 9)
            target = torch.tensor([[0, *best.tokens]], device=device)
            logits, weights = stock(source[b : b + 1], lengths[b : b + 1], target)
            chosen = torch.tensor([*best.tokens, *([1] if best.finished else [])], device=device)
            log_prob = logits[0].log_softmax(1)[: len(chosen)].gather(1, chosen.unsqueeze(1)).sum()
            assert best.log_prob == pytest.approx(log_prob.item(), rel=1e-4)
            assert_close_to_float64(best.alignment, weights[0, : len(best.tokens)])
        stock, ours, (source, lengths, _) = pair("input feeding", device)
        for b, text in enumerate(ours.translate(source, lengths, start=0, end=1)):
            target = torch.tensor([[0, *text]], device=device)
            logits, _ = stock(source[b : b + 1], lengths[b : b + 1], target)
            assert logits[0].argmax(1).tolist()[: len(text)] == text


def test_frames_until_the_gates_open() -> None:
    stock, ours, (_, values, lengths) = pair("tacotron 2")
    with torch.no_grad():
        for model in (stock, ours):
            model.gate.bias.fill_(-1.0)
            model.gate.weight.mul_(8)
    expected, count = stock.generate(values, lengths, longest=12)
    found, ours_count = ours.generate(values, lengths, longest=12)
    assert torch.equal(count, ours_count)
    assert_close_to_float64(found, expected)


def test_captions_are_drawn() -> None:
    _, ours, (image, _) = pair("captioning")
    for captions in ours.describe(image, start=0, end=1, samples=3, longest=7):
        assert len(captions) == 3
        for caption in captions:
            assert len(caption.tokens) <= 7
            assert_close_to_float64(caption.alignment.sum(1), torch.ones(len(caption.tokens)))


def test_perplexity() -> None:
    stock, ours, _ = pair("language model")
    text = words(3, 12)
    assert ours.perplexity(text) == pytest.approx(stock.perplexity(text), rel=1e-5)
