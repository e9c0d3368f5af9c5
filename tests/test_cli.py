"""The command line: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import seqattn_kernels as sk
from seqattn_kernels import native
from seqattn_kernels.cli import compare, doctor, main, measure
from seqattn_kernels.cli.threads import Sharing, measure_sharing

FACTORIES = """
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Tagger(nn.Module):
    def __init__(self, kind=nn.GRU, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.rnn = kind(8, 12, num_layers=2, bidirectional=True, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(24, 5)

    def forward(self, words):
        output, state = self.rnn(self.embedding(words))
        logits = self.output(self.dropout(output))
        return {"logits": logits, "state": state, "tags": logits.argmax(-1)}


def tagger():
    return Tagger(), torch.randint(20, (3, 7))


def lstm_with_dropout():
    return Tagger(nn.LSTM, dropout=0.5), (torch.randint(20, (3, 7)),)


def keywords():
    return Tagger(nn.RNN), {"words": torch.randint(20, (3, 7))}


def packed():
    x = torch.randn(6, 3, 8, requires_grad=True)
    return nn.GRU(8, 12), pack_padded_sequence(x, [6, 2, 4], enforce_sorted=False)


def with_state():
    return nn.LSTM(8, 12), (torch.randn(4, 3, 8, requires_grad=True), (torch.zeros(1, 3, 12), torch.zeros(1, 3, 12)))


def double():
    return nn.GRU(8, 12).double(), torch.randn(4, 3, 8, dtype=torch.float64)


shared_model = Tagger()


def shared():
    return shared_model, torch.randint(20, (3, 7))


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8)

    def forward(self, x):
        assert x.dtype == torch.float32, "single precision only"
        return self.rnn(x)[0]


def single_only():
    return Single(), torch.randn(5, 2, 8)


class Detached(Single):
    def forward(self, x):
        return self.rnn(x)[0].detach()


def detached():
    return Detached(), torch.randn(5, 2, 8)


def linear():
    return nn.Linear(3, 3), torch.randn(2, 3)


def just_a_model():
    return nn.GRU(3, 3)


def bad_inputs():
    return nn.GRU(3, 3), "text"


def wrong_shape():
    return nn.GRU(3, 3), torch.randn(5, 2, 4)


def raises():
    raise RuntimeError("no weights found")


number = 3


class Maker:
    @staticmethod
    def make():
        return tagger()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in a directory with `factories.py`; gives exit status, stdout and stderr."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0005)

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    yield command
    sys.modules.pop("factories", None)


def compare_quickly(run: Any, name: str, *options: str) -> tuple[int, str, str]:
    return run("compare", f"factories:{name}", "--seconds", "0.1", *options)


@pytest.mark.parametrize(
    "name", ["tagger", "lstm_with_dropout", "keywords", "packed", "with_state", "double", "shared", "Maker.make"]
)
def test_models_that_agree(run: Any, name: str, tmp_path: Path) -> None:
    status, out, _ = compare_quickly(run, name, "--train", "--json", "figures.json")
    assert status == 0, out
    assert "The results agree." in out
    for row in ("outputs", "gradients", "inference", "training"):
        assert row in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["schema"] == 1
    assert figures["agrees"] is True
    assert [mode["name"] for mode in figures["modes"]] == ["inference", "frozen inference", "training"]
    for mode in figures["modes"]:
        assert mode["stock"]["low"] <= mode["stock"]["median"] <= mode["stock"]["high"]
        assert mode["stock_memory"] > 0
    assert [d["what"] for d in figures["differences"]] == ["outputs", "outputs in training", "gradients"]
    assert any(module["replaced_by"] for module in figures["modules"])


def test_without_train_there_are_no_gradients(run: Any) -> None:
    status, out, _ = compare_quickly(run, "tagger")
    assert status == 0
    assert "gradients" not in out
    assert "frozen inference" in out


def test_a_model_of_one_precision_has_no_oracle(run: Any) -> None:
    status, out, _ = compare_quickly(run, "single_only")
    assert status == 0
    assert "no float64 copy to measure errors against: AssertionError: single precision only" in out


def test_threads_are_set(run: Any) -> None:
    _, out, _ = compare_quickly(run, "tagger", "--threads", "1")
    assert "Time and memory, threads: 1" in out


def spoiled(change: Any) -> Any:
    """accelerate() with a fault: `change` is called with what the first recurrent module returns."""
    accelerate = sk.accelerate

    def wrong(model: nn.Module) -> nn.Module:
        model = accelerate(model)
        module = next(m for m in model.modules() if isinstance(m, nn.RNNBase))
        forward = module.forward
        module.forward = lambda *args, **kwargs: change(*forward(*args, **kwargs))  # type: ignore[method-assign]
        return model

    return wrong


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * 1.001


def fail(output: Any, state: Any) -> Any:
    raise RuntimeError("kernel launch failed")


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda output, state: (output * 1.001, state), [], "The results differ beyond tolerance"),
        (lambda output, state: (output * float("nan"), state), [], "infinities or NaNs stand in other places"),
        (
            lambda output, state: (output, state[:1]),
            [],
            "stock gives [4, 3, 12] of torch.float32, accelerated [1, 3, 12]",
        ),
        (lambda output, state: (output, (state, state)), [], "only one of the models has output"),
        (fail, [], "accelerated, it raised RuntimeError: kernel launch failed"),
        (
            lambda output, state: (WrongGradient.apply(output), state),
            ["--train"],
            "The results differ beyond tolerance",
        ),
    ],
)
def test_models_that_differ(
    run: Any, monkeypatch: pytest.MonkeyPatch, change: Any, options: list[str], said: str
) -> None:
    monkeypatch.setattr(sk, "accelerate", spoiled(change))
    status, out, _ = compare_quickly(run, "tagger", *options)
    assert status == 1, out
    assert said in out


