"""One call that makes the recurrent modules of a model faster, and its undoing."""

from __future__ import annotations

from seqattn_kernels.accelerate import torch_nn  # noqa: F401  (fills the table)
from seqattn_kernels.accelerate.apply import accelerate, restore
from seqattn_kernels.accelerate.registry import register_refusal, register_replacement
from seqattn_kernels.accelerate.report import Report, Row, report

__all__ = ["Report", "Row", "accelerate", "register_refusal", "register_replacement", "report", "restore"]
