"""Weights promised unchanged for a while, so that they are packed once and not on each call.

Outside such a scope every forward reads the weights anew, whatever happened to them. Inside it a change raises: packed
weights may never be stale, and there is no cheap proof that a tensor still holds the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)
_VERSION = attrgetter("_version")


class Frozen:
    """What one module keeps while its weights are frozen.

    A weight counts as changed when another tensor stands in its place, when its memory moved, or when it was written in
    place (``_version``). Writing through ``weight.data`` leaves no trace: that much the caller promises.
    """

    __slots__ = ("_alive", "_counted", "_present", "_sources", "_stamp", "dtype", "holders", "packed", "weights")

    def __init__(self, module: Freezable, dtype: torch.dtype | None) -> None:
        self.holders: set[Hashable] = set()
        self.dtype = dtype
        with torch.no_grad():
            self.weights = module._read_weights()
            pack = module._pack_weights if dtype is None else module._pack_bfloat16
            self.packed = pack(self.weights)
        self._sources = _sources(module)
        self._present = [tensor for tensor in self._sources if tensor is not None]
        self._counted = [tensor for tensor in self._present if not tensor.is_inference()]  # others have no versions
        self._stamp = self._take_stamp()
        # Holding the memory itself keeps its address from being handed to other weights.
        self._alive = [tensor.detach() for tensor in self._present]

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()  # A copy of a frozen module, by deepcopy or pickle, is not frozen.

    def check(self, module: Freezable) -> None:
        """Raise RuntimeError unless the weights are those that were packed."""
        sources = _sources(module)
        same = len(sources) == len(self._sources) and all(map(is_, sources, self._sources))
        if same and self._take_stamp() == self._stamp:
            return
        raise RuntimeError(
            f"{type(module).__name__}: its weights are frozen, but they have changed since; leave the frozen scope "
            "(or call unfreeze) before changing weights"
        )

    def _take_stamp(self) -> list[int]:
        """Addresses and versions; by `map`, since a step of a cell is not much longer."""
        return [*map(Tensor.data_ptr, self._present), *map(_VERSION, self._counted)]

    def checked(self, module: Freezable) -> tuple[Sequence[Any], Any]:
        """The weights and their packed form, safe to use now."""
        self.check(module)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._present):
            raise RuntimeError(
                f"{type(module).__name__}: its weights are frozen, but gradients would be recorded for them; run under "
                "torch.no_grad() or torch.inference_mode(), or leave the frozen scope (or call unfreeze) to train"
            )
        return self.weights, self.packed


def _sources(module: Freezable) -> Sequence[Tensor | None]:
    """The tensors that determine the weights: themselves, or what they are computed from where parametrized."""
    if "parametrizations" in module._modules:
        return [*module.parameters(), *module.buffers()]
    return module._read_weights()


class Freezable(nn.Module):
    """Base of modules with weights that can be packed once. It adds no state to a module that is not frozen."""

    _frozen: Frozen | None = None

    def _weight_names(self) -> Sequence[str]:
        raise NotImplementedError

    def _read_weights(self) -> Sequence[Tensor | None]:
        """The tensors that stand as attributes at this moment, in the order of ``_weight_names``."""
        parameters = self._parameters
        names = self._weight_names()
        try:
            return [parameters[name] for name in names]
        except KeyError:  # Some are computed: parametrized, dropped out by a wrapper, replicated.
            return [getattr(self, name) for name in names]

    def _pack_weights(self, weights: Sequence[Tensor | None]) -> Any:
        raise NotImplementedError

    def _pack_bfloat16(self, weights: Sequence[Tensor | None]) -> Any:
        """The same rounded to bfloat16, of modules that have kernels for it."""
        return self._pack_weights(weights)

    def _parts_packed_within(self) -> Iterable[nn.Module]:
        """Modules whose weights this one packs with its own, and never calls."""
        return ()

    def _weights(self) -> tuple[Sequence[Any], Any]:
        """The weights to compute with, and their packed form where frozen."""
        if self._frozen is None:
            return self._read_weights(), None
        if torch.compiler.is_compiling():  # A graph outlives the scope.
            return self._read_weights(), None
        return self._frozen.checked(self)

    def _refuse_if_frozen(self, name: str) -> None:
        if self._frozen is not None and name in self._weight_names():
            raise RuntimeError(
                f"{type(self).__name__}.{name}: frozen; leave the frozen scope (or call unfreeze) before changing it"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_if_frozen(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_if_frozen(name)
        super().__delattr__(name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        if self._frozen is not None:  # A conversion that changes nothing is welcome.
            self._frozen.check(self)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._frozen is not None:
            raise RuntimeError(
                f"{type(self).__name__}: its weights are frozen; leave the frozen scope (or call unfreeze) before "
                "loading others"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_frozen", None)  # Its weights are other tensors.
        return replica


def weights_dtype(weights: Any) -> torch.dtype | None:
    """The dtype that the argument ``weights`` asks for."""
    if weights is None:
        return None
    if weights == "bfloat16" or weights is torch.bfloat16:
        return torch.bfloat16
    raise ValueError(f"weights: expected None, 'bfloat16' or torch.bfloat16, got {weights!r}")


def _hold(module: Freezable, holder: Hashable, dtype: torch.dtype | None) -> None:
    if module._frozen is None:
        module._frozen = Frozen(module, dtype)
    else:
        module._frozen.check(module)
        if dtype is not None and module._frozen.dtype != dtype:
            raise RuntimeError(
                f"{type(module).__name__}: its weights are frozen as they are; leave that frozen scope (or call "
                f"unfreeze) before freezing them in {dtype}"
            )
    module._frozen.holders.add(holder)


def _release(module: Freezable, holder: Hashable) -> None:
    state = module.__dict__.get("_frozen")  # Not an attribute: its class may have been restored meanwhile.
    if state is not None:
        state.holders.discard(holder)
        if not state.holders:
            thaw(module)


def thaw(module: nn.Module) -> None:
    """Release one module, whoever holds it."""
    module.__dict__.pop("_frozen", None)


_UNTIL_UNFREEZE = "unfreeze"


def _hold_all(model: nn.Module, holder: Hashable, dtype: torch.dtype | None) -> list[Freezable]:
    modules = [module for module in model.modules() if isinstance(module, Freezable)]
    within = {id(part) for module in modules for part in module._parts_packed_within()}
    modules = [module for module in modules if id(module) not in within]
    new = [module for module in modules if module._frozen is None or holder not in module._frozen.holders]
    try:
        for module in modules:
            _hold(module, holder, dtype)
    except BaseException:
        for module in new:
            _release(module, holder)
        raise
    return modules


@contextmanager
def frozen(model: ModelT, *, weights: str | torch.dtype | None = None) -> Iterator[ModelT]:
    """A scope for inference in which the weights of the package's modules in ``model`` are packed once and kept.

    Inside, RuntimeError is raised by a change of their weights (assignment, ``load_state_dict``, a conversion by
    ``.to()``, an optimizer step) and by a forward that would record gradients for them. Gradients of inputs are fine.
    The one thing that goes unseen is writing through ``weight.data``: don't. Scopes nest; a copy of the model is not
    frozen. Packed weights take as much memory again as the weights.

    Args:
        weights: "bfloat16" or torch.bfloat16 rounds the weights that multiply inputs and states to bfloat16, and inputs
            and states for these products; sums, gates, states and results stay float32. For recurrent modules in
            float32; cells, decoders, and modules that no native kernel serves, keep their weights as they are. Results
            depend on the processor's bfloat16 instructions only in their last float32 digits (and where numbers are
            denormal).
            None keeps weights as they are, or as an outer scope has them.

    Raises:
        ValueError: ``weights`` is another one, or bfloat16 where a module's weights are not float32.
        RuntimeError: weights are frozen in another form already.

    Example:
        >>> with seqattn_kernels.frozen(model), torch.inference_mode():
        ...     for batch in batches:
        ...         model(batch)
    """
    holder = object()
    modules = _hold_all(model, holder, weights_dtype(weights))
    try:
        yield model
    finally:
        for module in modules:
            _release(module, holder)


def freeze(model: ModelT, *, weights: str | torch.dtype | None = None) -> ModelT:
    """As ``frozen``, until ``unfreeze(model)``."""
    _hold_all(model, _UNTIL_UNFREEZE, weights_dtype(weights))
    return model


def unfreeze(model: ModelT) -> ModelT:
    """End what ``freeze(model)`` or ``accelerate(model, frozen=True)`` began."""
    for module in model.modules():
        if isinstance(module, Freezable):
            _release(module, _UNTIL_UNFREEZE)
    return model
