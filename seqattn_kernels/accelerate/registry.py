"""What replaces what: one table, which users extend.

Two ways to replace a module:

- by a class, when instances of the registered class serve it as they are: the module's class is changed and nothing
  else, so hooks, parameters, optimizers and every reference to the module stay good;

      register_replacement(MyLSTM, FastMyLSTM)

- by a function that builds another module from it, sharing its parameters; the new one takes its place in the parents:

      @register_replacement(MyAttentionLSTM)
      def fast_attention_lstm(module):
          return FastAttentionLSTM(module.cell, module.attention)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

WhyNot = Callable[[Any], "str | None"]
Build = Callable[[Any], nn.Module]


def _no_objection(module: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Replacement:
    """One line of the table: the class replaced, what by, and what may speak against it for a given module."""

    original: type[nn.Module]
    by: type[nn.Module] | Build
    why_not: WhyNot = _no_objection

    @property
    def by_class(self) -> bool:
        return isinstance(self.by, type)


@dataclass(frozen=True)
class Decision:
    """For one module: the line of the table that replaces it, or why none does."""

    replacement: Replacement | None
    reason: str | None = None


_replacements: dict[type[nn.Module], Replacement] = {}
_refusals: list[WhyNot] = []


def register_replacement(
    original: type[nn.Module], by: type[nn.Module] | None = None, *, why_not: WhyNot = _no_objection
) -> Any:
    """Let ``accelerate`` replace modules of class ``original``; a later registration of a class takes the place of
    an earlier one.

    Args:
        original: the class to replace. Instances of its subclasses are replaced too where that changes nothing but
            ``forward``: ``by`` is a subclass of ``original``, and the subclass doesn't override ``forward``.
        by: the class that instances are to have. Left out, this is a decorator of a function that takes the module
            and returns the one to put in its place, with the same parameters.
        why_not: given a module, says in words why it can't be replaced, or None.

    Raises:
        TypeError: an argument is not a class of modules.
    """
    for name, value in (("original", original), ("by", by)):
        if not (isinstance(value, type) and issubclass(value, nn.Module)) and not (name == "by" and value is None):
            raise TypeError(f"{name}: expected a subclass of torch.nn.Module, got {value!r}")
    if by is not None:
        _replacements[original] = Replacement(original, by, why_not)
        return by

    def decorator(build: Build) -> Build:
        _replacements[original] = Replacement(original, build, why_not)
        return build

    return decorator


def register_refusal(why_not: WhyNot) -> WhyNot:
    """Have ``report`` name modules outside the table that one might expect to see replaced; decorates a ``why_not``."""
    _refusals.append(why_not)
    return why_not


def find(cls: type) -> Replacement | None:
    """The line for a class, or for the nearest of its bases that has one."""
    return next((_replacements[base] for base in cls.__mro__ if base in _replacements), None)


def registered_names() -> frozenset[str]:
    """The bare names of the classes in the table."""
    return frozenset(cls.__name__ for cls in _replacements)


def decide(module: nn.Module) -> Decision | None:
    """Whether and how to replace ``module``; None for a module that is of no concern."""
    for refusal in _refusals:
        reason = refusal(module)
        if reason:
            return Decision(None, reason)
    cls = type(module)
    entry = find(cls)
    if entry is None or (isinstance(entry.by, type) and isinstance(module, entry.by)):
        return None
    reason = _why_not_subclass(cls, entry) or _why_not_instance(module, entry) or entry.why_not(module)
    return Decision(None, reason) if reason else Decision(entry)


def _why_not_subclass(cls: type, entry: Replacement) -> str | None:
    if cls is entry.original:
        return None
    if "forward" in overridden(cls, entry.original):
        return f"{cls.__name__} overrides forward"
    if not isinstance(entry.by, type):
        return f"{cls.__name__} is a subclass of {entry.original.__name__}, which a function replaces"
    if not issubclass(entry.by, entry.original):
        return f"{cls.__name__} is a subclass of {entry.original.__name__}, whose replacement is not"
    return None


def _why_not_instance(module: nn.Module, entry: Replacement) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if not entry.by_class and any(value for name, value in module.__dict__.items() if name.endswith("_hooks")):
        return "it has hooks, which would stay behind on the replaced module"
    return None


def overridden(cls: type, original: type) -> set[str]:
    """The attributes that classes between ``cls`` and ``original`` define."""
    between = cls.__mro__[: cls.__mro__.index(original)]
    return {name for base in between for name in vars(base)}
