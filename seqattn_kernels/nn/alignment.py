"""Modules of attention that knows where it is or was: location-sensitive, coverage, local, monotonic.

Each call is one step of a decoder unless said otherwise. What a step has to know of those before it is a tensor the
caller keeps: it comes from ``initial``, and the weights of each step lead to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqattn_kernels import functional
from seqattn_kernels.functional import PreparedKeys, Weighting
from seqattn_kernels.nn.attention import Attended, Attention, ProjectedAttention, project, uniform


class LocationSensitiveAttention(ProjectedAttention):
    """Location-sensitive attention (Chorowski et al., 2015), in the form of Tacotron 2 by default.

    Args:
        query_size, key_size: features of queries and keys.
        attention_size: features they are projected to, A.
        filters, kernel_size: of the convolution over earlier weights; kernel_size is odd.
        cumulative: the convolution sees the sum of all earlier weights besides the last.
        history_gradient: whether gradients flow into earlier steps through the history.
        weighting: see `seqattn_kernels.functional.Weighting`.

    Parameters: ``query_proj.weight`` [A, query_size], ``query_proj.bias`` [A], ``key_proj.weight`` [A, key_size],
    ``conv.weight`` [filters, 1 or 2, kernel_size], ``feature_proj.weight`` [A, filters], ``v`` [A].
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        filters: int = 32,
        kernel_size: int = 31,
        cumulative: bool = True,
        bias: bool = True,
        history_gradient: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        super().__init__(query_size, key_size, attention_size, bias, False, device, dtype, weighting)
        self.cumulative, self.history_gradient = cumulative, history_gradient
        channels = 2 if cumulative else 1
        self.conv = nn.Conv1d(
            channels, filters, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype
        )
        self.feature_proj = nn.Linear(filters, attention_size, bias=False, device=device, dtype=dtype)

    def initial(self, keys: Tensor) -> Tensor:
        """The history before the first step, zeros [B, C, S]; keys [B, S, ..] give sizes, device and dtype."""
        return keys.new_zeros(keys.shape[0], 2 if self.cumulative else 1, keys.shape[1])

    def next_history(self, history: Tensor, weights: Tensor) -> Tensor:
        """The history [B, C, S] after a step with these weights [B, S]."""
        if not self.cumulative:
            return weights.unsqueeze(1)
        return torch.stack([weights, history[:, 1] + weights], 1)

    def forward(
        self,
        query: Tensor,
        keys: Tensor | PreparedKeys,
        history: Tensor,
        values: Tensor | None = None,
        **options: Any,
    ) -> Attended:
        """query [B, query_size], keys [B, S, key_size] or prepared, history [B, C, S] -> context, weights [B, S]."""
        projected, values, options = project(self.key_proj, query, keys, values, options)
        return functional.location_attention(
            self.query_proj(query),
            projected,
            self.v,
            history,
            self.conv.weight,
            self.feature_proj.weight,
            values,
            history_gradient=self.history_gradient,
            weighting=self.current_weighting(),
            **options,
        )

    def extra_repr(self) -> str:
        return self._repr(self.query_size, self.key_size, self.attention_size, f"cumulative={self.cumulative}")


