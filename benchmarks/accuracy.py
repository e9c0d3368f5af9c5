"""`python -m benchmarks.accuracy`: errors of ours and of stock torch against float64, forward and gradients."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import RESULTS, describe, machine_name, pin_threads

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.problems import Named, Problem
    from tests.compare import ErrorRatio

# Where stock's mean error is this share of the values' own mean size, neither result has digits left to compare.
NO_DIGITS = 1e-2
# Draws of inputs and weights: more where one has few elements, or the largest error is a matter of chance.
SEEDS, SEEDS_OF_SHORT, SHORT = 3, 24, 20


@dataclass(frozen=True)
class Condition:
    """Inputs that strain the arithmetic. ``spread`` draws each input's size from 1/spread to spread, log-uniformly."""

    name: str
    steps: int = 100
    weights: float = 1.0
    input_weights: float = (
        1.0  # those of weight_ih alone, on top: saturates gates without making the recurrence chaotic
    )
    inputs: float = 1.0
    spread: float = 1.0


CONDITIONS = (
    Condition("T=50", steps=50),
    Condition("T=500", steps=500),
    Condition("T=2000", steps=2000),
    # A recurrence of large weights is chaotic: after some steps no float32 result has digits left.
    Condition("weights x10", steps=8, weights=10.0),
    Condition("weights x50", steps=3, weights=50.0),
    Condition("input weights x10", input_weights=10.0),
    Condition("input weights x50", input_weights=50.0),
    Condition("inputs of 1e-30", inputs=1e-30),
    Condition("inputs of 1e-4", inputs=1e-4),
    Condition("inputs of 30", inputs=30.0),
    Condition("inputs of 1e30", inputs=1e30),
    Condition("inputs of 1e-30 to 1e30", spread=1e30),
)
# B, I, H: one row; a few; a full tile with tails
SIZES = ((1, 128, 128), (5, 64, 200), (32, 96, 63))
ATTENTION_CONDITIONS = (
    Condition("N(0, 1)"),
    Condition("N(0, 3)", inputs=3.0),
    Condition("N(0, 10)", inputs=10.0),
    Condition("N(0, 30)", inputs=30.0),
    Condition("N(0, 1e-4)", inputs=1e-4),
    Condition("inputs of 1e-30 to 1e30", spread=1e30),
)


@dataclass(frozen=True)
class Finding:
    """The errors of one result (output, final state, one gradient) over all seeds."""

    operator: str
    condition: str
    shape: dict[str, int]
    result: str
    errors: dict[str, float]
    judged: bool  # False where stock itself has no digits left
    met: bool


def recurrent_findings(kinds: Sequence[str], conditions: Sequence[Condition] = CONDITIONS) -> Iterator[Finding]:
    from benchmarks.cases import Case, Mode

    for kind in kinds:
        for condition in conditions:
            for batch, width, hidden in SIZES:
                shape = {"B": batch, "T": condition.steps, "I": width, "H": hidden}
                for mode in (Mode.FORWARD, Mode.TRAINING):
                    yield from _findings(Case("accuracy", kind, shape, mode, ("ours",)), condition)


def attention_findings(conditions: Sequence[Condition] = ATTENTION_CONDITIONS) -> Iterator[Finding]:
    from benchmarks.cases import Case, Mode

    for condition in conditions:
        shape = {"B": 3, "T": 9, "S": 77, "A": 100}
        for mode in (Mode.FORWARD, Mode.TRAINING):
            yield from _findings(Case("accuracy", "additive_attention", shape, mode, ("ours",)), condition)


def _findings(case: Any, condition: Condition) -> Iterator[Finding]:
    import torch

    from benchmarks.problems import build
    from tests.compare import error_ratio

    ours: list[Named] = []
    stock: list[Named] = []
    oracle: list[Named] = []
    with torch.set_grad_enabled(case.mode.has_gradients):
        for seed in range(SEEDS_OF_SHORT if case.shape["T"] < SHORT else SEEDS):
            problem = build(case, seed)
            _strain(problem, condition)
            mine, theirs = (problem.outcome(m, problem.call(m)) for m in (problem.ours(), problem.stock()))
            if case.kind == "rnn_relu" and (_flips(mine, problem.oracle) or _flips(theirs, problem.oracle)):
                continue
            ours.append(mine)
            stock.append(theirs)
            oracle.append(problem.oracle)
    if not oracle:
        return
    for index, (name, _) in enumerate(oracle[0]):
        if case.mode.has_gradients and not name.startswith("gradient"):
            continue  # the forward of training is that of the other mode
        expected = _pool(oracle, index)
        errors = error_ratio(_pool(ours, index), _pool(stock, index), expected)
        judged = _has_digits(errors, expected)
        yield Finding(case.operator, condition.name, dict(case.shape), name, asdict(errors), judged, errors.within_bars)


