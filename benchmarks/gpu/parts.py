"""The parts of a run on a GPU: what each starts, how long it may take, and what it says in the end."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.environment import RESULTS, ROOT

# How often the benchmarks are begun again after a contestant broke their process.
RESTARTS = 6
# Seconds a part is given to end by itself once its time is over.
GRACE = 5.0
SLOWEST_USEFUL = 3.0  # a part with less than this many seconds left is not begun
PYTHON = (sys.executable, "-u")
NO_TESTS = 5  # what pytest ends with where it found none


@dataclass(frozen=True)
class Settings:
    budget: float
    out: Path | None = None
    cases: str = ""
    suites: str = ""
    quick: bool = False
    tests: str = ""
    first: int | None = None

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        from benchmarks.environment import gpu_name

        return RESULTS / str(gpu_name())


@dataclass
class Outcome:
    name: str
    passed: bool
    seconds: float
    note: str  # one line
    lines: list[str] = field(default_factory=list)  # what to show in the end besides


@dataclass(frozen=True)
class Part:
    """``run`` gets the settings, the seconds it may take and the file its output goes to."""

    run: Callable[[Settings, float, Path], Outcome]
    weight: float  # of its time among that of the parts still to come
    most: float  # seconds
    least: float = 0.0  # seconds, where there are so many


def execute(
    name: str, command: Sequence[str], seconds: float, log: Path, variables: dict[str, str] | None = None
) -> tuple[int | None, float, str]:
    """Run a command in a session of its own; exit code (None: out of time), seconds, output. Output goes to ``log``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    # make binds threads for the CPU's benchmarks; here every worker of pytest and of the compiler would share one core.
    environment |= {"OMP_PROC_BIND": "false", **(variables or {})}
    begin = time.monotonic()
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what it has found so far
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open(errors="replace") as file:
        file.seek(start)
        output = file.read()
    return code, time.monotonic() - begin, output


def tail(output: str, count: int) -> list[str]:
    return [line[:300] for line in output.splitlines() if line.strip()][-count:]


def told(code: int | None, seconds: float) -> str:
    return f"out of time after {seconds:.0f} s" if code is None else f"exit code {code}" if code else "ok"


def environment(settings: Settings, seconds: float, log: Path) -> Outcome:
    program = (
        "import json; from benchmarks.environment import describe_gpu; print(json.dumps(describe_gpu(), indent=1))"
    )
    code, spent, output = execute("environment", [*PYTHON, "-c", program], seconds, log)
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.max.sm,power.limit,temperature.gpu", "--format=csv"]
    if shutil.which("nvidia-smi"):
        output += execute("environment", query, 20, log)[2]
    (settings.folder / "environment.txt").write_text(output)
    return Outcome("env", code == 0, spent, told(code, spent), tail(output, 3) if code else [])


def build(settings: Settings, seconds: float, log: Path) -> Outcome:
    variables = {"SEQATTN_BUILD": os.environ.get("SEQATTN_BUILD", "cuda" if shutil.which("nvcc") else "auto")}
    # For this GPU alone: the code of all others takes most of the compiler's time.
    variables["SEQATTN_CUDA_ARCHS"] = os.environ.get("SEQATTN_CUDA_ARCHS") or _architecture()
    command = [*PYTHON, "setup.py", "-q", "build_ext", "--inplace"]
    code, spent, output = execute("build", command, seconds, log, variables)
    note = f"{told(code, spent)} (SEQATTN_BUILD={variables['SEQATTN_BUILD']})"
    return Outcome("build", code == 0, spent, note, tail(output, 15) if code != 0 else [])


def together(
    commands: Mapping[str, Sequence[str]], seconds: float, log: Path, variables: dict[str, str] | None = None
) -> dict[str, tuple[int | None, float, str]]:
    """Run commands at the same time; what ``execute`` says of each. Each has a log of its own beside ``log``."""

    def one(name: str) -> tuple[int | None, float, str]:
        own = log.with_name(f"{log.stem}-{name}.log")
        own.unlink(missing_ok=True)
        return execute(name, commands[name], seconds, own, variables)

    with ThreadPoolExecutor(max(1, len(commands))) as pool:
        return dict(zip(commands, pool.map(one, commands), strict=True))


