"""Every operator on the device under test against float64 on the CPU, the one oracle that shares nothing with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqattn_kernels import functional, reference
from tests.cases import DTYPES, KINDS
from tests.compare import assert_close_to_float64, to_float64

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def there(values, device):
    return [v.detach().to(device).requires_grad_(v.requires_grad) for v in values]


def on_cpu_in_float64(values):
    return to_float64([v.detach().cpu().requires_grad_(v.requires_grad) for v in values])


def gradients(results, inputs):
    """Of a fixed direction that is drawn on the CPU and rounded, so that devices and dtypes share it."""
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(r.shape, generator=generator, device="cpu").bfloat16().to(r) for r in results]
    return torch.autograd.grad(results, inputs, directions)


def flat(results) -> list[Tensor]:
    return [t for r in results for t in (r if isinstance(r, tuple) else (r,))]


def agrees(run, oracle, values, device):
    mine = there(values, device)
    exact = on_cpu_in_float64(mine)
    got, expected = flat(run(*mine)), flat(oracle(*exact))
    assert all(r.device.type == device.type for r in got)
    assert_close_to_float64(got, expected)
    assert_close_to_float64(gradients(got, mine), gradients(expected, exact))


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("shape", [(1, 33, 20, 64), (7, 40, 12, 96), (16, 20, 128, 128)], ids=str)
def test_recurrences(kind, dtype, ragged, shape, device):
    B, T, I, H = shape
    with torch.device("cpu"):
        weights = [w.detach().to(dtype) for w in kind.stock(I, H)._flat_weights]
        values = [torch.randn(T, B, I, dtype=dtype), *weights]
        lengths = torch.randint(0, T + 1, (B,)) if ragged else None

    def run(x, *weights):
        here = None if lengths is None else lengths.to(x.device)
        return kind.run(x, None, weights, lengths=here)

    def oracle(x, *weights):
        return kind.run(x, None, weights, lengths=lengths, backend="reference")

    agrees(run, oracle, [v.requires_grad_() for v in values], device)


@kinds
def test_steps(kind, device):
    with torch.device("cpu"):
        values = [torch.randn(5, 12), *(w.detach() for w in kind.stock_cell(12, 40).parameters())]

    def run(x, *weights):
        return kind.step(x, None, *weights)

    agrees(run, run, [v.requires_grad_() for v in values], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 65, 64), (2, 33, 70, 48), (2, 64, 128, 128)], ids=str)
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_attention(score, sizes, dtype, device):
    B, T, S, A = sizes
    with torch.device("cpu"):
        shapes = [(B, T, A), (B, S, A), (B, S, 24), *([(A,)] if score == "additive" else [])]
        values = [(torch.randn(shape) / (A**0.5 if len(shape) == 1 else 1)).to(dtype) for shape in shapes]
        lengths = torch.randint(0, S + 1, (B,))

    def run(query, keys, values, v=None):
        if v is None:
            return functional.dot_attention(query, keys, values, scale=True, lengths=lengths.to(query.device))
        return functional.additive_attention(query, keys, v, values, lengths=lengths.to(query.device))

    def oracle(query, keys, values, v=None):
        if v is not None:
            return reference.attention.additive_attention(query, keys, values, v, lengths, None)
        keep = reference.attention.attended(keys, lengths, None)
        weights = reference.attention.masked_softmax(query @ keys.transpose(1, 2) / A**0.5, keep, None)
        return weights @ values, weights

    agrees(run, oracle, [v.requires_grad_() for v in values], device)


@kinds
def test_tf32_where_torch_is_told_to_use_it(kind, device):
    """float32 with factors of 11 bits: as many digits as float16."""
    if device.type != "cuda":
        pytest.skip("tf32 is a GPU's")
    x, weights = torch.randn(30, 8, 64), [w.detach() for w in kind.stock(64, 128)._flat_weights]
    expected = kind.run(x.double(), None, [w.double() for w in weights], backend="reference")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert_close_to_float64(kind.run(x, None, weights), expected, torch.float16)


def test_what_no_test_device_may_be_is_refused():
    import subprocess
    import sys

    command = [sys.executable, "-m", "pytest", "--device", "nowhere", __file__]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device: expected one that torch can use, got 'nowhere'" in found.stderr + found.stdout
