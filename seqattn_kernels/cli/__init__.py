"""`seqattn doctor | compare | demo | bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="seqattn",
    help="Attention-based recurrent networks in PyTorch, made faster without changing what they compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; torch's own choice without it.")]


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command("doctor")
def run_doctor(threads: Threads = None) -> None:
    """Say what is built and active here, what is missing, and how to get it."""
    from seqattn_kernels.cli.doctor import examine

    _set_threads(threads)
    examine(Console())


@app.command("compare")
def run_compare(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="PKG.MODULE:FACTORY",
            help="A function that returns (model, example_inputs): a tensor, a tuple of arguments or a dict.",
        ),
    ],
    train: Annotated[bool, typer.Option("--train", help="Compare gradients and time training steps too.")] = False,
    threads: Threads = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to time each mode.")] = 3.0,
) -> None:
    """Run your model stock and accelerated, in turns: differences, times, memory.

    Exit status: 0 where the results agree, 1 where they differ beyond tolerance, 2 where there is nothing to compare.
    """
    from seqattn_kernels.cli.compare import FactoryError, compare_models
    from seqattn_kernels.cli.compare_output import show, write_json

    _set_threads(threads)
    console = Console()
    sys.path.insert(0, str(Path.cwd()))
    try:
        comparison = compare_models(factory, train=train, seconds=seconds, console=console)
    except FactoryError as error:
        Console(stderr=True).print(f"[bold red]seqattn compare:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from None
    show(comparison, console)
    if json is not None:
        write_json(comparison, json)
    raise typer.Exit(0 if comparison.agrees else 1)


@app.command("demo")
def run_demo(
    full: Annotated[
        bool, typer.Option("--full", help="Train properly: better transcriptions, in half an hour.")
    ] = False,
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("demo"),
) -> None:
    """Learn to pronounce English words, stock and accelerated side by side."""
    _set_threads(threads)
    try:
        from seqattn_kernels.demo.run import run

        status = run(full=full, output=output)
    except ImportError as error:
        Console(stderr=True).print(f"[bold red]seqattn demo:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


@app.command(
    "bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def run_bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout: `seqattn bench recurrent`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    try:
        from benchmarks.run import main as run
    except ModuleNotFoundError as error:
        message = f"the benchmarks are part of a checkout, not of an installed package ({error})"
        Console(stderr=True).print(f"[bold red]seqattn bench:[/] {escape(message)}", highlight=False)
        raise typer.Exit(2) from None
    raise typer.Exit(run(context.args) or 0)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; leaves by SystemExit."""
    app(args=list(argv) if argv is not None else None, prog_name="seqattn")
