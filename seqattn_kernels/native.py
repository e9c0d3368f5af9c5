"""Loads the compiled part, or says why it isn't there and how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (libtorch must be loaded before the extension that links to it)

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


def why_not() -> str | None:
    """None when the native CPU operators are registered, else why not and what to do."""
    return _why_not


def instruction_set() -> str | None:
    """The instruction set whose CPU kernels run here: ``avx512``, ``avx2`` or ``baseline``; None when not built."""
    return extension.active_instruction_set() if extension is not None else None
