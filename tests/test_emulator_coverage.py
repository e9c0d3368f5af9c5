"""Every instance of every CUDA kernel ran on the emulator: who adds one without a test of it learns it here."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqattn_kernels import native
from tests import emulator_build, launcher_build
from tests.emulated import ever_launched, kernels, take_launched

_missing = native.why_not() or (None if emulator_build.compiler() else "no C++ compiler")
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))


def test_every_kernel_ran(request: pytest.FixtureRequest) -> None:
    """After the tests in test_emulated_*.py, which compare with float64; where these are not selected it can't say."""
    options = request.config.option
    files = {path.name for path in Path(__file__).parent.glob("test_emulated_*.py")}
    whole = files <= {item.path.name for item in request.session.items}
    if options.keyword or options.markexpr or any("::" in argument for argument in request.config.args) or not whole:
        pytest.skip("needs all tests of test_emulated_*.py before it")
    launcher = launcher_build.build()  # some kernels are tested through it
    never = sorted(set(kernels().values()) - ever_launched() - take_launched(launcher))
    assert not never, f"{len(never)} kernels ran in no test: {', '.join(never[:20])}"
