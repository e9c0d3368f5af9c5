"""Loads the compiled part, or says why it isn't there and how to get it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch  # libtorch must be loaded before the extension that links to it

_REBUILD = "build it with `pip install --no-build-isolation -e .` in a checkout (needs a C++ compiler and ninja)"

extension: ModuleType | None
_why_not: str | None
try:
    extension = importlib.import_module("seqattn_kernels._C")
    _why_not = None
except ModuleNotFoundError:
    extension = None
    _why_not = f"the native kernels were not compiled; {_REBUILD}"
except ImportError as error:
    extension = None
    _why_not = f"the native kernels can't be loaded ({error}); {_REBUILD}"


def _connect_cells() -> None:
    """Let `cell_fwd` and `cell_bwd` of the extension take tensors past torch's dispatcher, where this torch can."""
    if extension is None:
        return
    try:
        modes = (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._are_functorch_transforms_active,
            torch._C._is_any_autocast_enabled,
            torch._C._get_tracing_state,
            torch.autograd._profiler_enabled,
        )
        wrap = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs  # the one for a single tensor keeps a reference
        exchange = torch.Tensor.__dlpack_c_exchange_api__
    except AttributeError:  # an older torch: operators it is
        return
    extension.cell_connect((torch.Tensor, torch.nn.Parameter), modes, torch.Tensor.is_neg, wrap, exchange)


_connect_cells()


def _load_cuda() -> str | None:
    """Load the CUDA kernels where torch can use them; else why not."""
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if extension is None:
        return _why_not
    library = Path(__file__).with_name("libseqattn_cuda.so")
    if not library.exists():
        return f"the CUDA kernels were not compiled; with nvcc there, {_REBUILD}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the CUDA kernels can't be loaded ({error}); {_REBUILD}"
    return None


_cuda_why_not = _load_cuda()


def why_not() -> str | None:
    """None when the native CPU operators are registered, else why not and what to do."""
    return _why_not


def cuda_why_not() -> str | None:
    """None when the CUDA operators are registered, else why not and what to do."""
    return _cuda_why_not


def instruction_set() -> str | None:
    """The instruction set whose CPU kernels run here: ``avx512``, ``avx2`` or ``baseline``; None when not built."""
    return extension.active_instruction_set() if extension is not None else None
