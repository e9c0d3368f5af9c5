"""Attention modules. A boolean mask is True where to attend; see `seqattn_kernels.functional` for masks and results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqattn_kernels import functional
from seqattn_kernels.functional import PreparedKeys
from seqattn_kernels.functional.attention import attended_keys

Attended = tuple[Tensor, Any]  # context and weights, None where not asked for


def _uniform(*shape: int, fan_in: int, device: Any, dtype: Any) -> nn.Parameter:
    """Initialised as torch.nn.Linear does."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype).uniform_(-bound, bound))


class AdditiveAttention(nn.Module):
    """Additive attention (Bahdanau, Cho, Bengio, 2014): ``v . tanh(query_proj(query) + key_proj(keys))``.

    Args:
        query_size, key_size: features of queries and keys.
        attention_size: features they are projected to, A.
        bias: whether the query's projection, and with it their sum, has a bias.

    Parameters: ``query_proj.weight`` [A, query_size], ``query_proj.bias`` [A], ``key_proj.weight`` [A, key_size],
    ``v`` [A].
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size, self.attention_size = query_size, key_size, attention_size
        self.query_proj = nn.Linear(query_size, attention_size, bias=bias, device=device, dtype=dtype)
        self.key_proj = nn.Linear(key_size, attention_size, bias=False, device=device, dtype=dtype)
        self.v = _uniform(attention_size, fan_in=attention_size, device=device, dtype=dtype)

    def prepare_keys(self, keys: Tensor) -> PreparedKeys:
        """Keys [B, S, key_size], projected and prepared once for many calls of `forward`, which then need ``values``.

        Not to be kept across a change of the module's parameters.
        """
        return functional.prepare_keys(self.key_proj(keys))

    def forward(
        self,
        query: Tensor,
        keys: Tensor | PreparedKeys,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> Attended:
        """query [B, query_size] or [B, T, query_size], keys [B, S, key_size] or prepared -> context, weights."""
        if isinstance(keys, PreparedKeys):
            if values is None:
                raise ValueError("values: expected [B, S, D] with prepared keys, got None")
            projected: Tensor | PreparedKeys = keys
        else:
            values = keys if values is None else values
            projected = self.key_proj(attended_keys(query, keys, lengths, mask))
        return functional.additive_attention(
            self.query_proj(query), projected, self.v, values, lengths=lengths, mask=mask, need_weights=need_weights
        )

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.key_size}, {self.attention_size}"


class ConcatAttention(nn.Module):
    """Attention with scores ``v . tanh(weight [query; key] + bias)`` (Luong, Pham, Manning, 2015, "concat").

    Parameters: ``weight`` [A, query_size + key_size], ``bias`` [A], ``v`` [A].
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size, self.attention_size = query_size, key_size, attention_size
        width = query_size + key_size
        self.weight = _uniform(attention_size, width, fan_in=width, device=device, dtype=dtype)
        self.bias = _uniform(attention_size, fan_in=width, device=device, dtype=dtype) if bias else None
        self.v = _uniform(attention_size, fan_in=attention_size, device=device, dtype=dtype)

    def prepare_keys(self, keys: Tensor) -> PreparedKeys:
        """Keys [B, S, key_size], projected and prepared once for many calls of `forward`, which then need ``values``.

        Not to be kept across a change of the module's parameters.
        """
        return functional.prepare_keys(F.linear(keys, self.weight[:, self.query_size :]))

    def forward(
        self,
        query: Tensor,
        keys: Tensor | PreparedKeys,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> Attended:
        """query [B, query_size] or [B, T, query_size], keys [B, S, key_size] or prepared -> context, weights."""
        options = {"lengths": lengths, "mask": mask, "need_weights": need_weights}
        if isinstance(keys, PreparedKeys):
            if values is None:
                raise ValueError("values: expected [B, S, D] with prepared keys, got None")
            projected = F.linear(query, self.weight[:, : self.query_size], self.bias)
            return functional.additive_attention(projected, keys, self.v, values, **options)  # type: ignore[arg-type]
        return functional.concat_attention(
            query,
            keys,
            self.weight,
            self.v,
            values,
            bias=self.bias,
            **options,  # type: ignore[arg-type]
        )

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.key_size}, {self.attention_size}, bias={self.bias is not None}"


class DotAttention(nn.Module):
    """Dot-product attention (Luong, Pham, Manning, 2015). scale: a number, True for 1 / sqrt(K), None for 1."""

    def __init__(self, scale: float | bool | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> Attended:
        """query [B, K] or [B, T, K], keys [B, S, K] -> context, weights."""
        return functional.dot_attention(
            query, keys, values, scale=self.scale, lengths=lengths, mask=mask, need_weights=need_weights
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class GeneralAttention(nn.Module):
    """Bilinear attention (Luong, Pham, Manning, 2015, "general"). Parameter: ``weight`` [query_size, key_size]."""

    def __init__(self, query_size: int, key_size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.query_size, self.key_size = query_size, key_size
        self.weight = _uniform(query_size, key_size, fan_in=key_size, device=device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = True,
    ) -> Attended:
        """query [B, query_size] or [B, T, query_size], keys [B, S, key_size] -> context, weights."""
        return functional.general_attention(
            query, keys, self.weight, values, lengths=lengths, mask=mask, need_weights=need_weights
        )

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.key_size}"


class FeatureAttention(nn.Module):
    """Attention over time for each feature: ``softmax(tanh(linear(input)), dim=1) * input``, as in many tutorials.

    Parameters: ``linear.weight`` [input_size, input_size], ``linear.bias`` [input_size]. reduce: sum over time.
    """

    def __init__(
        self, input_size: int, bias: bool = True, reduce: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, input_size, bias=bias, device=device, dtype=dtype)
        self.reduce = reduce

    def forward(
        self, input: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """input [B, S, input_size] -> weights * input (or its sum over time), weights [B, S, input_size]."""
        return functional.feature_attention(
            input, self.linear.weight, self.linear.bias, lengths=lengths, mask=mask, reduce=self.reduce
        )