def _flips(found: Named, oracle: Named) -> bool:
    """Whether rounding switched some unit of a relu on or off: its gradient is then another number altogether."""
    return bool(((found[0][1] > 0) != (oracle[0][1] > 0)).any())


def _pool(runs: Sequence[Named], index: int) -> Any:
    import torch

    return torch.cat([run[index][1].flatten() for run in runs])


def _has_digits(errors: ErrorRatio, expected: Any) -> bool:
    size = expected[expected.isfinite()].abs().mean().item()
    return errors.stock_mean <= NO_DIGITS * size


def _strain(problem: Problem, condition: Condition) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in problem.stock_module.named_parameters():
            parameter.mul_(condition.weights * (condition.input_weights if "weight_ih" in name else 1.0))
        for _, leaf in problem.leaves:
            leaf.mul_(condition.inputs)
            if condition.spread != 1.0:
                exponent = torch.rand_like(leaf) * 2 - 1
                leaf.copy_(leaf.sign() * condition.spread**exponent)


def table(findings: Sequence[Finding]) -> Table:
    """The worst ratios of each operator and condition, over shapes and results."""
    from rich.table import Table

    from tests.compare import LARGEST_ERROR_RATIO, MEAN_ERROR_RATIO

    made = Table(title="errors against float64, ours over stock", title_justify="left", pad_edge=False)
    for heading in ("operator", "inputs"):
        made.add_column(heading, no_wrap=True)
    for results in ("forward", "gradients"):
        made.add_column(f"{results}: largest", justify="right", no_wrap=True)
        made.add_column("mean", justify="right", no_wrap=True)
    made.add_column("not met", overflow="fold")
    bars = {"largest": LARGEST_ERROR_RATIO, "mean": MEAN_ERROR_RATIO}
    for operator, condition in dict.fromkeys((finding.operator, finding.condition) for finding in findings):
        rows = [f for f in findings if (f.operator, f.condition) == (operator, condition)]
        cells = []
        for gradient in (False, True):
            part = [f for f in rows if f.judged and f.result.startswith("gradient") == gradient]
            for measure, bar in bars.items():
                worst = max((f.errors[measure] for f in part), default=None)
                colour = "red" if worst is not None and worst > bar else "green"
                cells.append("no digits" if worst is None else f"[{colour}]{worst:.2f}[/]")
        missed = dict.fromkeys(f"{f.result} {_sizes(f.shape)}" for f in rows if f.judged and not f.met)
        made.add_row(operator, condition, *cells, ", ".join(missed))
    return made


def _sizes(shape: dict[str, int]) -> str:
    return "(" + ",".join(str(size) for size in shape.values()) + ")"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    operators = ("lstm", "gru", "rnn_tanh", "rnn_relu", "additive_attention")
    parser.add_argument("operator", nargs="*", default=list(operators), help=f"some of {', '.join(operators)}")
    parser.add_argument("--quick", action="store_true", help="leave out T=2000")
    parser.add_argument("--json", type=Path, default=RESULTS / machine_name() / "accuracy.json", metavar="FILE")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.operator) - set(operators))
    if unknown:
        parser.error(f"operator: expected some of {', '.join(operators)}, got {', '.join(unknown)}")
    from rich.console import Console

    conditions = [c for c in CONDITIONS if c.steps < 2000] if options.quick else list(CONDITIONS)
    findings: list[Finding] = []
    for kind in options.operator:
        if kind == "additive_attention":
            findings += attention_findings()
        elif kind == "rnn_relu":  # it overflows where tanh saturates
            tame = [c for c in conditions if c.weights == c.input_weights == c.spread == 1.0 and c.inputs <= 30]
            findings += recurrent_findings([kind], tame)
        else:
            findings += recurrent_findings([kind], conditions)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(table(findings))
    judged = [finding for finding in findings if finding.judged]
    missed = sum(not finding.met for finding in judged)
    console.print(f"{len(judged)} results compared, {missed} past the bars (largest 2, mean 1.5 times stock's)")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": 1, "environment": describe(), "findings": [asdict(finding) for finding in findings]}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    pin_threads()
    sys.exit(main())
