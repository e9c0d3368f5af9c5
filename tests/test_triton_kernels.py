"""The Triton kernels without a GPU: the tests of triton_interpreter*.py, in a process where Triton interprets.

Triton decides between compiling and interpreting when it is imported, and another test may have done so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqattn_kernels.ops import attention_cuda

pytest.importorskip("triton")
TESTS = Path(__file__).parent


def interpret(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *map(str, sorted(TESTS.glob("triton_interpreter*.py"))), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("part", ["0/3", "1/3", "2/3"])
def test_under_the_interpreter(request, part):
    done = interpret("--shard", part, *(["--slow"] if request.config.getoption("--slow") else []))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout


def test_schemas_are_those_of_the_extension():
    text = (TESTS.parent / "csrc" / "ops.cpp").read_text()
    for name, schema in attention_cuda.SCHEMAS.items():
        found = re.search(rf'm\.def\(\s*((?:"[^"]*"\s*)*"{name}\([^;]*)\);', text)
        if found is None:
            assert not re.search(rf'"{name}\(', text)
            continue
        declared = "".join(re.findall(r'"([^"]*)"', found[1]))
        assert declared == name + schema


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiles_without_a_gpu(target):
    from seqattn_kernels.kernels import compile, disassembly

    if compile.scores_fwd_kernel.__class__.__name__ != "JITFunction":
        pytest.skip("Triton interprets in this process")
    gpu = compile.TARGETS[target]
    (forward,) = (c for c in compile.configurations(False) if c.name.startswith("scores_fwd 16") and c.dtype == "fp32")
    found = disassembly.listing(compile.compiled(forward, gpu), gpu)
    assert found.again == 0
    # Merged reciprocals: one special function for three columns, or four.
    assert found.loop["MUFU"] * 32 * forward.warps / forward.terms == 5 / 16
    assert "scores_fwd" in compile.described(forward, found, gpu)
