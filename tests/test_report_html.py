"""report.html: what it holds, and what its script does in a browser where one is installed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from benchmarks import against, results
from benchmarks.cases import DAILY, SUITES
from benchmarks.environment import cores
from benchmarks.html import charts
from benchmarks.html.__main__ import main
from benchmarks.html.page import memory, render
from benchmarks.run import _options
from tests.test_benchmarks import made_up_document
from tests.test_gpu_benchmarks import made_up

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def scaled(document: results.Document, factor: float, width: float = 0.05) -> results.Document:
    """The same run with ours that much faster."""

    def change(each: results.Contestant) -> results.Contestant:
        if each.ratio is None or each.name == "torch_eager":
            return each
        ratio = each.ratio * factor
        return dataclasses.replace(each, ratio=ratio, ratio_low=ratio * (1 - width), ratio_high=ratio * (1 + width))

    cases = [dataclasses.replace(c, contestants=[change(each) for each in c.contestants]) for c in document.cases]
    return dataclasses.replace(document, cases=cases)


def documents() -> dict[str, results.Document]:
    return {suite: made_up_document(suite) for suite in ("recurrent", "attention")}


class Outside(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]


@pytest.mark.parametrize("made", [documents, lambda: {"dot": made_up("dot"), "recurrent": made_up("recurrent")}])
def test_the_page_holds_everything_and_fetches_nothing(made):
    page = render(made())
    parser = Outside()
    parser.feed(page)
    assert parser.found == []
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", page)
    for document in made().values():
        for case in document.cases:
            assert case.name in page
    assert page.count("<svg") >= 2
    for title in ("Losses and missed bars", "Times faster than stock", "Memory", "Every figure", "Two runs"):
        assert f"<h2>{title}</h2>" in page


def test_losses_are_marked():
    page = render({"dot": made_up("dot")})
    assert "Slower than stock beyond noise: 2" in page
    assert "ours in dot/dot_attention/forward/" in page
    assert "<td class=lost" in page
    assert "<tr class='lost'>" in page
    assert "<tr class='failed'>" in page


def test_names_are_escaped():
    document = made_up("dot")
    document = dataclasses.replace(document, environment={"gpu": "<script>alert(1)</script>"})
    assert "<script>alert" not in render({"dot": document})


def test_curves_of_scaling():
    cases = []
    for steps in (10, 100, 1000):
        contestants = [results.Contestant(n, milliseconds=steps / k) for n, k in (("torch_eager", 10), ("ours", 40))]
        shape = {"B": 1, "T": steps, "I": 8, "H": 8}
        cases.append(
            results.CaseResult(f"x{steps}", "scaling", "T", "gru", "forward", "float32", shape, 2, contestants, [])
        )
    page = render({"scaling": results.Document({}, cases)})
    assert "gru forward over T" in page
    assert "torch_eager, 2T 1.00, ours, 2T 1.00" in page


def test_a_chart_of_nothing_is_refused():
    with pytest.raises(ValueError, match="values: expected some above zero to draw, got none"):
        charts.chart("empty", "x", "y", [charts.Series("a", [(0.0, 1.0)])])


def test_points_lie_where_their_values_say():
    svg = charts.chart("t", "x", "y", [charts.Series("a", [(1, 1), (10, 10), (100, 100)])])
    x, y = ([float(v) for v in re.findall(rf'<circle.*?c{axis}="([\d.]+)"', svg)] for axis in "xy")
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert x[0] < x[1]
    assert y[0] > y[1]


def test_the_command_writes_the_page(tmp_path, capsys):
    now, then = tmp_path / "now", tmp_path / "then"
    for suite, document in documents().items():
        scaled(document, 1.0).write(now / f"{suite}.json")
        scaled(document, 2.0).write(then / f"{suite}.json")
    (now / "memory.json").write_text(json.dumps({"usage": [{"case": "big", "stock_mb": 100.0, "ours_mb": 2.0}]}))
    assert main([str(now), "--against", str(then)]) == 0
    page = (now / "report.html").read_text()
    assert "id=compared" in page
    assert "big" in page
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])
    assert "expected results" in capsys.readouterr().err


def test_memory_over_steps_has_a_curve():
    usage = [
        {"case": f"gru T={t}", "operator": "gru", "mode": "forward+backward", "shape": {"B": 2, "T": t, "H": 8},
         "stock_mb": 3.0 * t, "ours_mb": 1.0 * t * t}
        for t in (10, 20, 40)
    ]  # fmt: skip
    page = memory([], usage)
    assert "gru forward+backward, B=2,H=8" in page
    assert "For each unit of T, at the largest over the least: torch_eager 1.00, ours 4.00" in page
    assert "figure" not in memory([], usage[:2])


def test_the_committed_results_make_a_page():
    from benchmarks.environment import RESULTS

    for folder in RESULTS.iterdir():
        found = results.load_folder(folder)
        assert found
        assert all(case.name in render(found) for document in found.values() for case in document.cases)


IN_THE_BROWSER = """
<script>
const heads = document.querySelectorAll("#figures th button");
heads[5].click();
const ratios = [...document.querySelectorAll("#figures tbody tr")].map((row) => row.cells[5].dataset.value);
filter.value = "dot forward/ ours_context"; filter.dispatchEvent(new Event("input"));
const one = document.getElementById("count").textContent;
filter.value = ""; marked.checked = true; marked.dispatchEvent(new Event("change"));
const lost = document.getElementById("count").textContent;
marked.checked = false; marked.dispatchEvent(new Event("change"));
const then = JSON.parse(document.getElementById("data").textContent).cases;
for (const each of then) for (const c of each.contestants) { c.low *= 3; c.high *= 3; c.ratio *= 3; }
draw(compared(then), document.getElementById("chosen"));
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify({ratios, one, lost, slower: document.querySelectorAll("#chosen tr.lost").length});
document.body.append(out);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_the_script_in_a_browser(tmp_path):
    document = made_up("dot")
    (tmp_path / "report.html").write_text(render({"dot": document}).replace("</html>", IN_THE_BROWSER))
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", f"file://{tmp_path / 'report.html'}"]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', page).group(1))
    known = [float(ratio) for ratio in found["ratios"] if ratio is not None]
    assert known == sorted(known)
    assert known[0] == 0.5
    assert found["ratios"][-1] is None
    forward = [c for c in document.cases if c.mode == "forward" and c.contestant("ours_context").milliseconds]
    failed = [c for c in document.cases if c.mode == "forward" and c.contestant("ours_context").failure]
    assert found["one"] == f"{len(forward) + len(failed)} rows"
    timed = [c for case in document.cases for c in case.contestants if c.ratio and c.name != "torch_eager"]
    assert found["slower"] == len(timed)
    assert found["lost"].split()[0] == str(len([1 for c in document.cases for e in c.contestants if e.failure]) + 2)


