"""What the operators' autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def apply_function(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, without its cost where no transform is active.

    For a Function with ``setup_context``, ``Function.apply`` binds the arguments to forward's signature on each call:
    some 15 microseconds, more than the rest. That matters only to default arguments, which ours don't have.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def forward_mode() -> bool:
    """Whether derivatives may be carried forward with the values (``torch.autograd.forward_ad``, ``torch.func.jvp``).

    A kernel would drop them without a word; the reference is made of operators that have them.
    """
    return forward_ad._current_level >= 0


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether gradients of some of them will be asked for."""
    if torch.is_grad_enabled():
        for t in tensors:  # a loop, at half the price of `any`
            if t is not None and t.requires_grad:
                return True
    return False


def differentiate_again(
    compute: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through ``compute(*inputs)``, the operator's reference; ``gradients``
    of its outputs may be None."""
    # Views, so that a tensor which is given twice gets the gradient of each place apart.
    views = [None if t is None else t.view_as(t) for t in inputs]
    outputs = compute(*views)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if g is not None]
    wanted = [i for i, need in enumerate(needs) if need]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [t for t in (views[i] for i in wanted) if t is not None],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    by_input = dict(zip(wanted, found, strict=True))
    return [by_input.get(i) for i in range(len(views))]
