"""What our CUDA sources ask of the runtime, read from them: a capture in progress and a side stream allow no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.emulator_build import CSRC

SOURCES = sorted(p for p in (CSRC / "cuda").rglob("*") if p.suffix in (".cu", ".cuh", ".cpp", ".h"))
# None waits for the device, allocates, or copies from memory of the host, and a launch has its stream from torch.
HARMLESS = {
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaLaunchKernelEx",
    "cudaMemsetAsync",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
    "cudaOccupancyMaxActiveClusters",
}


def code_of(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC / "cuda")))
def test_the_runtime_is_asked_for_nothing_a_capture_forbids(path: Path) -> None:
    code = code_of(path)
    assert set(re.findall(r"\bcuda[A-Z]\w*(?=\()", code)) <= HARMLESS
    assert "<<<" not in code, "a launch that is not launch() of platform.cuh, which checks it"
    assert "cudaStream" not in code.replace("cudaStream_t", ""), "another stream than torch's current one"


def test_every_launch_and_clearing_goes_to_the_stream_given() -> None:
    assert "config.stream = stream;" in code_of(CSRC / "cuda" / "platform" / "launch.cuh")
    calls = [
        call
        for path in SOURCES
        for call in re.findall(r"(?<![\w:])(?:launch|cudaMemsetAsync)\((?!void)[^;]*;", code_of(path))
    ]
    assert len(calls) > 15
    assert not [call for call in calls if not re.search(r"\bstream\b", call)]
