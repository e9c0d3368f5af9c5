"""Training models side by side: the same batches, the same random numbers, turns of a few steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from seqattn_kernels.demo.data import PAD, Batch
from seqattn_kernels.demo.model import G2P


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and how it is trained. `learning_rate` is the peak of a one-cycle schedule."""

    steps: int
    batch_size: int
    embedding: int
    hidden: int
    dropout: float
    learning_rate: float
    clip: float = 1.0
    seed: int = 0


@dataclass
class Speed:
    """Seconds and words of each turn."""

    seconds: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def add(self, seconds: float, words: int) -> None:
        self.seconds.append(seconds)
        self.words.append(words)

    @property
    def rates(self) -> list[float]:
        return [n / t for n, t in zip(self.words, self.seconds, strict=True)]

    @property
    def rate(self) -> float:
        """Words per second of the median turn."""
        return statistics.median(self.rates)


class Trainer:
    """One model with its optimizer and schedule, and a record of its losses and its speed."""

    def __init__(self, model: G2P, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1
        )
        self.losses: list[float] = []
        self.speed = Speed()

    def step(self, batch: Batch) -> None:
        torch.manual_seed(self.settings.seed + len(self.losses))  # Dropout: the same for every model.
        logits = self.model(batch.letters, batch.lengths, batch.inputs)
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=PAD)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())


def take_turns(
    trainers: Sequence[Trainer], batches: Iterator[Batch], steps: int, on_turn: Callable[[int], None], turn: int = 10
) -> None:
    """`steps` steps of each trainer, in turns of a few, so that what disturbs the machine disturbs all of them.

    `on_turn` is called with the number of steps done.
    """
    done = 0
    while done < steps:
        some = [next(batches) for _ in range(min(turn, steps - done))]
        order = trainers if (done // turn) % 2 == 0 else trainers[::-1]
        for trainer in order:
            begin = time.perf_counter()
            for batch in some:
                trainer.step(batch)
            trainer.speed.add(time.perf_counter() - begin, sum(len(batch) for batch in some))
        done += len(some)
        on_turn(done)
