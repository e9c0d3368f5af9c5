"""What accelerate() replaced in a model, and what it did not, with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from seqattn_kernels.accelerate.apply import MARK
from seqattn_kernels.accelerate.classes import is_parametrized_class
from seqattn_kernels.accelerate.registry import decide, find

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One module: where it stands, its class before, what replaced it, or why nothing did."""

    name: str
    original: str
    replaced_by: str | None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """The modules of a model that could matter to ``accelerate``; prints as a table, with rich or without."""

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.replaced_by is not None)

    @property
    def summary(self) -> str:
        if not self.rows:
            return "no recurrent modules to replace"
        return f"{len(self.replaced)} of {len(self.rows)} recurrent modules replaced"

    def __str__(self) -> str:
        table = [_HEADINGS, *(_cells(row) for row in self.rows)] if self.rows else []
        widths = [max((len(cells[column]) for cells in table), default=0) for column in range(2)]
        lines = [f"{name:{widths[0]}}  {original:{widths[1]}}  {outcome}" for name, original, outcome in table]
        return "\n".join([self.summary, *lines])

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(*_HEADINGS, title=self.summary, title_justify="left")
        for row in self.rows:
            table.add_row(*map(escape, _cells(row)), style=None if row.replaced_by else "yellow")
        return table


_HEADINGS = ("module", "class", "replaced by, or why not")


def _cells(row: Row) -> tuple[str, str, str]:
    return row.name, row.original, row.replaced_by or f"no: {row.reason}"


def report(model: nn.Module) -> Report:
    """List the recurrent modules of ``model``, and those of registered classes: replaced or not, and why not.

    It changes nothing, and may be called before ``accelerate`` as well as after. A module with several parents is
    listed once, under its first name.
    """
    return Report(tuple(_rows(model)))


def _rows(model: nn.Module) -> Iterator[Row]:
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        name = name or "(the model)"
        original = module.__dict__.get(MARK)
        if isinstance(original, nn.Module):
            inside.update(module.modules())
            yield Row(name, _public_name(type(original)), _public_name(type(module)))
        elif original is not None:
            entry = find(original)
            yield Row(name, _public_name(original), _public_name(entry.by) if entry else _public_name(type(module)))
        else:
            decision = decide(module)
            if decision is not None:
                yield Row(name, _public_name(type(module)), None, decision.reason or "not yet: call accelerate(model)")


def _public_name(of: Any) -> str:
    """The name to import a class (or function) by: that of the package where it is public there."""
    if is_parametrized_class(of):
        return f"{_public_name(of.__bases__[0])}, parametrized"
    name = of.__name__
    for package in ("torch.nn", "seqattn_kernels.nn"):
        if getattr(sys.modules[package], name, None) is of:
            return f"{package}.{name}"
    return f"{of.__module__}.{of.__qualname__}"
