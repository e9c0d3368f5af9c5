"""The emulator's tests once more, compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import emulator_build

# Each a run of its own. Faults planted for the emulator to find would be the sanitizer's first, and a sanitizer makes
# the thousands of threads of a large team take minutes: kernels of up to 128 units in clusters, and of 256 in grids.
TESTS = {
    "emulator": ("tests/test_emulator.py", "not planted and not stray"),
    "stepwise": ("tests/test_emulated_recurrence.py", "stepwise or projection or rows or halves or values"),
    "places": ("tests/test_emulated_recurrence.py", "test_places and not stepwise and not cooperative"),
    "cluster": ("tests/test_emulated_recurrence.py", "every_persistent_kernel and 128x8"),
    "cooperative": ("tests/test_emulated_recurrence.py", "every_persistent_kernel and cooperative-256x8"),
    "decoder": ("tests/test_emulated_decoder.py", "places"),
}


def library(name: str) -> str:
    command = [str(emulator_build.compiler()), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(emulator_build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("part", TESTS)
def test_sanitizers_are_silent(part: str) -> None:
    file, chosen = TESTS[part]
    libraries = [library(name) for name in ("libasan.so", "libubsan.so")]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("the compiler has no sanitizers")
    environment = os.environ | {
        "SEQATTN_EMULATOR": str(emulator_build.build(sanitize=True)),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python's own memory is no leak
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    command = [sys.executable, "-m", "pytest", "-x", file, "-k", chosen]
    done = subprocess.run(command, cwd=emulator_build.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
