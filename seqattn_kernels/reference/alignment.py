"""Weights that know where they are: windows and Gaussians around a position, and monotonic alignment.

Weights are [B, T, S], positions [B, T].
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_mask(position: Tensor, source: int, window: float) -> Tensor:
    """Which keys lie within `window` of the position, [B, T, S]."""
    return distance(position, source).abs() <= window


def distance(position: Tensor, source: int) -> Tensor:
    """s - position, [B, T, S]."""
    return torch.arange(source, device=position.device, dtype=position.dtype) - position.unsqueeze(-1)


def gaussian(position: Tensor, source: int, deviation: float) -> Tensor:
    """exp(-(s - position)^2 / (2 deviation^2)), [B, T, S] (Luong, Pham, Manning, 2015, equation 10)."""
    return (-0.5 * (distance(position, source) / deviation).square()).exp()


def scan(a: Tensor, b: Tensor) -> Tensor:
    """x with x[s] = a[s] * x[s - 1] + b[s] over the last dimension (x = b at first), in ceil(log2 S) parallel steps.

    Only products of the factors and sums are formed, no quotient: for a in [0, 1] and b >= 0 it is as accurate as the
    recurrence itself, whatever the length.
    """
    step, source = 1, b.shape[-1]
    while step < source:
        b = torch.cat([b[..., :step], b[..., step:] + a[..., step:] * b[..., :-step]], -1)
        a = torch.cat([a[..., :step], a[..., step:] * a[..., :-step]], -1)
        step *= 2
    return b


def monotonic_step(choose: Tensor, previous: Tensor) -> Tensor:
    """Where attention stands after one step, [B, S], from where it stood (Raffel et al., 2017, equations 11 to 13).

    It moves from its key towards later ones and stops at key s with probability ``choose`` [B, S]. With choices of 0
    and 1 this is the hard alignment of inference. What passes the last key is lost.
    """
    passed = torch.cat([torch.zeros_like(choose[:, :1]), 1 - choose[:, :-1]], 1)
    return choose * scan(passed, previous)


def monotonic_alignment(choose: Tensor, previous: Tensor | None = None) -> Tensor:
    """Weights [B, T, S] from probabilities of stopping [B, T, S]; previous [B, S], the first key where None."""
    steps, source = choose.shape[1:]
    if previous is None:
        previous = choose.new_zeros(choose.shape[0], source)
        previous[:, :1] = 1
    weights = []
    for t in range(steps):
        previous = monotonic_step(choose[:, t], previous)
        weights.append(previous)
    return torch.stack(weights, 1) if weights else choose