class CoverageAttention(ProjectedAttention):
    """Coverage attention: the sum of earlier weights counts in the score (See, Liu, Manning, 2017; Tu et al., 2016).

    Args:
        query_size, key_size: features of queries and keys.
        attention_size: features they are projected to, A.
        most_fertile: with a number, weights are divided by a fertility up to it, learned from the keys, before they
            join the coverage (Tu et al.'s linguistic form).
        weighting: see `seqattn_kernels.functional.Weighting`.

    Parameters: ``query_proj.weight`` [A, query_size], ``query_proj.bias`` [A], ``key_proj.weight`` [A, key_size],
    ``coverage_weight`` [A], ``v`` [A], and ``fertility_weight`` [key_size] where asked for.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        bias: bool = True,
        most_fertile: float | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        super().__init__(query_size, key_size, attention_size, bias, False, device, dtype, weighting)
        self.most_fertile = most_fertile
        self.coverage_weight = uniform(attention_size, fan_in=1, device=device, dtype=dtype)
        self.fertility_weight = (
            None if most_fertile is None else uniform(key_size, fan_in=key_size, device=device, dtype=dtype)
        )

    def initial(self, keys: Tensor) -> Tensor:
        """The coverage before the first step, zeros [B, S]; keys [B, S, ..] give sizes, device and dtype."""
        return keys.new_zeros(keys.shape[:2])

    def fertility(self, keys: Tensor) -> Tensor:
        """How many target words each key stands for, [B, S]; ones where that is not learned."""
        if self.fertility_weight is None or self.most_fertile is None:
            return keys.new_ones(keys.shape[:2])
        return functional.fertility(keys, self.fertility_weight, self.most_fertile)

    def next_coverage(self, coverage: Tensor, weights: Tensor, fertility: Tensor | None = None) -> Tensor:
        """The coverage [B, S] after a step with these weights [B, S]; fertility [B, S] from `fertility`."""
        return coverage + (weights if fertility is None else weights / fertility)

    def forward(
        self,
        query: Tensor,
        keys: Tensor | PreparedKeys,
        coverage: Tensor,
        values: Tensor | None = None,
        **options: Any,
    ) -> Attended:
        """query [B, query_size], keys [B, S, key_size] or prepared, coverage [B, S] -> context, weights [B, S]."""
        projected, values, options = project(self.key_proj, query, keys, values, options)
        return functional.coverage_attention(
            self.query_proj(query),
            projected,
            self.v,
            coverage,
            self.coverage_weight,
            values,
            weighting=self.current_weighting(),
            **options,
        )


class LocalAttention(Attention):
    """Local attention (Luong, Pham, Manning, 2015) with general scores ``query @ weight @ key`` in a window.

    Args:
        query_size, key_size: features of queries and keys.
        window: D; keys within D of the position are attended to.
        attention_size: A of the network that predicts the position (local-p); None: the caller gives it (local-m).
        weighting: see `seqattn_kernels.functional.Weighting`.

    Parameters: ``weight`` [query_size, key_size]; local-p: ``position_weight`` [A, query_size], ``position_v`` [A].
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        window: float,
        attention_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        super().__init__(weighting)
        self.query_size, self.key_size, self.window = query_size, key_size, window
        self.weight = uniform(query_size, key_size, fan_in=key_size, device=device, dtype=dtype)
        self.position_weight = self.position_v = None
        if attention_size is not None:
            self.position_weight = uniform(attention_size, query_size, fan_in=query_size, device=device, dtype=dtype)
            self.position_v = uniform(attention_size, fan_in=attention_size, device=device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        position: Tensor | None = None,
        values: Tensor | None = None,
        **options: Any,
    ) -> Attended:
        """query [B, query_size] or [B, T, query_size], keys [B, S, key_size] -> context, weights.

        position: [B] or [B, T], floating: where local-m looks; not to be given where the module predicts it.
        """
        if (position is None) == (self.position_weight is None):
            expected = "a tensor (the module predicts none)" if position is None else "None (the module predicts it)"
            raise ValueError(f"position: expected {expected}, got {'None' if position is None else 'a tensor'}")
        predicted = self.position_weight is not None and self.position_v is not None
        if self.position_weight is not None and self.position_v is not None:
            position = functional.predict_position(
                query, self.position_weight, self.position_v, keys.shape[1], options.get("lengths")
            )
        return functional.local_attention(
            query @ self.weight,
            keys,
            position,  # type: ignore[arg-type]
            self.window,
            values,
            gaussian=predicted,
            weighting=self.current_weighting(),
            **options,
        )

    def extra_repr(self) -> str:
        return self._repr(self.query_size, self.key_size, f"window={self.window}")


class MonotonicAttention(nn.Module):
    """Monotonic attention (Raffel et al., 2017): expected alignment when training, hard alignment otherwise.

    Energies are ``scale * v / |v| . tanh(query_proj(query) + key_proj(keys)) + score_bias``.

    Args:
        query_size, key_size: features of queries and keys.
        attention_size: features they are projected to, A.
        noise: deviation of the noise on the energies in training.
        initial_bias: of the score; below 0, so that attention moves on at first.

    Parameters: ``query_proj.weight`` [A, query_size], ``query_proj.bias`` [A], ``key_proj.weight`` [A, key_size],
    ``v`` [A], ``scale`` [], ``score_bias`` [].
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        noise: float = 1.0,
        initial_bias: float = -4.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size, self.attention_size = query_size, key_size, attention_size
        self.noise = noise
        self.query_proj = nn.Linear(query_size, attention_size, bias=bias, device=device, dtype=dtype)
        self.key_proj = nn.Linear(key_size, attention_size, bias=False, device=device, dtype=dtype)
        self.v = uniform(attention_size, fan_in=attention_size, device=device, dtype=dtype)
        self.scale = nn.Parameter(torch.full((), attention_size**-0.5, device=device, dtype=dtype))
        self.score_bias = nn.Parameter(torch.full((), initial_bias, device=device, dtype=dtype))

    def prepare_keys(self, keys: Tensor) -> PreparedKeys:
        """Keys [B, S, key_size] projected once for all steps, which then need ``values``."""
        return PreparedKeys.unpacked(self.key_proj(keys))

    def forward(
        self,
        query: Tensor,
        keys: Tensor | PreparedKeys,
        values: Tensor | None = None,
        previous: Tensor | None = None,
        *,
        mode: str | None = None,
        **options: Any,
    ) -> Attended:
        """query [B, query_size] with the weights of the step before, or all steps [B, T, query_size], in order.

        mode: "expected" or "hard"; by default the first when training, else the second.
        """
        projected, values, options = project(self.key_proj, query, keys, values, options)
        return functional.monotonic_attention(
            self.query_proj(query),
            projected,
            self.scale * F.normalize(self.v, dim=0),
            values,
            previous,
            score_bias=self.score_bias,
            mode=mode or ("expected" if self.training else "hard"),
            noise=self.noise if self.training else 0.0,
            **options,
        )

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.key_size}, {self.attention_size}, noise={self.noise}"