# Two runs


def test_a_drop_beyond_noise_is_found_and_one_within_it_is_not():
    now = scaled(made_up_document(), 1.0, 0.01)
    for factor, worse, better in ((1.0, 0, 0), (1.02, 0, 0), (1.5, 1, 0), (0.6, 0, 1)):
        changes = against.compare({"now": now}, {"then": scaled(made_up_document(), factor, 0.01)})
        assert len(changes) == sum(len(case.contestants) - 1 for case in now.cases)
        assert all(change.worse == bool(worse) and change.better == bool(better) for change in changes), factor


def test_a_drop_that_intervals_do_not_tell_is_none():
    wide = scaled(made_up_document(), 1.0, 0.6)
    changes = against.compare({"now": wide}, {"then": scaled(made_up_document(), 1.5, 0.6)})
    assert not any(change.worse for change in changes)


def test_a_disturbed_case_decides_nothing():
    now, then = made_up_document(), scaled(made_up_document(), 2.0, 0.01)
    now.cases[:] = [dataclasses.replace(case, disturbed=index > 0) for index, case in enumerate(now.cases)]
    assert {change.name for change in against.compare({"now": now}, {"then": then})} == {now.cases[0].name}


def test_what_fails_now_and_did_not_then_is_found():
    then, now = made_up_document(), made_up_document()
    case = now.cases[0]
    broken = [dataclasses.replace(case.contestants[1], ratio=None, failure="output: wrong"), *case.contestants[2:]]
    now.cases[0] = dataclasses.replace(case, contestants=[case.contestants[0], *broken])
    assert against.lost({"now": now}, {"then": then}) == [f"{case.contestants[1].name} in {case.name}: output: wrong"]
    assert against.lost({"now": then}, {"then": now}) == []


