"""Whole models as people write them in stock torch, and the same ones after ``accelerate``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.problems import Named, Problem

VOCABULARY = 5000


class Tagger(nn.Module):
    """tokens [B, T] -> scores of 20 tags: two layers of a BiLSTM."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 128)
        self.encoder = nn.LSTM(128, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens))[0])


class Attention(nn.Module):
    """Additive attention over projected keys, as tutorials write it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.v = nn.Parameter(torch.randn(hidden) / hidden**0.5)

    def forward(self, state: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.tanh(self.query(state)[:, None] + keys) @ self.v
        return (scores.softmax(-1)[:, None] @ values).squeeze(1)


class FastAttention(Attention):
    """The same in one operator."""

    def forward(self, state: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from seqattn_kernels.functional import additive_attention

        return additive_attention(self.query(state), keys, self.v, values, need_weights=False)[0]


class Translator(nn.Module):
    """tokens [B, T], source and, shifted, target alike -> scores of words: BiGRU, attention, GRUCell."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 256)
        self.encoder = nn.GRU(256, hidden // 2, bidirectional=True, batch_first=True)
        self.keys = nn.Linear(hidden, hidden)
        self.attention = Attention(hidden)
        self.cell = nn.GRUCell(256 + hidden, hidden)
        self.head = nn.Linear(2 * hidden, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        values, last = self.encoder(embedded)
        keys, state = self.keys(values), last.transpose(0, 1).flatten(1)
        steps = []
        for word in embedded.unbind(1):
            context = self.attention(state, keys, values)
            state = self.cell(torch.cat([word, context], 1), state)
            steps.append(torch.cat([state, context], 1))
        return self.head(torch.stack(steps, 1))


class Synthesizer(nn.Module):
    """tokens [B, T] -> 80 mel channels of T frames: Tacotron's decoder, teacher forced, its attention by content.

    The prenet is smooth, since one ReLU that flips in coarse arithmetic would decide a gradient.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 256)
        self.encoder = nn.LSTM(256, hidden // 2, bidirectional=True, batch_first=True)
        self.keys = nn.Linear(hidden, hidden)
        self.prenet = nn.Sequential(nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.attend = nn.LSTMCell(128 + hidden, hidden)
        self.attention = Attention(hidden)
        self.decode = nn.LSTMCell(2 * hidden, hidden)
        self.head = nn.Linear(2 * hidden, 80)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        values, _ = self.encoder(embedded)
        keys, frames = self.keys(values), self.prenet(embedded)
        context = values.new_zeros(values.shape[0], values.shape[2])
        first = second = None
        steps = []
        for frame in frames.unbind(1):
            first = self.attend(torch.cat([frame, context], 1), first)
            context = self.attention(first[0], keys, values)
            second = self.decode(torch.cat([first[0], context], 1), second)
            steps.append(torch.cat([second[0], context], 1))
        return self.head(torch.stack(steps, 1))


class Recognizer(nn.Module):
    """tokens [B, T] for frames of speech -> scores of 40 phonemes: five layers of a BiLSTM."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.frames = nn.Embedding(VOCABULARY, 80)
        self.encoder = nn.LSTM(80, hidden, num_layers=5, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.frames(tokens))[0])


class Forecaster(nn.Module):
    """tokens [B, T] for a series -> its next 24 values: two layers of a GRU, the last state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.series = nn.Embedding(VOCABULARY, 16)
        self.encoder = nn.GRU(16, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.series(tokens))[1][-1])


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "tagger": Tagger,
    "translator": Translator,
    "recognizer": Recognizer,
    "synthesizer": Synthesizer,
    "forecaster": Forecaster,
}


class ModelProblem(Problem):
    """A model and its tokens; training is the gradient of every parameter for a fixed direction of the output."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        self.tokens = torch.randint(VOCABULARY, (case.shape["B"], case.shape["T"])).to(case.device)
        with torch.no_grad():
            self.direction = self.draw(*self.stock_module(self.tokens).shape)

    def _stock(self) -> nn.Module:
        return MODELS[self.case.operator](self.case.shape["H"])

    def ours(self) -> nn.Module:
        from seqattn_kernels import accelerate, register_replacement

        register_replacement(Attention, FastAttention)
        return accelerate(copy.deepcopy(self.stock_module))

    @property
    def leaves(self) -> Named:
        return []

    def call(self, module: nn.Module, **options: Any) -> Callable[[], Any]:
        if not self.case.mode.has_gradients:
            return lambda: module(self.tokens)

        def step() -> Tensor:
            module.zero_grad(set_to_none=True)
            output = module(self.tokens)
            output.backward(self.direction)
            return output

        return step

    def outputs(self, result: Any) -> Named:
        return [("output", result)]

    def in_float64(self) -> Problem:
        twin = super().in_float64()
        assert isinstance(twin, ModelProblem)
        twin.direction = self.direction.double()
        return twin
