"""Two runs side by side: what became slower or faster beyond noise.

Compared are the times faster than stock, taken in turns with stock in each run: milliseconds of one day say little
about those of another.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import STOCK
from benchmarks.environment import RESULTS, ROOT, machine_name
from benchmarks.results import CaseResult, Contestant, Document, load_folder

# Where the noise of a case is unknown.
LEAST_NOISE = 0.03


@dataclass(frozen=True)
class Change:
    """One contestant of one case in both runs. ``now`` is None where it was timed then and isn't any more."""

    name: str
    threads: int
    contestant: str
    before: float
    now: float
    worse: bool
    better: bool


def compare(documents: Mapping[str, Document], earlier: Mapping[str, Document]) -> list[Change]:
    """Every contestant timed in both runs, the largest losses first.

    Slower means that the intervals don't meet and the medians lie further apart than either run's noise. Cases that
    other processes disturbed in either run decide nothing and are left out.
    """
    before = {(case.name, case.threads): case for document in earlier.values() for case in document.cases}
    found = []
    for document in documents.values():
        for case in document.cases:
            other = before.get((case.name, case.threads))
            if other is not None:
                found += _changes(case, other)
    return sorted(found, key=lambda change: change.now / change.before)


def _changes(case: CaseResult, other: CaseResult) -> list[Change]:
    if case.disturbed or other.disturbed:
        return []
    noise = max(LEAST_NOISE, case.noise or 0.0, other.noise or 0.0)
    found = []
    for mine in case.contestants:
        theirs = other.contestant(mine.name)
        if mine.name == STOCK or theirs is None or mine.ratio is None or theirs.ratio is None:
            continue
        worse = _apart(mine, theirs) and mine.ratio < theirs.ratio * (1 - noise)
        better = _apart(theirs, mine) and mine.ratio > theirs.ratio * (1 + noise)
        found.append(Change(case.name, case.threads, mine.name, theirs.ratio, mine.ratio, worse, better))
    return found


def _apart(lower: Contestant, upper: Contestant) -> bool:
    return lower.ratio_high is not None and upper.ratio_low is not None and lower.ratio_high < upper.ratio_low


def lost(documents: Mapping[str, Document], earlier: Mapping[str, Document]) -> list[str]:
    """Contestants that were timed then and fail their check now."""
    before = {(case.name, case.threads): case for document in earlier.values() for case in document.cases}
    found = []
    for document in documents.values():
        for case in document.cases:
            other = before.get((case.name, case.threads))
            for each in case.contestants:
                theirs = other.contestant(each.name) if other else None
                if each.failure and each.ratio is None and theirs is not None and theirs.ratio is not None:
                    found.append(f"{each.name} in {case.name}: {each.failure.splitlines()[0]}")
    return found


def earlier_results(reference: str, suites: Sequence[str], arguments: Sequence[str]) -> dict[str, Document]:
    """The run to compare with: a folder, a file, or a commit.

    Of a commit, what it has under benchmarks/results for this machine; where it has nothing of these suites, it is
    built in a folder of its own and measured with ``arguments`` (of benchmarks.run).

    Raises ValueError where the reference is none of these.
    """
    path = Path(reference)
    if path.is_dir():
        return load_folder(path)
    if path.is_file():
        return {path.stem: Document.read(path)}
    resolved = _git("rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}")
    if resolved is None:
        raise ValueError(f"against: expected a folder or file of results or a commit, got {reference!r}")
    with tempfile.TemporaryDirectory(prefix="seqattn-against-") as work:
        stored = _stored(resolved.strip(), suites, Path(work))
        if stored:
            return stored
        return _measured(resolved.strip(), Path(work) / "tree", arguments)


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _stored(commit: str, suites: Sequence[str], work: Path) -> dict[str, Document]:
    found = {}
    folder = (RESULTS / machine_name()).relative_to(ROOT).as_posix()
    for suite in suites:
        text = _git("show", f"{commit}:{folder}/{suite}.json")
        if text is not None:
            path = work / f"{suite}.json"
            path.write_text(text)
            found[suite] = Document.read(path)
    return found


def _measured(commit: str, tree: Path, arguments: Sequence[str]) -> dict[str, Document]:
    print(f"{commit[:10]} has no results of this machine: building and measuring it", file=sys.stderr)
    if _git("worktree", "add", "--detach", str(tree), commit) is None:
        raise ValueError(f"against: a worktree of {commit[:10]} can't be made")
    try:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, check=True)
        out = tree / "against.json"
        run = [sys.executable, "-m", "benchmarks.run", *arguments, "--json", str(out)]
        subprocess.run(run, cwd=tree, check=True, env=_environment(tree))
        return {"against": Document.read(out)}
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _environment(tree: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(tree)}
