"""Changing the class of a module, and changing it back.

The class to give depends on the one the module has:

- the registered class itself: its replacement;
- a subclass C that leaves ``forward`` alone: a class with the bases (C, replacement), so that whatever C adds or
  overrides stays in force above the replacement, which stands between C and the registered class;
- the class that ``torch.nn.utils.parametrize`` made for the instance: the same class on another base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from seqattn_kernels.accelerate.registry import Replacement, find


def is_parametrized_class(cls: object) -> bool:
    """Whether ``torch.nn.utils.parametrize`` made the class, for one module (and its copies)."""
    return isinstance(cls, type) and cls.__module__ == parametrize.__name__ and cls.__name__.startswith("Parametrized")


def accelerated_class(cls: type, entry: Replacement) -> type[nn.Module]:
    """The class that a module of class ``cls`` gets; ``entry`` is the line of the table found for it."""
    assert isinstance(entry.by, type)
    if cls is entry.original:
        return entry.by
    if is_parametrized_class(cls):
        return _on_base(cls, accelerated_class(cls.__bases__[0], entry))
    return _mixed(cls, entry.by)


def restored_class(cls: type, original: type) -> type:
    """The class that a module now of class ``cls`` has to get back, having had ``original``.

    It is ``original``, unless parametrizations were registered or removed in between: those stay.

    Raises:
        RuntimeError: something else changed the class meanwhile.
    """
    entry = find(_plain(original))
    if entry is None or _plain(cls) is not accelerated_class(_plain(original), entry):
        raise RuntimeError(f"{cls.__name__}: the class was changed after accelerate(): restore it as it was first")
    if not is_parametrized_class(cls):
        return _plain(original)
    if is_parametrized_class(original) and vars(cls).keys() == vars(original).keys():
        return original
    return _on_base(cls, _plain(original))


def _plain(cls: type) -> type:
    return cls.__bases__[0] if is_parametrized_class(cls) else cls


def _on_base(cls: type, base: type) -> type:
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), namespace)


@cache
def _mixed(cls: type, replacement: type) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # This class can't be found by name, so a pickle names the two it is made of.
        state = object.__reduce_ex__(self, 2)[2:]
        return _new_mixed, (cls, replacement), *state

    namespace: dict[str, str | Callable[..., Any] | None] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
    }
    return type(cls.__name__, (cls, replacement), namespace)


def _new_mixed(cls: type, replacement: type) -> nn.Module:
    mixed = _mixed(cls, replacement)
    return mixed.__new__(mixed)
