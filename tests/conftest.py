from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch.utils import deterministic

from seqattn_kernels import native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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


@pytest.fixture(params=[1, 2], ids=["1T", "2T"])
def threads(request: pytest.FixtureRequest, fixed_threads: None) -> int:
    """Runs the test with one thread and with two."""
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