def test_earlier_results_are_a_folder_a_file_or_a_commit(tmp_path, monkeypatch):
    made_up_document().write(tmp_path / "recurrent.json")
    assert set(against.earlier_results(str(tmp_path), (), ())) == {"recurrent"}
    assert set(against.earlier_results(str(tmp_path / "recurrent.json"), (), ())) == {"recurrent"}
    with pytest.raises(ValueError, match="against: expected a folder or file of results or a commit, got 'nothing'"):
        against.earlier_results("nothing", (), ())


def repository(path, monkeypatch):
    """A checkout with one commit that holds results and one that holds none."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *arguments], cwd=path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    folder = path / "benchmarks" / "results" / "abacus"
    made_up_document().write(folder / "recurrent.json")
    git("add", ".")
    git("commit", "-qm", "one")
    with_results = git("rev-parse", "HEAD")
    git("rm", "-q", "-r", "benchmarks")
    (path / "setup.py").write_text("print('built')")
    git("add", ".")
    git("commit", "-qm", "two")
    monkeypatch.setattr(against, "ROOT", path)
    monkeypatch.setattr(against, "RESULTS", path / "benchmarks" / "results")
    monkeypatch.setattr(against, "machine_name", lambda: "abacus")
    return with_results, git("rev-parse", "HEAD")


def test_a_commit_with_results_is_read(tmp_path, monkeypatch):
    with_results, _ = repository(tmp_path, monkeypatch)
    found = against.earlier_results(with_results, ("recurrent", "cells"), ())
    assert set(found) == {"recurrent"}
    assert len(found["recurrent"].cases) == len(SUITES["recurrent"])


def test_a_commit_without_results_is_built_and_measured(tmp_path, monkeypatch):
    _, without = repository(tmp_path, monkeypatch)
    run, commands = subprocess.run, []

    def measured(command, **options):
        if command[0] == "git":
            return run(command, **options)
        commands.append(command)
        if "benchmarks.run" in command:
            made_up_document().write(options["cwd"] / "against.json")
        return None

    monkeypatch.setattr(against.subprocess, "run", measured)
    found = against.earlier_results(without, ("recurrent",), ("recurrent", "--quick"))
    assert set(found) == {"against"}
    assert "build_ext" in commands[0]
    assert commands[1][2:5] == ["benchmarks.run", "recurrent", "--quick"]
    listed = run(["git", "worktree", "list"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1


def test_the_daily_selection_is_small_and_covers_the_operators():
    names = {case.name: case for cases in SUITES.values() for case in cases}
    assert set(names) >= DAILY
    assert len(DAILY) <= 32
    operators = {names[name].operator for name in DAILY}
    assert {"gru", "lstm", "rnn_tanh", "gru_cell", "lstm_cell", "additive_attention"} <= operators


def test_a_suite_or_the_daily_selection_is_asked_for(capsys):
    assert _options(["--quick"]).threads == [2]
    assert _options(["cells"]).threads == [cores()]
    for wrong, message in (([], "expected a suite"), (["coffee"], "SUITE: expected some of recurrent")):
        with pytest.raises(SystemExit):
            _options(wrong)
        assert message in capsys.readouterr().err
