"""Attention modules. A boolean mask is True where to attend; see `seqattn_kernels.functional` for masks and results."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqattn_kernels import functional
from seqattn_kernels.functional import PreparedKeys, Weighting
from seqattn_kernels.functional.masks import attended_keys, resolve_masks
from seqattn_kernels.functional.weighting import SOFTMAX, weighting_of

Attended = tuple[Tensor, Any]  # context and weights, None where not asked for


def uniform(*shape: int, fan_in: int, device: Any, dtype: Any) -> nn.Parameter:
    """Initialised as torch.nn.Linear does."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype).uniform_(-bound, bound))


class Attention(nn.Module):
    """What attention modules share: how scores become weights.

    Each ``forward`` takes keywords as the function of its kind does: lengths, mask, mask_polarity, need_weights, and
    causal where steps may be queries of one sequence.
    """

    def __init__(self, weighting: Weighting | str | None = None) -> None:
        super().__init__()
        self.weighting = weighting_of(weighting)

    def current_weighting(self) -> Weighting | None:
        """Without dropout unless training; None for plain softmax."""
        weighting = self.weighting
        if weighting.dropout and not self.training:
            weighting = replace(weighting, dropout=0.0)
        return None if weighting == SOFTMAX else weighting

    def extra_repr(self) -> str:
        return "" if self.weighting == SOFTMAX else f"weighting={self.weighting}"

    def _repr(self, *sizes: Any) -> str:
        return ", ".join([*map(str, sizes), *filter(None, [Attention.extra_repr(self)])])


