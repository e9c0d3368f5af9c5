"""Attention without a query, as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seqattn_kernels import functional
from seqattn_kernels.functional import Weighting
from seqattn_kernels.nn.attention import Attended, Attention, uniform


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

    def forward(self, input: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
        """input [B, S, input_size] -> weights * input (or its sum over time), weights [B, S, input_size].

        masks: lengths, mask, mask_polarity, as in `seqattn_kernels.functional.feature_attention`.
        """
        return functional.feature_attention(input, self.linear.weight, self.linear.bias, reduce=self.reduce, **masks)


class PoolingAttention(Attention):
    """Self-attentive pooling: scores ``v . tanh(linear(input))`` over time (Yang et al., 2016; Lin et al., 2017).

    Args:
        input_size: features of the input.
        attention_size: features they are projected to, A.
        rows: poolings at once, R; None for one, without a dimension.
        weighting: see `seqattn_kernels.functional.Weighting`.

    Parameters: ``linear.weight`` [A, input_size], ``linear.bias`` [A], ``v`` [A] or [R, A].
    """

    def __init__(
        self,
        input_size: int,
        attention_size: int,
        rows: int | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting | str | None = None,
    ) -> None:
        super().__init__(weighting)
        self.linear = nn.Linear(input_size, attention_size, bias=bias, device=device, dtype=dtype)
        shape = (attention_size,) if rows is None else (rows, attention_size)
        self.v = uniform(*shape, fan_in=attention_size, device=device, dtype=dtype)

    def forward(self, input: Tensor, values: Tensor | None = None, **options: Any) -> Attended:
        """input [B, S, input_size] -> pooled [B, D] or [B, R, D], weights [B, S] or [B, R, S]."""
        return functional.pooling_attention(
            input,
            self.linear.weight,
            self.v,
            values,
            bias=self.linear.bias,
            weighting=self.current_weighting(),
            **options,
        )
