"""The record a run leaves: written as JSON under benchmarks/results/<machine>/, read by the report and the tests."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, machine_name

SCHEMA = 2
READABLE = (1, 2)  # 2 added what a GPU's results have besides


@dataclass(frozen=True)
class Contestant:
    """One contestant's figures in one case. Times are absent where it did not take part or failed its check."""

    name: str
    version: str | None = None
    missing: str | None = None  # why it did not take part
    failure: str | None = None  # what its results got wrong; none but stock gets a time then
    milliseconds: float | None = None  # median
    quantile_20: float | None = None
    quantile_80: float | None = None
    ratio: float | None = None  # times faster than stock
    ratio_low: float | None = None  # the interval that holds it with 90 % confidence
    ratio_high: float | None = None
    fma_share: float | None = None  # of the machine's float32 FMA limit
    device_milliseconds: float | None = None  # median on the device alone, the host's work done beforehand
    device_ratio: float | None = None  # times faster than stock by that figure
    floor_share: float | None = None  # of the case's floor: 1 is as fast as the device can be
    peak_mib: float | None = None  # most memory of the device at a time beyond what stood there before the call


@dataclass(frozen=True)
class BarResult:
    contestant: str
    against: str
    at_least: float
    reached: float | None
    met: bool


@dataclass(frozen=True)
class CaseResult:
    name: str
    suite: str
    label: str
    operator: str
    mode: str
    dtype: str
    shape: dict[str, int]
    threads: int
    contestants: list[Contestant]
    bars: list[BarResult]
    noise: float | None = None  # how far two runs of the same contestant lay apart
    rounds: int = 0
    dropped: int = 0  # rounds disturbed by other processes
    disturbed: bool = False  # too few rounds were quiet
    device: str = "cpu"
    precision: str = "float32"  # of products: the dtype, or tf32
    floors: dict[str, float] = field(default_factory=dict)  # milliseconds at least, by what would bound the case

    def contestant(self, name: str) -> Contestant | None:
        return next((found for found in self.contestants if found.name == name), None)


@dataclass(frozen=True)
class Document:
    environment: dict[str, Any]
    cases: list[CaseResult]
    profile: str = "full"
    fma_gflops: dict[str, float] = field(default_factory=dict)  # by number of threads
    ceilings: dict[str, float] = field(default_factory=dict)  # by name and unit; of reading on a CPU, by threads too
    schema: int = SCHEMA
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Document:
        """Raises ValueError naming the file and what is wrong with it."""
        try:
            raw = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from None
        if not isinstance(raw, dict) or raw.get("schema") not in READABLE:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"{path}: expected schema 1 or 2, got {found}")
        try:
            raw["cases"] = [
                CaseResult(
                    **{
                        **case,
                        "contestants": [Contestant(**entry) for entry in case["contestants"]],
                        "bars": [BarResult(**bar) for bar in case["bars"]],
                    }
                )
                for case in raw["cases"]
            ]
            return cls(**raw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the fields of schema {SCHEMA}, got {error}") from None


def path_of(suite: str, machine: str | None = None) -> Path:
    return RESULTS / (machine or machine_name()) / f"{suite}.json"


def load_folder(folder: Path) -> dict[str, Document]:
    """The benchmarks a folder holds, by suite; files of other kinds are left out.

    Raises ValueError for a file that says it holds benchmarks and does not.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        raw = json.loads(path.read_text())
        if isinstance(raw, dict) and "cases" in raw:
            found[path.stem] = Document.read(path)
    return {suite: document for suite, document in found.items() if document.cases}
