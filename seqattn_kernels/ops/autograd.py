"""What the operators' autograd Functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function


def apply_function(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, without its cost where no transform is active.

    For a Function with ``setup_context``, ``Function.apply`` binds the arguments to forward's signature on each call:
    some 15 microseconds, more than the rest. That matters only to default arguments, which ours don't have.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]
