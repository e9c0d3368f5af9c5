"""Fixtures of every test. `--device cuda`, or SEQATTN_TEST_DEVICE, has the tests that can run on a GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import deterministic

from seqattn_kernels import native, thresholds

CPU = torch.device("cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    wanted = os.environ.get("SEQATTN_TEST_DEVICE", "cpu")
    parser.addoption("--device", default=wanted, help="where tests of the `device` fixture run, such as cuda")
    parser.addoption(
        "--only-device", action="store_true", help="only tests that run on the device, not those of the CPU"
    )
    parser.addoption("--shard", metavar="K/N", help="the K-th of N parts of the tests, which other processes run")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: about the CPU kernels: stays there whatever --device says")
    wanted = config.getoption("--device")
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(f"--device: expected one that torch can use, got {wanted!r} ({reason})") from None


def runs_on_device(item: pytest.Item) -> bool:
    """Whether a test is one of the ``device`` fixture, or of kernels that exist on a GPU alone."""
    if "device" in getattr(item, "fixturenames", ()):
        return item.get_closest_marker("cpu") is None
    return any(word in item.path.name for word in ("cuda", "triton"))


def _keep_shard(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole functions, since the cases of one compile the same kernels."""
    part, _, count = config.getoption("--shard").partition("/")
    if not (part.isdigit() and count.isdigit() and int(part) < int(count)):
        raise pytest.UsageError(f"--shard: expected K/N with K from 0 to N - 1, got {config.getoption('--shard')!r}")
    functions = list(dict.fromkeys(item.nodeid.partition("[")[0] for item in items))
    own = set(functions[int(part) :: int(count)])
    others = [item for item in items if item.nodeid.partition("[")[0] not in own]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item.nodeid.partition("[")[0] in own]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    return f"{len(items)} tests in this shard" if config.getoption("--shard") else None


_EMULATOR = ("tests/test_cuda_launcher.py", "tests/test_emulat")
_LONG_ALONE = "tests/test_triton_kernels.py"


def _runs_with(nodeid: str) -> str:
    """Tests of one name here run one after the other in one process: those of a file, as they share what it set up, and
    all of the emulator, which counts the kernels it ran in its process (test_emulator_coverage.py)."""
    if nodeid.startswith(_EMULATOR):
        return "emulator"
    return nodeid if nodeid.startswith(_LONG_ALONE) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n`` processes."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _runs_with(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes: what takes longest begins
        items.sort(key=lambda item: not item.nodeid.startswith((*_EMULATOR, _LONG_ALONE)))
    if config.getoption("--only-device"):
        others = [item for item in items if not runs_on_device(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if runs_on_device(item)]
    if config.getoption("--shard"):
        _keep_shard(config, items)
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fixed_threads() -> Iterator[None]:
    """One thread, unless a test asks for the ``threads`` fixture."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def device_of(request: pytest.FixtureRequest) -> torch.device:
    """Where this test runs."""
    stays = request.node.get_closest_marker("cpu") or "device" not in request.fixturenames
    return CPU if stays else torch.device(request.config.getoption("--device"))


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where tensors and modules that don't say otherwise are made in this test; float32 products are exact there.

    On a GPU our kernels serve whatever was measured to be faster: torch's own need no tests of ours.
    """
    chosen = device_of(request)
    if chosen.type == "cpu":
        yield chosen
        return
    monkeypatch.setattr(thresholds, "faster_than_torch", lambda request: True)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    torch.set_default_device(chosen)
    try:
        yield chosen
        # A kernel that failed is reported by the test that launched it, and not by a later one.
        torch.accelerator.synchronize()
    finally:
        torch.set_default_device(None)
        matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(params=[1, 2], ids=["1T", "2T"])
def threads(request: pytest.FixtureRequest, fixed_threads: None) -> int:
    """Runs the test with one thread and with two."""
    if request.param > 1 and device_of(request).type != "cpu":
        pytest.skip("the number of threads is the CPU kernels' concern")
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory torch hands out uninitialised, in Python and to kernels alike, holds NaN (integers their maximum).

    torch does so in deterministic mode; operators it knows no deterministic form of only warn.
    """
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    if native.extension is not None:  # its own results don't go through torch's operators
        native.extension.poison_allocations(True)
    yield
    if native.extension is not None:
        native.extension.poison_allocations(False)
    torch.set_deterministic_debug_mode(mode)
    deterministic.fill_uninitialized_memory = fill
