"""Attention-based recurrent networks in PyTorch, made faster without changing what they compute.

``accelerate(model)`` makes an existing model faster in place; ``seqattn_kernels.nn`` has the modules,
``seqattn_kernels.functional`` the operators as functions.
"""

from importlib.metadata import PackageNotFoundError, version

from seqattn_kernels import functional, nn
from seqattn_kernels.accelerate import accelerate, register_replacement, report, restore
from seqattn_kernels.nn import freeze, frozen, unfreeze

try:
    __version__ = version("seqattn_kernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "accelerate",
    "freeze",
    "frozen",
    "functional",
    "nn",
    "register_replacement",
    "report",
    "restore",
    "unfreeze",
]
