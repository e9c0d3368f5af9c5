"""torch.nn's recurrent modules and cells: what replaces them, and what may speak against it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import Parameter
from torch.nn.utils import parametrize

from seqattn_kernels import nn as fast
from seqattn_kernels.accelerate.registry import (
    find,
    overridden,
    register_refusal,
    register_replacement,
    registered_names,
)

# What torch.nn's forward consults on the module and ours doesn't, since the operators check for themselves.
_CONSULTED = frozenset(
    {
        "__getattr__",
        "__getattribute__",
        "_flat_weights",
        "_init_flat_weights",
        "_update_flat_weights",
        "_weights_have_changed",
        "check_forward_args",
        "check_hidden_size",
        "check_input",
        "get_expected_cell_size",
        "get_expected_hidden_size",
        "permute_hidden",
    }
)


def _why_not(module: nn.Module) -> str | None:
    cls = parametrize.type_before_parametrizations(module)
    entry = find(cls)
    assert entry is not None
    changed = (
        sorted(overridden(cls, entry.original) & (_CONSULTED | module._parameters.keys()))
        if cls is not entry.original
        else []
    )
    if changed:
        return f"{cls.__name__} overrides {', '.join(changed)}"
    if getattr(module, "_is_fsdp_managed_module", False) or any(
        base.__name__ == "FSDPModule" for base in type(module).__mro__
    ):
        return "it is sharded by FSDP: accelerate the model before wrapping it"
    for name, tensor in module.named_parameters():
        if type(tensor) not in (Parameter, torch.Tensor):
            return f"{name} is a {type(tensor).__name__}"
    return None


for _name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"):
    register_replacement(getattr(nn, _name), getattr(fast, _name), why_not=_why_not)


@register_refusal
def _compiled_or_quantized(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        # A script module keeps the bare name of the class that it was made from.
        if getattr(module, "original_name", None) in registered_names():
            return "it is TorchScript: accelerate the model before tracing it"
    elif type(module).__module__.startswith("torch.ao.nn.quant") and type(module).__name__ in registered_names():
        return "it is quantized: its weights are integers"
    return None
