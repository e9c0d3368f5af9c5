"""Who computes: one ordered table of backends for each operator, and why one can't serve.

A call takes the first backend of the table whose ``why_not`` is None and that is worth it. Naming one
(``backend="..."``) takes that one or raises its reason: nothing falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seqattn_kernels import native, ops, thresholds
from seqattn_kernels.ops.autograd import forward_mode

_NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    directions: int = 1
    projected: bool = False
    packed: bool = False
    eval_backward: bool = False  # gradients of a module that is not in training mode
    sequence: bool = True  # whole sequences, not a step of a cell

    @property
    def steps(self) -> int:
        return self.rows // self.batch if self.batch else 0


@dataclass(slots=True)  # made on every decoder step: frozen would cost another microsecond
class AttentionRequest:
    """What an attention call asks for, as far as the choice of a backend depends on it."""

    device: torch.device
    dtype: torch.dtype


def _always(request: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class DecoderRequest:
    """What a decoder asks for, as far as the choice of a backend depends on it."""

    device: torch.device
    dtype: torch.dtype
    unserved: str | None  # an option that one operator for all steps doesn't have
    unserved_by_reference: str | None
    cuda_unserved: str | None = None  # what else the CUDA kernel doesn't have


@dataclass(frozen=True, slots=True)
class Backend:
    name: str
    refuses: Callable[[Any], str | None]  # the reason, if it does
    worth_it: Callable[[Any], bool] = _always  # consulted where no backend is asked for by name
    tangents: bool = False  # made of operators that have forward-mode derivatives, or of what chooses for itself

    def why_not(self, request: Any) -> str | None:
        """Why it can't serve the request, or None."""
        reason = self.refuses(request)
        if reason is None and not self.tangents and forward_mode():
            return f"the backend {self.name!r} has no forward-mode derivatives"
        return reason


def _cpu_why_not(request: Request | AttentionRequest | DecoderRequest) -> str | None:
    if native.why_not() is not None:
        return native.why_not()
    if request.device.type != "cpu":
        return f"the CPU kernels take CPU tensors, got {request.device}"
    if request.dtype not in _NATIVE_DTYPES:
        return f"the CPU kernels take float32, float64, bfloat16 and float16, got {request.dtype}"
    return None


def _cuda_why_not(request: Request) -> str | None:
    if native.cuda_why_not() is not None:
        return native.cuda_why_not()
    if request.device.type != "cuda":
        return f"the CUDA kernels take CUDA tensors, got {request.device}"
    if request.dtype not in _NATIVE_DTYPES:
        return f"the CUDA kernels take float32, float64, bfloat16 and float16, got {request.dtype}"
    return _too_old("CUDA", request.device.index)


_capabilities: dict[int | None, tuple[int, int]] = {}  # by the device's index; asking torch takes a microsecond


@torch.compiler.assume_constant_result
def _too_old(kernels: str, index: int | None) -> str | None:
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    major, minor = _capabilities[index]
    return None if major >= 8 else f"the {kernels} kernels need compute capability 8.0, got {major}.{minor}"


def _cuda_worth_it(request: Request) -> bool:
    """Where torch's own function can't do it (cuDNN has no backward in eval mode), or was measured to be slower."""
    if not request.sequence:
        return False
    return request.extras is not None or request.eval_backward or thresholds.faster_than_torch(request)


def _by_name_only(request: Any) -> bool:
    return False


def _triton_attention_why_not(request: AttentionRequest) -> str | None:
    if request.device.type != "cuda":
        return f"the Triton kernels take CUDA tensors, got {request.device}"
    if ops.attention_cuda.why_not() is not None:
        return ops.attention_cuda.why_not()
    if request.dtype not in _TRITON_DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, got {request.dtype}"
    return None if torch.version.hip is not None else _too_old("Triton", request.device.index)


def _torch_why_not(request: Request) -> str | None:
    return None if request.extras is None else f"torch's own function has no {request.extras}"


def _cpu_decoder_why_not(request: DecoderRequest) -> str | None:
    if request.unserved is not None:
        return f"the operator of all steps doesn't have {request.unserved}"
    return _cpu_why_not(request)


def _cuda_decoder_why_not(request: DecoderRequest) -> str | None:
    if request.device.type != "cuda":
        return f"the decoder's kernel takes CUDA tensors, got {request.device}"
    if request.unserved is not None:
        return f"the decoder's kernel doesn't have {request.unserved}"
    return request.cuda_unserved


def _reference_decoder_why_not(request: DecoderRequest) -> str | None:
    reason = request.unserved_by_reference
    return None if reason is None else f"the reference doesn't have {reason}"


def _never(request: Any) -> None:
    return None


RECURRENCE: Sequence[Backend] = (
    Backend("cpu", _cpu_why_not),
    Backend("cuda", _cuda_why_not, _cuda_worth_it),
    Backend("cuda_stepwise", _cuda_why_not, _by_name_only),  # "cuda" without persistent kernels
    Backend("torch", _torch_why_not),
    Backend("reference", _never, tangents=True),
)


ATTENTION: Sequence[Backend] = (
    Backend("cpu", _cpu_why_not),
    Backend("triton", _triton_attention_why_not),
    Backend("reference", _never, tangents=True),
)

# All steps in one operator; a step at a time from the package's cells and attention; plain torch.
DECODER: Sequence[Backend] = (
    Backend("cpu", _cpu_decoder_why_not),
    Backend("cuda", _cuda_decoder_why_not),
    Backend("composed", _never, tangents=True),
    Backend("reference", _reference_decoder_why_not, tangents=True),
)


def choose(table: Sequence[Backend], request: Any, wish: str | None = None) -> str:
    """The name of the backend to use.

    Raises:
        ValueError: `wish` names no backend of the table.
        RuntimeError: the backend wished for can't serve; the message says why.
    """
    if wish is None:
        for backend in table:
            if backend.why_not(request) is None and backend.worth_it(request):
                return backend.name
        raise RuntimeError("no backend can serve: " + "; ".join(str(b.why_not(request)) for b in table))
    for backend in table:
        if backend.name == wish:
            reason = backend.why_not(request)
            if reason is not None:
                raise RuntimeError(f"backend {wish!r} can't serve: {reason}")
            return wish
    raise ValueError(f"backend: expected one of {[b.name for b in table]} or None, got {wish!r}")
