"""The machinery of `python -m benchmarks.gpu`, with a clock and parts that need no GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results, tables
from benchmarks.cases import CUDA_SUITES, STOCK, Case, Mode
from benchmarks.gpu import bench, ceilings, parts, report, runner, timing
from benchmarks.gpu.__main__ import main
from benchmarks.peers import registry
from benchmarks.problems import build
from benchmarks.runner import Profile, qualify

QUICK = Profile("test", 0.01, 3)
LIMITS = {
    "copy_tbs": 4.0, "bf16_tflops": 800.0, "tf32_tflops": 400.0, "fp32_tflops": 50.0, "special_tops": 4.0,
    "fma_tops": 32.0, "kernel_us": 1.0,
}  # fmt: skip
SMALL = {"B": 3, "T": 5, "S": 6, "I": 8, "H": 8, "A": 8}


class HostEvent:
    """Stands for a CUDA event where work is done as soon as it is asked for."""

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.time - self.time) * 1e3


@pytest.fixture
def no_gpu(monkeypatch):
    """torch.cuda as far as the benchmarks use it, on the host."""
    nothing = lambda *_: None  # noqa: E731
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    for name in ("synchronize", "_sleep", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(timing, "Flush", lambda: nothing)
    monkeypatch.setattr(timing, "cycles_per_second", lambda: 1e9)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)


def small(case: Case, **changes) -> Case:
    shape = {key: SMALL[key] for key in case.shape}
    return dataclasses.replace(case, shape=shape, device="cpu", **changes)


def one_of_each() -> list[Case]:
    found = {}
    for cases in CUDA_SUITES.values():
        for case in cases:
            found.setdefault((case.suite, case.operator, case.mode, case.dtype), small(case))
    return list(found.values())


@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: f"{case.name}/{case.precision}")
def test_contestants_of_a_gpu_agree_with_float64(case):
    elsewhere = ("torch_compile", "ours_cuda", "haste", "flashrnn")
    names = tuple(n for n in case.contestants if not n.endswith("graph") and n not in elsewhere)
    case = dataclasses.replace(case, contestants=names)
    from contextlib import ExitStack

    with ExitStack() as stack, torch.set_grad_enabled(case.mode.has_gradients):
        entries, absent, failed = qualify(case, build(case), None, stack)
    assert failed == {}
    assert set(entries) | set(absent) == {STOCK, *names}
    # On a CPU weights are frozen for this one, which has no gradients then.
    assert set(absent) <= ({"ours_lengths"} if case.mode.has_gradients else set())


def test_a_case_is_measured_both_ways(no_gpu):
    case = small(CUDA_SUITES["recurrent"][0])
    found = runner.run_case(case, LIMITS, QUICK)
    stock, ours = found.contestant(STOCK), found.contestant("ours")
    assert found.contestant("ours_graph").missing == "for a GPU only"
    assert stock.milliseconds > 0
    assert ours.device_milliseconds > 0
    assert ours.ratio_low <= ours.ratio <= ours.ratio_high
    assert ours.device_ratio > 0
    assert ours.peak_mib == 2
    assert ours.floor_share == pytest.approx(max(found.floors.values()) / ours.device_milliseconds)
    assert found.noise >= 0
    assert [bar.contestant for bar in found.bars] == ["ours", "ours_graph"]
    assert found.precision == "bfloat16"
    assert "torch_eager" in bench.line(found)


def test_a_contestant_whose_host_is_slow_is_timed_as_called_alone(no_gpu):
    races = timing.race({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, seconds=0.0, least_rounds=2)
    assert set(races.called.timings) == {"slow", "fast"}
    assert set(races.device.timings) == {"fast"}
    assert races.called.timings["slow"].median >= 0.01


def test_halves_of_a_pair_are_looked_at_alike(no_gpu, monkeypatch):
    hosts = iter([(0.001, 0.001), (0.2, 0.2), (0.001, 0.001)])
    monkeypatch.setattr(timing, "warm_up", lambda call: next(hosts))
    call = lambda: None  # noqa: E731
    races = timing.race({"a": call, "a again": call, "b": lambda: None}, seconds=0.0, least_rounds=2)
    assert set(races.device.timings) == {"b"}


def test_a_contestant_without_enough_memory_leaves_the_others(no_gpu, monkeypatch):
    def peak(call, clear):
        if not any(stock is call for stock in calls):
            calls.append(call)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    calls: list = []
    monkeypatch.setattr(runner, "peak_mib", peak)
    found = runner.run_case(small(CUDA_SUITES["recurrent"][0]), LIMITS, QUICK)
    assert found.contestant(STOCK).milliseconds > 0
    assert found.contestant("ours").milliseconds is None
    assert found.contestant("ours").failure == "OutOfMemoryError: CUDA out of memory"


def test_names_of_gpu_cases_are_unique_and_contestants_exist():
    cases = [case for suite in CUDA_SUITES.values() for case in suite]
    assert len({case.name for case in cases}) == len(cases)
    assert set(CUDA_SUITES) == set(bench.SUITES) == set(bench.SHARES)
    for case in cases:
        assert set(case.contestants) <= set(registry())
        assert {bar.contestant for bar in case.bars} <= set(case.contestants)
        assert {bar.against for bar in case.bars} <= {STOCK, *case.contestants}
        assert case.device == "cuda"


def test_floors_follow_the_limits():
    additive = next(c for c in CUDA_SUITES["additive"] if c.shape["T"] == 512 and c.dtype == torch.bfloat16)
    found = ceilings.floors(additive, LIMITS)
    elements = 64 * 512 * 512 * 512
    assert found["scores"] == pytest.approx(3.5 * elements / 32e12 * 1e3)
    assert ceilings.floors(additive, {**LIMITS, "special_tops": 40.0})["scores"] == pytest.approx(
        elements / 40e12 * 1e3
    )
    lstm = CUDA_SUITES["recurrent"][0]
    assert ceilings.floors(lstm, LIMITS)["products"] == pytest.approx(lstm.flops / 800e12 * 1e3)
    exact = dataclasses.replace(lstm, dtype=torch.float32)
    assert ceilings.floors(exact, LIMITS)["products"] == pytest.approx(lstm.flops / 50e12 * 1e3)
    values = 16 * 1024 * 1024 + 4 * 512 * 1024
    assert ceilings.floors(lstm, LIMITS)["bytes"] == pytest.approx(2 * values / 4e12 * 1e3)


def test_results_of_a_gpu_survive_writing(no_gpu, tmp_path):
    keeper = bench.Keeper(tmp_path, {"machine": "abacus"}, "full")
    keeper.ceilings = LIMITS
    case = small(CUDA_SUITES["recurrent"][0])
    assert keeper.begin(case.name) == 0
    found = runner.run_case(case, LIMITS, QUICK)
    keeper.add("recurrent", found)
    assert results.Document.read(tmp_path / "recurrent.json").cases == [found]
    again = bench.Keeper(tmp_path, {"machine": "abacus"}, "full")
    assert again.load("recurrent") == {case.name}
    assert again.load("cells") == set()
    assert again.begin(case.name) == 0


def test_results_from_before_gpus_are_still_read(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"schema": 1, "environment": {}, "cases": [], "created": "then"}))
    assert results.Document.read(tmp_path / "old.json").ceilings == {}


def test_a_case_that_ended_the_process_is_run_without_us_and_then_not_at_all(no_gpu, tmp_path):
    case = small(CUDA_SUITES["recurrent"][0])
    for died in (0, 1, 2):
        keeper = bench.Keeper(tmp_path, {}, "full")
        keeper.ceilings = LIMITS
        assert keeper.begin(case.name) == died
        found = bench._guarded(case, keeper, QUICK, None, died)
        ours = found.contestant("ours")
        assert (ours.failure is None) == (died == 0)
        assert (found.contestant(STOCK).milliseconds is not None) == (died < 2)


def test_a_broken_context_is_told_from_a_wrong_result():
    def result(failure: str | None) -> results.CaseResult:
        return results.CaseResult("a", "a", "", "a", "a", "a", {}, 1, [results.Contestant("ours", failure=failure)], [])

    assert bench._is_broken(result("AcceleratorError: CUDA error: an illegal memory access was encountered"))
    assert not bench._is_broken(result("output: 3 of 7 elements differ"))
    assert not bench._is_broken(result("OutOfMemoryError: CUDA out of memory"))
    assert not bench._is_broken(result(None))


@pytest.fixture
def settings(tmp_path):
    return parts.Settings(10.0, tmp_path)


def make(name: str, program: str, seconds: float = 5.0) -> parts.Part:
    def run(settings, limit, log):
        code, spent, output = parts.execute(name, [sys.executable, "-c", program], min(limit, seconds), log)
        return parts.Outcome(name, code == 0, spent, parts.told(code, spent), parts.tail(output, 2))

    return parts.Part(run, 1.0, 100.0)


def test_parts_go_on_after_one_that_fails_or_hangs(monkeypatch, settings):
    def breaks(settings, limit, log):
        raise OSError("no such tool")

    table = {
        "fails": make("fails", "print('before'); raise SystemExit(3)"),
        "hangs": make("hangs", "import time; print('begun', flush=True); time.sleep(60)", 0.5),
        "breaks": parts.Part(breaks, 1.0, 100.0),
        "works": make("works", "print('done')"),
    }
    monkeypatch.setattr(parts, "PARTS", table)
    settings = dataclasses.replace(settings, budget=100.0)
    outcomes = parts.run_parts(list(table), settings)
    assert [outcome.passed for outcome in outcomes] == [False, False, False, True]
    assert outcomes[0].note == "exit code 3"
    assert outcomes[1].note.startswith("out of time")
    assert "begun" in (settings.folder / "hangs.log").read_text()
    assert outcomes[2].note == "OSError: no such tool"
    assert "done" in (settings.folder / "works.log").read_text()
    text = parts.summary(outcomes, settings)
    assert text.splitlines()[-1].startswith("summary: fails FAILED, hangs FAILED, breaks FAILED, works ok")


def test_no_part_inherits_the_binding_of_threads(monkeypatch, settings):
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    program = "import os; print(os.environ['OMP_PROC_BIND'], os.environ['EXTRA'])"
    log = settings.folder / "a.log"
    _, _, output = parts.execute("a", [sys.executable, "-c", program], 10.0, log, {"EXTRA": "more"})
    assert output.split() == ["false", "more"]


def test_time_that_a_part_leaves_over_goes_to_the_next(monkeypatch, settings):
    given = {}

    def part(name, most):
        def run(settings, limit, log):
            given[name] = limit
            return parts.Outcome(name, True, 0.0, "ok")

        return parts.Part(run, 1.0, most)

    monkeypatch.setattr(parts, "PARTS", {"a": part("a", 100.0), "b": part("b", 100.0), "c": part("c", 4.0)})
    parts.run_parts(["c", "a", "b"], settings)
    assert list(given) == ["a", "b", "c"]
    assert given["a"] == pytest.approx(10 / 3, abs=0.1)
    assert given["b"] == pytest.approx(5, abs=0.1)
    assert given["c"] == 4.0


def test_a_short_part_gets_what_it_needs(monkeypatch, settings):
    given = {}

    def run(settings, limit, log):
        given[str(log.stem)] = limit
        return parts.Outcome("a", True, 0.0, "ok")

    monkeypatch.setattr(parts, "PARTS", {"a": parts.Part(run, 1.0, 100.0, 8.0), "b": parts.Part(run, 9.0, 100.0)})
    parts.run_parts(["a", "b"], settings)
    assert given["a"] == 8.0
    assert given["b"] == pytest.approx(10, abs=0.1)


def test_no_part_is_begun_without_time(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "PARTS", {"works": make("works", "")})
    (outcome,) = parts.run_parts(["works"], parts.Settings(1.0, tmp_path))
    assert outcome.note == "not begun: no time left"


def test_the_benchmarks_are_begun_again_after_a_crash(monkeypatch, settings):
    """The first process dies, the second finishes."""
    seen = []

    def execute(name, command, seconds, log, variables=None):
        seen.append(command)
        return (bench.BROKEN if len(seen) == 1 else 0), 0.1, "recurrent/lstm: fine\n"

    monkeypatch.setattr(parts, "execute", execute)
    outcome = parts.bench(settings, 60.0, settings.folder / "bench.log")
    assert outcome.passed
    assert ["--resume" in command for command in seen] == [False, True]
    assert "begun again 1 times" in outcome.note


def test_benchmarks_that_come_to_nothing_are_not_begun_for_ever(monkeypatch, settings):
    seen = []

    def execute(name, command, seconds, log, variables=None):
        seen.append(command)
        return 1, 0.1, "ImportError: nothing works\n"

    monkeypatch.setattr(parts, "execute", execute)
    outcome = parts.bench(settings, 60.0, settings.folder / "bench.log")
    assert not outcome.passed
    assert len(seen) == 2
    assert outcome.lines == ["ImportError: nothing works"] * 2


def test_the_command_refuses_parts_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "tests,coffee"])
    assert "got coffee" in capsys.readouterr().err


def test_the_command_says_what_passed(monkeypatch, capsys, tmp_path):
    from benchmarks.gpu import __main__ as command

    monkeypatch.setattr(command, "gpu_name", lambda: None)
    with pytest.raises(SystemExit):
        main([])
    assert "expected a GPU that torch can use, got none" in capsys.readouterr().err
    monkeypatch.setattr(command, "gpu_name", lambda: "abacus")
    monkeypatch.setattr(command, "PARTS", {"a": None})
    monkeypatch.setattr(command, "run_parts", lambda names, settings: [parts.Outcome("a", True, 1.0, "ok")])
    assert main(["--out", str(tmp_path)]) == 0
    assert "summary: a ok" in capsys.readouterr().out


def test_describing_a_gpu_needs_one(monkeypatch):
    from benchmarks import environment

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="a GPU: expected one that torch can use"):
        environment.describe_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=140 * 2**30,
        L2_cache_size=60 * 2**20,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = environment.describe_gpu()
    assert (found["machine"], found["capability"], found["l2_mib"]) == ("nvidia-h200", "9.0", 60.0)


def test_tf32_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with ceilings.tf32(not before):
        assert torch.backends.cudnn.allow_tf32 is not before
    assert torch.backends.cudnn.allow_tf32 is before


def made_up(suite: str) -> results.Document:
    """Every case of a suite: ours loses the first and fails the second."""
    found = []
    for index, case in enumerate(CUDA_SUITES[suite]):
        ratio = 0.5 if index == 0 else 2.0 + index
        contestants = [results.Contestant(STOCK, milliseconds=2.0, device_milliseconds=1.5, ratio=1.0, peak_mib=8.0)]
        for name in case.contestants:
            each = results.Contestant(
                name, milliseconds=2 / ratio, device_milliseconds=1 / ratio, ratio=ratio, ratio_low=0.9 * ratio,
                ratio_high=1.1 * ratio, floor_share=0.25, peak_mib=4.0,
            )  # fmt: skip
            contestants.append(results.Contestant(name, failure="output: wrong") if index == 1 else each)
        bars = [results.BarResult(bar.contestant, bar.against, bar.at_least, ratio, index > 1) for bar in case.bars]
        found.append(
            results.CaseResult(
                case.name, suite, "", case.operator, case.mode.value, "bfloat16", dict(case.shape), 1, contestants,
                bars, noise=0.01, precision=case.precision, floors={"bytes": 0.1, "products": 0.2},
            )
        )  # fmt: skip
    place = {"gpu": "Abacus 200", "machine": "abacus", "versions": {"torch": "2.11"}, "commit": "0123456789abcdef"}
    return results.Document(place, found, ceilings=LIMITS)


@pytest.mark.parametrize("suite", CUDA_SUITES)
def test_the_tables_of_a_gpu(suite):
    lines = tables.markdown(made_up(suite)).splitlines()
    assert len(lines) == len(CUDA_SUITES[suite]) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert "**0.50x**" in lines[2]
    assert "failed" in lines[3]
    lines = report.ratios(made_up(suite)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "0.50x" in lines[2]


def test_the_page_of_a_gpu_names_what_was_lost(tmp_path):
    pytest.importorskip("matplotlib")
    made_up("dot").write(tmp_path / "dot.json")
    made_up("cells").write(tmp_path / "cells.json")
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    first, second = CUDA_SUITES["dot"][:2]
    assert f"slower than stock beyond noise: ours in {first.name}: 0.50" in text
    assert f"bar missed: ours_context in {first.name}" in text
    assert f"past its tolerance or failed: ours in {second.name}" in text
    assert "bf16_tflops 800" in text
    assert "<h2>Every figure</h2>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "dot.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "recurrent.png").exists()


def test_modes_of_gpu_cases():
    assert {case.mode for case in CUDA_SUITES["cells"]} == {Mode.STEPS, Mode.STEPS_TRAINING}


def test_the_suite_is_dealt_out_to_processes(monkeypatch, settings):
    """Real processes of pytest, on the CPU: every test of a file runs once, and one that hangs is named."""
    path = settings.folder / "tests" / "test_cuda_of_a_test.py"
    path.parent.mkdir()
    path.write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('n', range(3))\ndef test_a(n): pass\n"
        "def test_b(): pass\ndef test_c(): assert False\ndef test_d(): time.sleep(60)\n"
    )
    monkeypatch.setattr(parts.os, "cpu_count", lambda: 4)
    settings = dataclasses.replace(settings, tests=f"{path} --device cpu --rootdir {settings.folder} -p tests.conftest")
    outcome = parts.tests(settings, 25.0, settings.folder / "tests.log")
    assert not outcome.passed
    assert outcome.note == "4 passed, 1 failed, of 6 in 2 processes"
    assert any("out of time" in line and "::test_d" in line for line in outcome.lines), outcome.lines
    assert any(line.startswith("FAILED") and "::test_c" in line for line in outcome.lines)