def test_a_wrong_gradient_is_seen_in_training_alone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sk, "accelerate", spoiled(lambda output, state: (WrongGradient.apply(output), state)))
    assert compare_quickly(run, "tagger")[0] == 0


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("factories", "'factories': expected PKG.MODULE:FACTORY"),
        ("factories:", "expected PKG.MODULE:FACTORY"),
        (":tagger", "expected PKG.MODULE:FACTORY"),
        ("no_such_module:f", "no_such_module: can't be imported (ModuleNotFoundError"),
        ("broken:f", "broken: can't be imported (ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("factories:no_such", "factories has no 'no_such'"),
        ("factories:Maker.no_such", "factories has no 'Maker.no_such'"),
        ("factories:number", "expected a function, got int"),
        ("factories:raises", "it raised RuntimeError: no weights found"),
        ("factories:just_a_model", "expected (model, example_inputs), got GRU"),
        ("factories:bad_inputs", "example_inputs: expected a tensor, a tuple of arguments or a dict"),
        ("factories:linear", "accelerate() replaces nothing in this model"),
        ("factories:wrong_shape", "GRU called with [[5, 2, 4]] raised RuntimeError"),
    ],
)
def test_nothing_to_compare(run: Any, path: str, said: str) -> None:
    status, out, err = run("compare", path)
    assert status == 2, out
    assert said in err.replace("\n", "")
    assert "Traceback" not in err


def test_nothing_to_differentiate(run: Any) -> None:
    status, _, err = compare_quickly(run, "detached", "--train")
    assert status == 2
    assert "--train: no output depends on anything that requires a gradient" in err.replace("\n", "")


def test_an_error_past_tolerance_passes_only_as_rounding() -> None:
    def difference(relative: float, stock: float | None, ours: float | None) -> compare.Difference:
        return compare.Difference("outputs", "output 0", relative, relative, 1e-4, stock, ours)

    assert difference(1e-5, None, None).agrees
    assert not difference(1e-3, None, None).agrees
    assert difference(1e-3, 6e-4, 1e-3).agrees
    assert not difference(1e-3, 4e-4, 1e-3).agrees
    assert not difference(1e-3, 0.0, 1e-3).agrees


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        return b.add(1)

    assert measure.peak_memory(call, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_times_are_those_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0005)
    a, b, ratio = measure.time_in_turns(lambda: time.sleep(0.004), lambda: time.sleep(0.001), 0.05)
    assert a.low <= a.median <= a.high
    assert a.low >= 0.004
    assert b.low >= 0.001
    assert 2 < ratio.median < 5


def test_doctor(run: Any) -> None:
    status, out, _ = run("doctor", "--threads", "1")
    assert status == 0
    assert torch.__version__ in out
    assert "native CPU kernels" in out
    assert "backend reference" in out
    assert "1, " in out
    assert "OMP_PROC_BIND" in out


def test_doctor_where_nothing_could_be_compiled(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "_why_not", "the native kernels were not compiled; build it with pip")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    status, out, _ = run("doctor", "--threads", "1")
    assert status == 0
    assert "not built; torch's own functions serve instead" in out
    assert "build it with pip" in out
    assert "apt install g++ python3-dev" in out


def test_doctor_as_a_command_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "seqattn_kernels.cli", "doctor", "--threads", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "seqattn doctor" in done.stdout


@pytest.mark.parametrize(
    ("measured", "mark", "said"),
    [
        (Sharing(2, (0.5, 0.6), bound=False, busy=0.0), doctor.GOOD, ""),
        (Sharing(2, (0.5, 90.0), bound=False, busy=0.0), doctor.BAD, "Set OMP_PROC_BIND=true before Python starts"),
        (Sharing(2, (80.0, 90.0), bound=False, busy=0.6), doctor.BAD, "other processes kept 60% of the cores busy"),
        (Sharing(2, (80.0, 90.0), bound=True, busy=0.6), doctor.BAD, "other processes kept 60% of the cores busy"),
        (Sharing(2, (80.0, 90.0), bound=True, busy=None), doctor.BAD, "the cores are busy with something else"),
    ],
)
def test_what_doctor_says_of_threads(measured: Sharing, mark: str, said: str) -> None:
    finding = doctor.sharing(measured)
    assert finding.mark == mark
    assert said in finding.advice
    assert ("OMP_PROC_BIND" in finding.advice) == (mark == doctor.BAD and not measured.bound)


def test_threads_are_measured(threads: int) -> None:
    measured = measure_sharing()
    assert measured.threads == threads == torch.get_num_threads()
    assert all(ratio > 0 for ratio in measured.ratios)
    if threads == 1:
        assert measured.shared == 0


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(doctor, "measure_sharing", lambda: Sharing(4, (9.0,), bound=False, busy=0.0))
    first, second = doctor.threads()
    assert first.mark == doctor.BAD
    assert "Set OMP_NUM_THREADS=1" in first.advice
    assert second.mark == doctor.BAD


def test_usage(run: Any) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("doctor", "compare", "demo", "bench"):
        assert command in out
    assert run("no-such-command")[0] == 2
    assert run("compare")[0] == 2
    assert run("doctor", "--threads", "0")[0] == 2
