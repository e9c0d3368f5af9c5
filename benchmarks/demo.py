"""What a run of `seqattn demo` measured, kept beside the benchmarks' results, and its table for README."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, commit, cpu_info, machine_name

PICTURES = ("alignment.png", "speed.png")


def keep(folder: Path, pictures: Path = ROOT / "docs", results: Path = RESULTS) -> Path:
    """Keep the figures and pictures that a demo wrote into ``folder``. Returns the file of the figures.

    Raises ValueError where the demo did not finish there.
    """
    missing = [name for name in ("summary.json", *PICTURES) if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder}: expected what a finished demo writes, got no {', '.join(missing)}")
    info = cpu_info()
    where = {"cpu": info.get("model name"), "cpu_family": info.get("cpu family"), "commit": commit()}
    kept = results / machine_name() / "demo.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({**where, **json.loads((folder / "summary.json").read_text())}, indent=1) + "\n")
    pictures.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        shutil.copyfile(folder / name, pictures / name)
    return kept


def markdown(summary: Mapping[str, Any]) -> str:
    """Words a second of both models, their errors, and where and for how long the demo ran."""
    stock, ours = next(iter(summary["words_per_second"].values()))
    lines = ["| demo, words a second | stock | accelerated | times faster |", "|---|---:|---:|---:|"]
    lines += [
        f"| {what} | {rates[stock]:,.0f} | {rates[ours]:,.0f} | {rates[ours] / rates[stock]:.2f} |"
        for what, rates in summary["words_per_second"].items()
    ]
    lines += [""]
    errors = " and ".join(f"{rates['phoneme']:.1%} by {search}" for search, rates in summary["errors"][ours].items())
    lines += [
        f"{summary['seconds']:.0f} s in all for {summary['settings']['steps']:,} steps of each model; losses agree to "
        f"{summary['losses']['first_steps']:.0e} in the first steps. Phonemes wrong on {summary['held_out_words']:,} "
        f"held-out words: {errors}.",
        "",
        f"{summary['cpu']} (family {summary['cpu_family']}), {summary['threads']} threads, torch {summary['torch']}, "
        f"{summary['created'][:10]}, commit {(summary['commit'] or 'none')[:10]}, "
        f"`make demo{' ARGS=--full' if summary['full'] else ''}`.",
    ]
    return "\n".join(lines)
