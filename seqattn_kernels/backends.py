"""Who computes: one ordered table of backends for each operator, and why one can't serve.

A call takes the first backend of the table whose ``why_not`` is None. Naming one (``backend="..."``) takes that one or
raises its reason: nothing falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seqattn_kernels import native

_NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Request:
    """What a recurrent call asks for, as far as the choice of a backend depends on it."""

    cell: str
    device: torch.device
    dtype: torch.dtype
    rows: int  # values of T * B, or rows of a packed sequence
    batch: int
    hidden: int
    training: bool  # gradients will be asked for
    extras: str | None = None  # an option torch's own function doesn't have


@dataclass(slots=True)  # made on every decoder step: frozen would cost another microsecond
class AttentionRequest:
    """What an attention call asks for, as far as the choice of a backend depends on it."""

    device: torch.device
    dtype: torch.dtype
    mask_gradient: bool = False  # the gradient of a mask that is added to the scores will be asked for


@dataclass(frozen=True, slots=True)
class DecoderRequest:
    """What a decoder asks for, as far as the choice of a backend depends on it."""

    device: torch.device
    dtype: torch.dtype
    unserved: str | None  # an option that one operator for all steps doesn't have
    unserved_by_reference: str | None


@dataclass(frozen=True, slots=True)
class Backend:
    name: str
    why_not: Callable[[Any], str | None]


def _cpu_why_not(request: Request) -> str | None:
    if native.why_not() is not None:
        return native.why_not()
    if request.device.type != "cpu":
        return f"the CPU kernels take CPU tensors, got {request.device}"
    if request.dtype not in _NATIVE_DTYPES:
        return f"the CPU kernels take float32, float64, bfloat16 and float16, got {request.dtype}"
    return None


def _cpu_attention_why_not(request: AttentionRequest) -> str | None:
    if native.why_not() is not None:
        return native.why_not()
    if request.device.type != "cpu":
        return f"the CPU kernels take CPU tensors, got {request.device}"
    if request.dtype not in _NATIVE_DTYPES:
        return f"the CPU kernels take float32, float64, bfloat16 and float16, got {request.dtype}"
    if request.mask_gradient:
        return "the CPU kernels have no gradient for a mask"
    return None


def _torch_why_not(request: Request) -> str | None:
    return None if request.extras is None else f"torch's own function has no {request.extras}"


def decoder_why_not(request: DecoderRequest) -> str | None:
    """Why one native operator can't run all steps of a decoder, or None."""
    if native.why_not() is not None:
        return native.why_not()
    if request.device.type != "cpu":
        return f"the CPU kernels take CPU tensors, got {request.device}"
    if request.dtype not in _NATIVE_DTYPES:
        return f"the CPU kernels take float32, float64, bfloat16 and float16, got {request.dtype}"
    return None if request.unserved is None else f"the operator of all steps doesn't have {request.unserved}"


def _reference_decoder_why_not(request: DecoderRequest) -> str | None:
    reason = request.unserved_by_reference
    return None if reason is None else f"the reference doesn't have {reason}"


def _never(request: Any) -> None:
    return None


RECURRENCE: Sequence[Backend] = (
    Backend("cpu", _cpu_why_not),
    Backend("torch", _torch_why_not),
    Backend("reference", _never),
)


ATTENTION: Sequence[Backend] = (
    Backend("cpu", _cpu_attention_why_not),
    Backend("reference", _never),
)

# All steps in one operator; a step at a time from the package's cells and attention; plain torch.
DECODER: Sequence[Backend] = (
    Backend("cpu", decoder_why_not),
    Backend("composed", _never),
    Backend("reference", _reference_decoder_why_not),
)


def choose(table: Sequence[Backend], request: Any, wish: str | None = None) -> str:
    """The name of the backend to use.

    Raises:
        ValueError: `wish` names no backend of the table.
        RuntimeError: the backend wished for can't serve; the message says why.
    """
    if wish is None:
        for backend in table:
            if backend.why_not(request) is None:
                return backend.name
        raise RuntimeError("no backend can serve: " + "; ".join(str(b.why_not(request)) for b in table))
    for backend in table:
        if backend.name == wish:
            reason = backend.why_not(request)
            if reason is not None:
                raise RuntimeError(f"backend {wish!r} can't serve: {reason}")
            return wish
    raise ValueError(f"backend: expected one of {[b.name for b in table]} or None, got {wish!r}")
