from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from benchmarks import accuracy, ceilings, environment, measure, memory, reasons, report, results, runner, sweep, tables
from benchmarks.cases import CUDA_SUITES, FMA_LIMIT, STOCK, SUITES, Bar, Case, Mode, ragged_lengths
from benchmarks.peers import Entry, Peer, registry
from benchmarks.peers.torch_eager import TorchEager
from benchmarks.problems import build
from seqattn_kernels import native
from tests.cases import KINDS

SHAPE = {"B": 2, "T": 3, "I": 4, "H": 5}
ATTENTION_SHAPE = {"B": 2, "T": 3, "S": 5, "A": 4}
QUICK = runner.Profile("test", 0.01, 1)


def case(operator: str = "gru", mode: Mode = Mode.FORWARD, suite: str = "recurrent", **options) -> Case:
    shape = ATTENTION_SHAPE if operator.endswith("_attention") else SHAPE
    return Case(suite, operator, shape, mode, ("ours",), **options)


class Stand(Peer):
    """A contestant called ours that runs stock torch and spoils what it returns."""

    name = "ours"
    package = "torch"

    def __init__(self, spoil: Callable = lambda tensor: tensor, missing: str | None = None) -> None:
        self.spoil, self.missing = spoil, missing

    def installed(self) -> str | None:
        return self.missing

    def prepare(self, problem, stack) -> Entry:
        entry = TorchEager().prepare(problem, stack)
        return Entry(entry.call, lambda: [(name, self.spoil(tensor)) for name, tensor in entry.outcome()])


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in in the place of ours."""

    def put(peer: Peer) -> None:
        peers = {STOCK: TorchEager(), "ours": peer}
        monkeypatch.setattr(runner, "registry", lambda: peers)
        monkeypatch.setattr(runner, "fma_limit", lambda threads: 1e11)

    return put


def test_a_correct_contestant_is_timed_and_judged(stand_in):
    stand_in(Stand())
    bars = (Bar("ours", 0.01, threads=1), Bar("ours", 1e6, threads=1), Bar("ours", 1e-9, FMA_LIMIT, threads=1))
    found = runner.run_case(case(bars=bars), 1, QUICK)
    ours = found.contestant("ours")
    assert ours.failure is None
    assert ours.missing is None
    assert 0 < ours.quantile_20 <= ours.milliseconds <= ours.quantile_80
    assert ours.ratio_low <= ours.ratio <= ours.ratio_high
    assert [bar.met for bar in found.bars] == [True, False, True]
    assert found.noise >= 0


def test_bars_hold_at_their_number_of_threads_only(stand_in):
    stand_in(Stand())
    assert runner.run_case(case(bars=(Bar("ours", 1.0, threads=2),)), 1, QUICK).bars == []


@pytest.mark.parametrize("mode", [Mode.FORWARD, Mode.TRAINING], ids=lambda mode: mode.value)
def test_a_wrong_contestant_gets_no_time(stand_in, mode):
    stand_in(Stand(lambda tensor: tensor + 1e-3 * tensor.abs().max()))
    found = runner.run_case(case(mode=mode, bars=(Bar("ours", 0.0, threads=1),)), 1, QUICK)
    ours = found.contestant("ours")
    assert "elements differ" in ours.failure
    assert ours.milliseconds is None
    assert ours.ratio is None
    assert not found.bars[0].met
    assert found.contestant(STOCK).milliseconds > 0


def test_a_wrong_gradient_alone_is_found(stand_in):
    original = TorchEager.prepare

    class WrongGradient(Stand):
        def prepare(self, problem, stack) -> Entry:
            entry = original(TorchEager(), problem, stack)
            return Entry(entry.call, lambda: [(n, t * 1.01 if "weight_hh" in n else t) for n, t in entry.outcome()])

    stand_in(WrongGradient())
    failure = runner.run_case(case(mode=Mode.TRAINING), 1, QUICK).contestant("ours").failure
    assert failure.startswith("gradient of weight_hh_l0")


def test_a_contestant_that_raises_is_named(stand_in):
    class Raises(Stand):
        def prepare(self, problem, stack) -> Entry:
            raise RuntimeError("out of order")

    stand_in(Raises())
    found = runner.run_case(case(), 1, QUICK)
    assert found.contestant("ours").failure == "RuntimeError: out of order"
    assert found.contestant(STOCK).milliseconds > 0


def test_stock_past_the_tolerance_is_timed_and_noted(stand_in, monkeypatch):
    stand_in(Stand())
    monkeypatch.setattr(runner, "check", lambda entry, problem, stock: "differs")
    found = runner.run_case(case(), 1, QUICK)
    assert found.contestant(STOCK).failure == found.contestant("ours").failure == "differs"
    assert found.contestant(STOCK).milliseconds > 0
    assert found.contestant("ours").milliseconds is None


def test_a_contestant_not_installed_is_named(stand_in):
    stand_in(Stand(missing="nothing is installed"))
    assert runner.run_case(case(), 1, QUICK).contestant("ours").missing == "nothing is installed"


def test_names_are_unique_and_contestants_exist():
    everything = [case for cases in SUITES.values() for case in cases]
    assert len({case.name for case in everything}) == len(everything)
    for found in everything:
        assert set(found.contestants) <= set(registry())
        assert {bar.contestant for bar in found.bars} <= set(found.contestants)
        assert {bar.against for bar in found.bars} <= {STOCK, FMA_LIMIT, *found.contestants}


def test_every_operator_has_a_case():
    operators = {case.operator for cases in SUITES.values() for case in cases}
    assert set(KINDS) <= operators
    if native.extension is not None:
        assert set(native.extension.cells()) <= operators
    scores = ("additive", "dot", "general", "concat", "feature")
    assert {f"{score}_attention" for score in scores} <= operators
    assert {"gru_cell", "lstm_cell", "rnn_tanh_cell"} <= operators


def test_lengths_have_a_mean_of_half():
    lengths = ragged_lengths(32, 100)
    assert len(lengths) == 32
    assert max(lengths) == 100
    assert lengths != sorted(lengths, reverse=True)
    assert abs(sum(lengths) / 3200 - 0.5) < 0.02


@pytest.mark.parametrize(
    "operator", [*KINDS, "gru_cell", "additive_attention", "concat_attention", "feature_attention"]
)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_stock_matches_the_oracle(operator, training):
    cell = operator.endswith("_cell")
    modes = (Mode.STEPS, Mode.STEPS_TRAINING) if cell else (Mode.FORWARD, Mode.TRAINING)
    with torch.set_grad_enabled(training):
        problem = build(case(operator, modes[training]))
        assert runner.check_module(problem.stock(), problem) is None
        broken = problem.stock()
        with torch.no_grad():
            next(broken.parameters(), torch.zeros(1)).add_(0.1)
        assert runner.check_module(broken, problem)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda oracle, error: oracle + 1.4 * error, True),
        (lambda oracle, error: oracle + 1.6 * error, False),  # mean
        (lambda oracle, error: oracle + torch.where(error == error.max(), 2.1 * error, 0), False),  # largest
        (lambda oracle, error: torch.where(error == error.max(), torch.nan, oracle), False),
        (lambda oracle, error: oracle[:1], False),
    ],
)
def test_past_the_tolerance_stock_sets_the_bar(change, passes):
    oracle = torch.linspace(1, 2, 8, dtype=torch.float64)
    error = torch.linspace(1e-3, 2e-3, 8, dtype=torch.float64)

    problem = SimpleNamespace(case=case("gru", Mode.FORWARD), oracle=[("output", oracle)])

    def entry(result):
        return Entry(lambda: None, lambda: [("output", result)])

    ours = entry(change(oracle, error))
    assert runner.check(ours, problem)
    assert (runner.check(ours, problem, entry(oracle + error)) is None) == passes


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_stock_packed_matches_the_oracle(training):
    with torch.set_grad_enabled(training):
        problem = build(case("lstm", Mode.TRAINING if training else Mode.FORWARD, suite="lengths"))
        assert runner.check_module(problem.stock(), problem) is None


def test_the_oracle_of_attention_is_the_same_in_parts(monkeypatch):
    whole = build(case("additive_attention", Mode.TRAINING)).oracle
    monkeypatch.setattr("benchmarks.attention.ORACLE_ELEMENTS", 20)
    parts = build(case("additive_attention", Mode.TRAINING)).oracle
    for (name, a), (_, b) in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", KINDS)
def test_engines_compute_what_torch_does(engine, kind):
    if registry()[engine].installed():
        pytest.skip(registry()[engine].installed())
    found = runner.run_case(Case("peers", kind, SHAPE, Mode.FORWARD, (engine,)), 1, QUICK).contestant(engine)
    assert found.failure is None
    assert found.milliseconds > 0


def test_race_orders_by_speed_and_warms_up():
    counts = {"fast": 0, "slow": 0}

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            counts[name] += 1
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return run

    found = measure.race({"fast": call("fast", 1e-4), "slow": call("slow", 4e-4)}, seconds=0.05, least_rounds=3)
    ratio = found.ratio("fast", ["slow"])
    assert ratio.low <= ratio.value <= ratio.high
    assert 2 < ratio.value < 8
    assert counts["fast"] > counts["slow"] > found.timings["slow"].calls


@pytest.mark.parametrize(("loads", "disturbed"), [([0.0, 2.0], False), ([2.0], True)])
def test_disturbed_rounds_are_dropped(monkeypatch, loads, disturbed):
    answers = iter(loads * 1000)
    monkeypatch.setattr(measure.ForeignLoad, "cores", lambda self: next(answers))
    monkeypatch.setattr(measure, "SHORTEST_JUDGED", 0.0)
    found = measure.race({"a": lambda: time.sleep(1e-3)}, seconds=0.05, least_rounds=4)
    assert found.disturbed is disturbed
    assert found.dropped > 0


def test_the_interval_of_the_median_covers_it():
    torch.manual_seed(0)
    inside = 0
    for _ in range(400):
        samples = torch.randn(15).sort().values
        low, high = measure._median_ranks(15)
        inside += bool(samples[low] <= 0 <= samples[high])
    assert inside >= 0.88 * 400


def test_documents_survive_writing(tmp_path, stand_in):
    stand_in(Stand())
    found = runner.run_case(case(bars=(Bar("ours", 0.1, threads=1),)), 1, QUICK)
    document = results.Document(environment.describe(), [found], "quick", {"1": 100.0})
    document.write(tmp_path / "folder" / "recurrent.json")
    assert results.Document.read(tmp_path / "folder" / "recurrent.json") == document
    raw = json.loads((tmp_path / "folder" / "recurrent.json").read_text())
    assert raw["schema"] == results.SCHEMA
    assert {"machine", "cpu", "versions", "commit", "omp_proc_bind"} <= set(raw["environment"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected schema 1 or 2, got list"),
        ('{"schema": 0}', "expected schema 1 or 2, got 0"),
        ('{"schema": 1, "environment": {}}', "expected the fields of schema 2"),
        ('{"schema": 1, "environment": {}, "cases": [], "extra": 1}', "expected the fields of schema 2"),
    ],
)
def test_documents_that_are_not_ours_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        results.Document.read(tmp_path / "a.json")


def made_up_document(suite: str = "recurrent") -> results.Document:
    """Every case of a suite at 2 threads with figures that are told apart easily."""
    cases = []
    for index, each in enumerate(SUITES[suite] if suite in SUITES else CUDA_SUITES[suite.removeprefix("gpu_")]):
        ours = [
            results.Contestant(name, milliseconds=1.0 + index, ratio=2.0 + index, ratio_low=1.0, ratio_high=3.0)
            for name in each.contestants
        ]
        cases.append(
            results.CaseResult(
                each.name, each.suite, each.label, each.operator, each.mode.value, "float32", dict(each.shape), 2,
                [results.Contestant(STOCK, milliseconds=2.0, ratio=1.0), *ours], [],
            )
        )  # fmt: skip
    return results.Document({"cpu": "abacus", "versions": {"torch": "2.13"}, "commit": "0123456789abcdef"}, cases)


def test_the_report_fills_its_places():
    text = "before\n<!-- table:recurrent -->\nold\n<!-- /table -->\n<!-- table:cells -->\nkept\n<!-- /table -->\n"
    once = report.filled(text, {"recurrent": made_up_document()})
    assert once.startswith("before\n<!-- table:recurrent -->\n")
    assert "old" not in once
    assert "kept" in once
    assert "| GRU inference, frozen weights | 2.00x |" in once
    assert "| GRU training | 3.00x |" in once
    assert "| times stock torch; B,T,I,H = | 1,100,128,128 |" in once
    assert "abacus" in once
    assert "0123456789" in once
    assert report.filled(once, {"recurrent": made_up_document()}) == once


@pytest.mark.parametrize("suite", report.TABLES)
def test_every_suite_makes_a_table(suite):
    lines = report.TABLES[suite](made_up_document(suite)).splitlines()
    assert len(lines) >= 3
    assert len({line.count("|") for line in lines}) == 1


def test_the_report_shows_the_least_gain():
    document = made_up_document("cells")
    first = document.cases[0]
    low = dataclasses.replace(first, contestants=[results.Contestant("ours", ratio=0.5)])
    document = dataclasses.replace(document, cases=[*document.cases[1:], low])
    text = report.filled("<!-- table:least -->\n<!-- /table -->", {"cells": document, "gpu_cells": document})
    assert f"| 0.50x | ours, {first.operator} {first.mode}" in text
    assert text.count("0.50x") == 1


def test_the_report_refuses_unknown_places():
    with pytest.raises(ValueError, match="table:nothing: expected one of recurrent"):
        report.filled("<!-- table:nothing -->\n<!-- /table -->", {})


def test_the_report_draws_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    documents = {"recurrent": made_up_document(), "attention": made_up_document("attention")}
    report.draw(documents, tmp_path / "docs" / "benchmarks.png")
    assert (tmp_path / "docs" / "benchmarks.png").read_bytes()[:4] == b"\x89PNG"


def test_the_sweep_covers_its_sizes_once():
    found = sweep.points()
    assert len({point.name for point in found}) == len(found)
    assert len(found) == 3 * 2 * 10 * 9 * 4 * 2 + 3 * 2 * 10 * 9 * 2 + 3 * 3 * 2
    assert all(point.case.name for point in found)


def test_the_sweep_resumes_and_keeps_to_its_budget(tmp_path, monkeypatch):
    measured = []

    def fake(point: sweep.Point, seconds: float) -> sweep.Measured:
        measured.append(point.name)
        return sweep.Measured(point.name, 2.0, 1.9, 2.1, 2.0, 1.0)

    monkeypatch.setattr(sweep, "measure", fake)
    points = sweep.points()[:6]
    assert list(sweep.run(points, tmp_path / "kept.jsonl", 0.1, budget=-1.0)) == []
    assert len(list(sweep.run(points[:4], tmp_path / "kept.jsonl", 0.1, budget=None))) == 4
    assert len(list(sweep.run(points, tmp_path / "kept.jsonl", 0.1, budget=None))) == 6
    assert measured == [point.name for point in points]


def test_the_sweep_lists_what_is_slower_beyond_noise():
    even = sweep.Measured("gru forward B=1 H=1 T=1 threads=1", 0.99, 0.95, 1.02, 1.0, 1.01)
    slower = dataclasses.replace(even, name="gru forward B=2 H=1 T=1 threads=1", ratio=0.5, low=0.48, high=0.53)
    failed = dataclasses.replace(even, name="gru forward B=3 H=1 T=1 threads=1", ratio=0.0, failure="wrong")
    facts = sweep.summary([even, slower, failed], 10)
    assert [entry["name"] for entry in facts["slower"]] == [slower.name]
    assert [entry["name"] for entry in facts["failed"]] == [failed.name]
    assert facts["ratios"]["gru forward"] == {"sizes": 2, "least": 0.5, "median": pytest.approx(0.745), "most": 0.99}


def test_the_sweep_measures_a_size(monkeypatch):
    monkeypatch.setattr("benchmarks.problems.SequenceProblem.ours", lambda self: self.stock())
    found = sweep.measure(sweep.Point("lstm", "forward+backward", 2, 7, 2, 1), 0.01)
    assert found.failure is None
    assert 0.1 < found.ratio < 10


def test_accuracy_tells_coarser_results(monkeypatch):
    conditions = [accuracy.Condition("T=5", steps=5)]
    monkeypatch.setattr("benchmarks.problems.SequenceProblem.ours", lambda self: self.stock())
    same = list(accuracy.recurrent_findings(["gru"], conditions))
    assert same
    assert all(finding.met and finding.judged for finding in same)

    class Coarse(torch.nn.GRU):
        def forward(self, *arguments):
            output, state = super().forward(*arguments)
            return output + 1e-5, state

    def coarse(self):
        module = self.stock()
        module.__class__ = Coarse
        return module

    monkeypatch.setattr("benchmarks.problems.SequenceProblem.ours", coarse)
    missed = {finding.result for finding in accuracy.recurrent_findings(["gru"], conditions) if not finding.met}
    assert missed == {"output"}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no high-water mark to reset")
def test_memory_sees_what_a_call_takes():
    shape = {"B": 4, "T": 64, "S": 64, "A": 512}
    used = memory.measure_here(Case("attention", "additive_attention", shape, Mode.FORWARD, ("ours",)), STOCK)
    elements = 4 * 64 * 64 * 512 * 4 / 2**20
    # The kernel counts pages of busy threads late.
    assert 0.95 * elements <= used <= 4 * elements


def test_threads_are_pinned_before_torch(monkeypatch):
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    with pytest.raises(RuntimeError, match="OMP_PROC_BIND: expected to be set before torch is imported"):
        environment.pin_threads()


@pytest.mark.slow
def test_the_command_restarts_itself_pinned(tmp_path):
    clean = {key: value for key, value in os.environ.items() if key != "OMP_PROC_BIND"}
    command = [sys.executable, "-m", "benchmarks.run", "recurrent", "--quick", "--threads", "1"]
    command += ["--only", "gru/forward/B1,T100,I128", "--json", str(tmp_path / "found.json")]
    subprocess.run(command, cwd=environment.ROOT, env=clean, check=True, timeout=120)
    document = results.Document.read(tmp_path / "found.json")
    assert document.environment["omp_proc_bind"] == "true"
    assert len(document.cases) == 1


def test_losses_stand_with_their_reasons():
    document = made_up_document("gpu_dot")
    case = next(case for case in document.cases if case.shape["T"] == 1)
    lost = dataclasses.replace(case, contestants=[results.Contestant("ours", ratio=0.9, ratio_high=0.95)])
    unknown = dataclasses.replace(lost, name="nothing/like/it")
    found = tables.remarks({"dot": dataclasses.replace(document, cases=[lost, unknown])})
    assert f"- slower than stock beyond noise: ours in {case.name}: 0.90 ({reasons.reason('ours', case.name)})" in found
    assert "reason not found out yet" not in found[0]
    assert any("nothing/like/it: 0.90 (reason not found out yet)" in line for line in found)


@pytest.mark.parametrize("operator", sorted({case.operator for case in memory.cases()}))
def test_memory_of_every_operator_can_be_measured(operator):
    case = next(case for case in memory.cases() if case.operator == operator)
    small = dataclasses.replace(case, shape={key: min(size, 8) for key, size in case.shape.items()})
    assert memory.measure_here(small, "ours") >= 0


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_has_its_floors_but_whole_models(suite, monkeypatch):
    monkeypatch.setattr(ceilings, "fma_limit", lambda threads: 1e11)
    monkeypatch.setattr(ceilings, "read_limits", lambda threads: {"l2": 4e11, "memory": 5e10})
    for case in SUITES[suite]:
        found = ceilings.floors(case, 2)
        assert (max(found.values()) > 0) if suite != "models" else not found, case.name


def test_floors_are_those_of_the_least_cache(monkeypatch):
    monkeypatch.setattr(ceilings, "fma_limit", lambda threads: 1e11)
    monkeypatch.setattr(ceilings, "read_limits", lambda threads: {"l2": 4e11, "l3": 2e11, "memory": 5e10})
    monkeypatch.setattr(ceilings, "caches", lambda: {"l2": 1 << 20, "l3": 1 << 25})
    shape = {"B": 1, "T": 10, "I": 64, "H": 64}
    weights = 3 * 64 * 128
    small = ceilings.floors(Case("recurrent", "gru", shape, Mode.FORWARD, ()), 1)
    assert small["l2"] == pytest.approx((10 * 128 + weights) * 4 / 4e11 * 1e3)
    assert small["fma"] == pytest.approx(2 * 10 * weights / 1e11 * 1e3)
    large = ceilings.floors(Case("recurrent", "gru", {**shape, "I": 2048, "H": 2048}, Mode.FORWARD, ()), 1)
    assert set(large) == {"fma", "memory"}
    # Twenty steps of a cell read the same weights.
    assert "l2" in ceilings.floors(Case("cells", "gru_cell", {"B": 1, "I": 64, "H": 64}, Mode.STEPS, ()), 1)


def test_reads_are_measured_wherever_the_machine_has_a_cache():
    found = ceilings.read_limits(1, 0.01)
    assert set(found) - {"l3"} == {"memory", *(set(ceilings.caches()) - {"l3"})}
    assert all(rate > 0 for rate in found.values())
