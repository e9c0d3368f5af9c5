"""What all launches share: tensors on one CUDA device, or anywhere under the interpreter."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


def target() -> str:
    """Where the kernels run: "cuda", "hip", or "plain" under the interpreter."""
    if triton.knobs.runtime.interpret:
        return "plain"
    return "hip" if torch.version.hip else "cuda"


@triton.constexpr_function
def precision_of(target):
    """Of products of float32: three of tf32 lose 2 bits of 24, and take tensor cores."""
    return "tf32x3" if target == "cuda" else "ieee"


def on_device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def padded(n: int, to: int) -> int:
    return triton.cdiv(n, to) * to


def rows_of(v: Tensor | None) -> int:
    """H of v [H, A] or [A]: batch element b has row b % H."""
    return 1 if v is None or v.dim() == 1 else v.shape[0]


class Masks(NamedTuple):
    """Who attends to what. mask [B, 1 or T, S]: uint8, or floating and added; lengths int64 [B]."""

    lengths: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor | None, mask: Tensor | None) -> Masks:
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
            mask = mask.contiguous()
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        return cls(lengths if lengths is None else lengths.contiguous(), mask)

    @property
    def hide(self) -> bool:
        return self.lengths is not None or self.mask is not None

    @property
    def added(self) -> bool:
        return self.mask is not None and self.mask.is_floating_point()

    def strides(self) -> tuple[int, int]:
        if self.mask is None:
            return 0, 0
        return self.mask.stride(0), self.mask.stride(1) if self.mask.shape[1] > 1 else 0

    def used(self) -> Tensor | None:
        """uint8 [B, S]: keys the mask lets some query attend to; None: all."""
        if self.mask is None:
            return None
        allowed = self.mask != (-torch.inf if self.added else 0)
        return (allowed.any(1) if allowed.shape[1] > 1 else allowed.squeeze(1)).to(torch.uint8)


EVERYTHING = Masks()  # every query attends to every key