class ProjectedAttention(Attention):
    """What modules share whose scores are ``v . tanh(query_proj(query) + key_proj(keys) + ...)``."""

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        bias: bool,
        key_bias: bool,
        device: Any,
        dtype: Any,
        weighting: Weighting | str | None,
        heads: int | None = None,
    ) -> None:
        super().__init__(weighting)
        self.query_size, self.key_size, self.attention_size = query_size, key_size, attention_size
        self.query_proj = nn.Linear(query_size, attention_size, bias=bias, device=device, dtype=dtype)
        self.key_proj = nn.Linear(key_size, attention_size, bias=key_bias, device=device, dtype=dtype)
        shape = (attention_size,) if heads is None else (heads, attention_size // heads)
        self.v = uniform(*shape, fan_in=shape[-1], device=device, dtype=dtype)

    def prepare_keys(self, keys: Tensor) -> PreparedKeys:
        """Keys [B, S, key_size], projected once for many calls of `forward`, which then need ``values``.

        Not to be kept across a change of the module's parameters.
        """
        return PreparedKeys.unpacked(self.key_proj(keys))

    def extra_repr(self) -> str:
        return self._repr(self.query_size, self.key_size, self.attention_size)


class AdditiveAttention(ProjectedAttention):
    """Additive attention (Bahdanau, Cho, Bengio, 2014): ``v . tanh(query_proj(query) + key_proj(keys)) + score_bias``.

    Args:
        query_size, key_size: features of queries and keys.
        attention_size: features they are projected to, A.
        bias: whether the query's projection, and with it their sum, has a bias.
        key_bias: whether the keys' projection has one, as in many tutorials.
        score_bias: whether there is one on the score, as of a last linear layer: no softmax depends on it, and its
            gradient is zero; a sigmoid does.
        weighting: see `seqattn_kernels.functional.Weighting`; its dropout acts in training mode.

    Parameters: ``query_proj.weight`` [A, query_size], ``query_proj.bias`` [A], ``key_proj.weight`` [A, key_size],
    ``v`` [A], and ``key_proj.bias`` [A], ``score_bias`` [] where asked for.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        key_bias: bool = False,
        score_bias: bool = False,
        weighting: Weighting | str | None = None,
    ) -> None:
        super().__init__(query_size, key_size, attention_size, bias, key_bias, device, dtype, weighting)
        self.score_bias = nn.Parameter(torch.zeros((), device=device, dtype=dtype)) if score_bias else None

    def prepare_keys(self, keys: Tensor) -> PreparedKeys:
        """As `ProjectedAttention.prepare_keys`, and laid out for the kernels."""
        return functional.prepare_keys(self.key_proj(keys))

    def forward(
        self, query: Tensor, keys: Tensor | PreparedKeys, values: Tensor | None = None, **options: Any
    ) -> Attended:
        """query [B, query_size] or [B, T, query_size], keys [B, S, key_size] or prepared -> context, weights."""
        projected, values, options = project(self.key_proj, query, keys, values, options)
        return functional.additive_attention(
            self.query_proj(query),
            projected,
            self.v,
            values,
            score_bias=self.score_bias,
            weighting=self.current_weighting(),
            **options,
        )


def project(
    projection: Any, query: Tensor, keys: Tensor | PreparedKeys, values: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor | PreparedKeys, Tensor, dict[str, Any]]:
    """Keys projected, but for those that no query attends to; the values; options with the masks resolved."""
    if isinstance(keys, PreparedKeys):
        if values is None:
            raise ValueError("values: expected [B, S, D] with prepared keys, got None")
        return keys, values, options
    values = keys if values is None else values
    masks = {name: options[name] for name in ("lengths", "mask", "mask_polarity", "causal") if name in options}
    if masks.get("lengths") is None and masks.get("mask") is None and not masks.get("causal"):
        return projection(keys), values, options
    lengths, mask = resolve_masks(query, keys, masks.pop("lengths", None), masks.pop("mask", None), **masks)
    options = {name: value for name, value in options.items() if name not in ("mask_polarity", "causal")}
    return projection(attended_keys(keys, lengths, mask)), values, options | {"lengths": lengths, "mask": mask}


class MultiHeadAdditiveAttention(ProjectedAttention):
    """Additive attention with several heads, each over its part of the projections, and of the values.

    Args:
        query_size, key_size: features of queries and keys.
        attention_size: features they are projected to, all heads together.
        heads: N; divides attention_size and the size of the values.
        weighting: see `seqattn_kernels.functional.Weighting`.

    Parameters: ``query_proj.weight`` [attention_size, query_size], ``query_proj.bias`` [attention_size],
    ``key_proj.weight`` [attention_size, key_size], ``v`` [N, attention_size / N].
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        heads: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        if heads < 1 or attention_size % heads:
            raise ValueError(f"heads: expected a number that divides attention_size={attention_size}, got {heads}")
        super().__init__(query_size, key_size, attention_size, bias, False, device, dtype, weighting, heads)
        self.heads = heads

    def prepare_keys(self, keys: Tensor) -> PreparedKeys:
        """As `AdditiveAttention.prepare_keys`."""
        return functional.prepare_keys(self.key_proj(keys), heads=self.heads)

    def forward(
        self, query: Tensor, keys: Tensor | PreparedKeys, values: Tensor | None = None, **options: Any
    ) -> Attended:
        """As `AdditiveAttention.forward`; the weights are [B, N, S] or [B, N, T, S]."""
        projected, values, options = project(self.key_proj, query, keys, values, options)
        return functional.multi_head_additive_attention(
            self.query_proj(query), projected, self.v, values, weighting=self.current_weighting(), **options
        )

    def extra_repr(self) -> str:
        return self._repr(self.query_size, self.key_size, self.attention_size, f"heads={self.heads}")


class ConcatAttention(Attention):
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
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        super().__init__(weighting)
        self.query_size, self.key_size, self.attention_size = query_size, key_size, attention_size
        width = query_size + key_size
        self.weight = uniform(attention_size, width, fan_in=width, device=device, dtype=dtype)
        self.bias = uniform(attention_size, fan_in=width, device=device, dtype=dtype) if bias else None
        self.v = uniform(attention_size, fan_in=attention_size, device=device, dtype=dtype)

    def prepare_keys(self, keys: Tensor) -> PreparedKeys:
        """Keys [B, S, key_size], projected and prepared once for many calls of `forward`, which then need ``values``.

        Not to be kept across a change of the module's parameters.
        """
        return functional.prepare_keys(F.linear(keys, self.weight[:, self.query_size :]))

    def forward(
        self, query: Tensor, keys: Tensor | PreparedKeys, values: Tensor | None = None, **options: Any
    ) -> Attended:
        """query [B, query_size] or [B, T, query_size], keys [B, S, key_size] or prepared -> context, weights."""
        weighting = self.current_weighting()
        if isinstance(keys, PreparedKeys):
            if values is None:
                raise ValueError("values: expected [B, S, D] with prepared keys, got None")
            projected = F.linear(query, self.weight[:, : self.query_size], self.bias)
            return functional.additive_attention(projected, keys, self.v, values, weighting=weighting, **options)
        return functional.concat_attention(
            query, keys, self.weight, self.v, values, bias=self.bias, weighting=weighting, **options
        )

    def extra_repr(self) -> str:
        return self._repr(self.query_size, self.key_size, self.attention_size, f"bias={self.bias is not None}")


class DotAttention(Attention):
    """Dot-product attention (Luong, Pham, Manning, 2015). scale: a number, True for 1 / sqrt(K), None for 1."""

    def __init__(self, scale: float | bool | None = None, *, weighting: Weighting | str | None = None) -> None:
        super().__init__(weighting)
        self.scale = scale

    def forward(self, query: Tensor, keys: Tensor, values: Tensor | None = None, **options: Any) -> Attended:
        """query [B, K] or [B, T, K], keys [B, S, K] -> context, weights."""
        return functional.dot_attention(
            query, keys, values, scale=self.scale, weighting=self.current_weighting(), **options
        )

    def extra_repr(self) -> str:
        return self._repr(f"scale={self.scale}")


class GeneralAttention(Attention):
    """Bilinear attention (Luong, Pham, Manning, 2015, "general"). Parameter: ``weight`` [query_size, key_size]."""

    def __init__(
        self,
        query_size: int,
        key_size: int,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        super().__init__(weighting)
        self.query_size, self.key_size = query_size, key_size
        self.weight = uniform(query_size, key_size, fan_in=key_size, device=device, dtype=dtype)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor | None = None, **options: Any) -> Attended:
        """query [B, query_size] or [B, T, query_size], keys [B, S, key_size] -> context, weights."""
        return functional.general_attention(
            query, keys, self.weight, values, weighting=self.current_weighting(), **options
        )

    def extra_repr(self) -> str:
        return self._repr(self.query_size, self.key_size)


class CosineAttention(Attention):
    """Scores ``scale * cos(query, key)`` (Graves, Wayne, Danihelka, 2014).

    Args:
        scale: the sharpness at first.
        learned: whether it is a parameter, ``scale`` [].
    """

    def __init__(
        self,
        scale: float = 1.0,
        learned: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        super().__init__(weighting)
        number = torch.tensor(scale, device=device, dtype=dtype or torch.get_default_dtype())
        self.scale: Any = nn.Parameter(number) if learned else scale

    def forward(self, query: Tensor, keys: Tensor, values: Tensor | None = None, **options: Any) -> Attended:
        """query [B, K] or [B, T, K], keys [B, S, K] -> context, weights."""
        return functional.cosine_attention(
            query, keys, values, scale=self.scale, weighting=self.current_weighting(), **options
        )

    def extra_repr(self) -> str:
        return self._repr(f"scale={torch.as_tensor(self.scale).item():g}")
