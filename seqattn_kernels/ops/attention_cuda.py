"""The attention operators on CUDA: Triton kernels, imported when one is first called.

Where the extension, which declares the operators, is not built, they are declared here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from seqattn_kernels import native
from seqattn_kernels.reference.attention import SCORES
from seqattn_kernels.reference.normalizers import NORMALIZERS

# As in csrc/ops.cpp; those of pooling are here alone: a CPU takes torch's product.
SCHEMAS = {
    "additive_fwd": "(Tensor query, Tensor keys, Tensor? packed, Tensor values, Tensor v, Tensor? lengths, "
    "Tensor? mask, bool need_weights) -> (Tensor, Tensor)",
    "additive_pack": "(Tensor keys) -> Tensor",
    "additive_bwd": "(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor weights, Tensor? d_context, "
    "Tensor? d_weights, Tensor? lengths, Tensor? mask, bool need_values) -> (Tensor, Tensor, Tensor, Tensor)",
    "scores_fwd": "(int kind, Tensor query, Tensor keys, Tensor? v, Tensor? features, Tensor? feature_weight, "
    "Tensor? lengths) -> Tensor",
    "scores_bwd": "(int kind, Tensor d_scores, Tensor query, Tensor keys, Tensor? v, Tensor? features, "
    "Tensor? feature_weight, Tensor? lengths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "normalize_fwd": "(int kind, Tensor scores, Tensor? lengths, Tensor? mask, float scale, float temperature, "
    "float fill, bool zero_empty) -> Tensor",
    "normalize_bwd": "(int kind, Tensor d_weights, Tensor weights, Tensor? lengths, Tensor? mask, float factor) "
    "-> Tensor",
    "context_fwd": "(Tensor weights, Tensor values) -> Tensor",
    "monotonic_fwd": "(Tensor choose, Tensor previous) -> Tensor",
    "monotonic_bwd": "(Tensor choose, Tensor previous, Tensor weights, Tensor d_weights) -> (Tensor, Tensor)",
    "pool_fwd": "(Tensor inner, Tensor v) -> Tensor",
    "pool_bwd": "(Tensor d_scores, Tensor inner, Tensor v) -> (Tensor, Tensor)",
    "feature_fwd": "(Tensor input, Tensor weight, Tensor? bias, Tensor? lengths, Tensor? mask, bool reduce, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    "feature_bwd": "(Tensor input, Tensor weight, Tensor? bias, Tensor weights, Tensor tangents, Tensor? d_result, "
    "Tensor? d_weights, Tensor? lengths, Tensor? mask, bool reduce, bool need_input) -> (Tensor, Tensor, Tensor)",
}

_installed = importlib.util.find_spec("triton") is not None


def why_not() -> str | None:
    """None where the operators are registered for CUDA, else why not and what to do."""
    return None if _installed else "triton is not installed; `pip install triton`"


def declared() -> bool:
    """Whether the operators exist, from the extension or from here."""
    return native.extension is not None or _installed


def _implementation(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from seqattn_kernels import kernels

        # Products inside an operator are in the types its fake kernel promises: autocast has had its say outside.
        device = next(t.device.type for t in args if isinstance(t, torch.Tensor))
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return getattr(kernels, name)(*args)
        return getattr(kernels, name)(*args)

    def call_by_kind(kind: int, *args: Any) -> Any:
        table = SCORES if name.startswith("scores") else NORMALIZERS
        return call(list(table)[kind], *args)

    return call_by_kind if SCHEMAS[name].startswith("(int kind") else call


if _installed:
    _library = torch.library.Library("seqattn", "FRAGMENT")
    for _name, _schema in SCHEMAS.items():
        if not hasattr(torch.ops.seqattn, _name):
            _library.define(_name + _schema)
        _library.impl(_name, _implementation(_name), "CUDA")
