"""`python -m benchmarks.html FOLDER [--against OTHER]`: write FOLDER/report.html, and table.md beside it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import RESULTS, machine_name
from benchmarks.html.page import render
from benchmarks.results import load_folder
from benchmarks.tables import page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.html", description=__doc__)
    default = RESULTS / machine_name()
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="results; this machine's by default")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="results of an earlier run to compare with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="in place of FOLDER/report.html")
    options = parser.parse_args(arguments)
    documents = load_folder(options.folder)
    if not documents:
        parser.error(f"{options.folder}: expected results (*.json) of benchmarks, got none")
    earlier = load_folder(options.against) if options.against else None
    if options.against and not earlier:
        parser.error(f"{options.against}: expected results (*.json) of benchmarks, got none")
    out = options.out or options.folder / "report.html"
    used = options.folder / "memory.json"
    usage = json.loads(used.read_text())["usage"] if used.exists() else []
    out.write_text(render(documents, earlier, usage))
    table = out.with_name("table.md")
    table.write_text(page(documents))
    print(out, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
