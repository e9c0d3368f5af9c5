"""accelerate() and restore()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from seqattn_kernels.accelerate.classes import accelerated_class, restored_class
from seqattn_kernels.accelerate.registry import decide
from seqattn_kernels.nn.freezing import freeze, thaw, weights_dtype

ModelT = TypeVar("ModelT", bound=nn.Module)

# In the __dict__ of what accelerate() made: the class that the module had, or the module that stood in its place. There
# it survives deepcopy and pickle, and is no part of state dicts.
MARK = "_accelerated_from"


def accelerate(
    model: ModelT, *, frozen: bool = False, weights: str | torch.dtype | None = None, verbose: bool = False
) -> ModelT:
    """Make the recurrent modules of ``model`` faster, in place, without changing what they compute.

    Modules that torch.nn built (RNN, GRU, LSTM and their cells), and those of classes registered with
    ``register_replacement``, are replaced at any depth. Parameters are shared, not copied: an optimizer made before
    goes on, a module shared between parents stays shared, hooks and parametrizations stay. What can't be replaced is
    left as it was; ``report(model)`` says why. Calling it again changes nothing.

    Wrap the model (FSDP, ``torch.compile``) after this, and ``restore`` it before it goes to tools that know the
    classes of torch.nn only: TorchScript, ONNX export, quantization, pickles for machines without this package.

    Args:
        model: any module; a recurrent one itself is fine.
        frozen: promise that weights stay as they are until ``unfreeze(model)`` or ``restore(model)``, so that they are
            packed once; for inference only, see ``frozen``.
        weights: with ``frozen``, "bfloat16" or torch.bfloat16 rounds weights to it, which changes results in their
            third digit; see ``frozen``.
        verbose: print the report.

    Returns:
        ``model`` itself, unless a function registered for its very class replaces it.

    Raises:
        TypeError: ``model`` is not a module, or a registered function returned none.
        ValueError: ``weights`` is none of these, was given without ``frozen``, or meets modules that are not float32.
    """
    if weights_dtype(weights) is not None and not frozen:
        raise ValueError(f"weights: expected None unless frozen=True, got {weights!r}")
    model = _accelerate(_checked(model), {})
    if frozen:
        freeze(model, weights=weights)
    if verbose:
        from rich.console import Console

        from seqattn_kernels.accelerate.report import report

        Console().print(report(model))
    return model


def restore(model: ModelT) -> ModelT:
    """Undo ``accelerate(model)``: every module gets back the class it had, or its place. Weights stay as they are now.

    Modules that were the package's own from the start stay. Frozen weights are released.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: something else changed the class of a module meanwhile, as FSDP2 does.
    """
    return _restore(_checked(model), {})


def _checked(model: ModelT) -> ModelT:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _accelerate(module: ModelT, done: dict[int, Any]) -> ModelT:
    """What stands for ``module`` from now on; ``done`` has what was decided for modules met before, by their ids."""
    key = id(module)
    if key not in done:
        done[key] = _replaced(module)
        if done[key] is module:
            _visit_children(module, _accelerate, done)
    return done[key]


def _replaced(module: nn.Module) -> nn.Module:
    decision = decide(module)
    if decision is None or decision.replacement is None:
        return module
    entry = decision.replacement
    if entry.by_class:
        original = type(module)
        module.__class__ = accelerated_class(original, entry)
        module.__dict__[MARK] = original
        return module
    new = entry.by(module)
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"replacement of {type(module).__name__}: expected a torch.nn.Module, got {type(new).__name__} "
            f"from {entry.by.__name__}"
        )
    new.__dict__[MARK] = module
    return new.train(module.training)


def _restore(module: ModelT, done: dict[int, Any]) -> ModelT:
    key = id(module)
    if key not in done:
        thaw(module)
        original = module.__dict__.get(MARK)
        if isinstance(original, nn.Module):
            done[key] = original.train(module.training)
            del module.__dict__[MARK]
            return done[key]
        done[key] = module
        if original is not None:
            module.__class__ = restored_class(type(module), original)
            del module.__dict__[MARK]
        _visit_children(module, _restore, done)
    return done[key]


def _visit_children(module: nn.Module, visit: Callable[..., nn.Module], done: dict[int, Any]) -> None:
    if isinstance(module.__dict__.get(MARK), nn.Module):
        return  # Built by a registered function: what it holds is that function's business.
    for name, child in list(module._modules.items()):
        if child is not None:
            new = visit(child, done)
            if new is not child:
                module._modules[name] = new