def tests(settings: Settings, seconds: float, log: Path) -> Outcome:
    """The suite, dealt out to processes: compilers of kernels take far longer than the kernels, and one core each."""
    count = max(1, min(12, (os.cpu_count() or 1) - 2))
    base = [*PYTHON, "-m", "pytest", "-vv", "--device", "cuda", "--only-device", "-rfE", "--tb=short", "--maxfail=50"]
    base += shlex.split(settings.tests)
    commands = {f"{i}": [*base, f"--shard={i}/{count}"] for i in range(count)}
    begin = time.monotonic()
    found = together(commands, seconds, log, {"OMP_NUM_THREADS": "1"})
    results: Counter[str] = Counter()
    wanted, failed, notes = 0, [], []
    for name, (code, spent, output) in found.items():
        own = Counter(re.findall(r"^\S+\.py::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", output, re.M))
        results += own
        selected = re.search(r"^(\d+) tests in this shard", output, re.M)
        wanted += int(selected[1]) if selected else 0
        failed += [line[:220] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if code not in (0, 1, NO_TESTS):  # 1: pytest ended by itself, and says what failed
            begun = re.findall(r"^(\S+\.py::\S+)", output, re.M)
            notes.append(f"process {name}: {told(code, spent)}, last begun {begun[-1] if begun else 'none'}")
            notes += tail(output, 6) if not begun else []
    text = ", ".join(f"{n} {kind.lower()}" for kind, n in results.most_common())
    passed = not notes and all(code in (0, NO_TESTS) for code, _, _ in found.values()) and results["PASSED"] > 0
    note = f"{text or 'none ran'}, of {wanted} in {count} processes"
    return Outcome("tests", passed, time.monotonic() - begin, note, [*notes, *failed[:40]])


def sanitize(settings: Settings, seconds: float, log: Path) -> Outcome:
    """Every tool on every part of benchmarks.gpu.small, all at once: most of their time is the host's."""
    from benchmarks.gpu.small import PARTS as SMALL_PARTS

    tool = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    if tool is None:
        return Outcome("sanitize", False, 0.0, "no compute-sanitizer found")
    begin, lines, notes, passed = time.monotonic(), [], [], True
    checks = {"memcheck": ["--leak-check", "no"], "racecheck": []}
    commands = {
        f"{check}-{part}": [
            *(tool, "--tool", check, *options, "--error-exitcode", "9", "--print-limit", "20"),
            *(*PYTHON, "-m", "benchmarks.gpu.small", "--few", "--only", part),
        ]
        for check, options in checks.items()
        for part in SMALL_PARTS
    }
    for name, (code, spent, output) in together(commands, seconds, log).items():
        passed = passed and code == 0
        done = len(re.findall(r"^checked ", output, re.M))
        notes.append(f"{name} {told(code, spent)} ({done} checks)")
        if code != 0:
            lines += [f"{name}: {line}" for line in tail(output, 12)]
    return Outcome("sanitize", passed, time.monotonic() - begin, "; ".join(notes), lines)


def bench(settings: Settings, seconds: float, log: Path) -> Outcome:
    begin, code, restarts, fruitless, output = time.monotonic(), None, 0, 0, ""
    base = [*PYTHON, "-m", "benchmarks.gpu.bench", "--out", str(settings.folder)]
    base += ["--only", settings.cases] if settings.cases else []
    base += ["--quick"] if settings.quick else []
    base += ["--first", str(settings.first)] if settings.first is not None else []
    suites = settings.suites.split(",") if settings.suites else []
    while restarts <= RESTARTS:
        left = seconds - (time.monotonic() - begin)
        if left < SLOWEST_USEFUL:
            break
        # Getting ready is not counted by it, and the last case begun needs time to end.
        budget = max(1.0, left - min(20.0, 0.25 * left))
        command = [*base, "--budget", f"{budget:.0f}", *(["--resume"] if restarts else []), *suites]
        code, _, found = execute("bench", command, left, log)
        output += found
        # A process that dies in a case leaves a note of it; one that comes to no case at all will not do so next time.
        fruitless = 0 if "floor" in found or (settings.folder / ".running").exists() else fruitless + 1
        if fruitless > 1:
            break
        if code in (0, 2, None):
            break
        restarts += 1
    note = told(code, time.monotonic() - begin)
    note += f"; begun again {restarts} times" if restarts else ""
    lines = [line[:400] for line in output.splitlines() if "/" in line or line.startswith(("ceilings", "not measured"))]
    return Outcome("bench", code == 0, time.monotonic() - begin, note, lines if code == 0 else tail(output, 20))


def report(settings: Settings, seconds: float, log: Path) -> Outcome:
    command = [*PYTHON, "-m", "benchmarks.gpu.report", str(settings.folder)]
    code, spent, output = execute("report", command, seconds, log)
    return Outcome("report", code == 0, spent, told(code, spent), tail(output, 10))


# In the order they run; the weights are about their seconds. What a part leaves over goes to those after it.
PARTS: dict[str, Part] = {
    "env": Part(environment, 10, 30.0, 15.0),
    # Without the library there is nothing to measure: it has the time it needs, 50 to 80 s on 16 cores.
    "build": Part(build, 70, 150.0, 150.0),
    "tests": Part(tests, 120, 150.0),
    "sanitize": Part(sanitize, 60, 90.0),
    "bench": Part(bench, 270, 420.0),
    "report": Part(report, 15, 40.0, 15.0),
}


def run_parts(names: Sequence[str], settings: Settings) -> list[Outcome]:
    """Run the parts in their order, each with its share of the time that is left."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + settings.budget
    outcomes = []
    chosen = [name for name in PARTS if name in names]
    for index, name in enumerate(chosen):
        left = end - time.monotonic()
        share = left * PARTS[name].weight / sum(PARTS[n].weight for n in chosen[index:])
        seconds = min(PARTS[name].most, left, max(share, PARTS[name].least))
        log = settings.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        print(f"{name}: up to {seconds:.0f} s", flush=True)
        if seconds < SLOWEST_USEFUL:
            outcomes.append(Outcome(name, False, 0.0, "not begun: no time left"))
            continue
        try:
            outcome = PARTS[name].run(settings, seconds, log)
        except Exception as error:  # a part that can't even be started must not keep the others from running
            outcome = Outcome(name, False, 0.0, f"{type(error).__name__}: {error}")
        print(f"{name}: {outcome.note} ({outcome.seconds:.0f} s)", flush=True)
        outcomes.append(outcome)
        if name == "build" and not outcome.passed:
            break  # figures of what was there before would pass for this version's
    return outcomes


def summary(outcomes: Sequence[Outcome], settings: Settings) -> str:
    lines = ["", f"results and logs: {settings.folder}"]
    for outcome in outcomes:
        lines += [f"--- {outcome.name}: {'passed' if outcome.passed else 'FAILED'}, {outcome.note}", *outcome.lines]
    verdict = ", ".join(f"{outcome.name} {'ok' if outcome.passed else 'FAILED'}" for outcome in outcomes)
    return "\n".join([*lines, "", f"summary: {verdict}; {sum(outcome.seconds for outcome in outcomes):.0f} s"])


def _architecture() -> str:
    """As setup.py names it: GPUs whose clusters we use have code of their own."""
    program = "import torch; print(torch.cuda.get_device_capability(0)[0])"
    major = subprocess.run([*PYTHON, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    return {"9": "90a", "10": "100a"}.get(major, "80")


def _beside_nvcc(tool: str) -> str | None:
    nvcc = shutil.which("nvcc")
    path = Path(nvcc).resolve().parent / tool if nvcc else None
    return str(path) if path is not None and path.exists() else None
