"""Kernels that do nothing but special functions or multiply-adds, in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.gpu.timing import seconds_of

BLOCK, PROGRAMS_PER_SM = 1024, 16


@triton.jit
def _special_kernel(out, rounds, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) + 1.5
    for _ in range(rounds):
        x = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


@triton.jit
def _fma_kernel(out, rounds, scale, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32)
    for _ in range(rounds):
        x = tl.fma(x, scale, scale)
        x = tl.fma(x, scale, scale)
        x = tl.fma(x, scale, scale)
        x = tl.fma(x, scale, scale)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def _rate(run, operations: float) -> float:
    run()
    run()
    return operations / min(seconds_of(run) for _ in range(5))


def _space() -> tuple[int, torch.Tensor]:
    programs = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count * PROGRAMS_PER_SM
    return programs, torch.empty(programs * BLOCK, device="cuda")


def special_rate(rounds: int = 4000) -> float:
    """Special functions (tanh; exp2 and a reciprocal are as fast) a second."""
    programs, out = _space()
    return _rate(lambda: _special_kernel[(programs,)](out, rounds, BLOCK=BLOCK), float(programs * BLOCK * rounds))


def fma_rate(rounds: int = 4000) -> float:
    """float32 multiply-adds a second."""
    programs, out = _space()
    return _rate(lambda: _fma_kernel[(programs,)](out, rounds, 0.5, BLOCK=BLOCK), 4.0 * programs * BLOCK * rounds)
