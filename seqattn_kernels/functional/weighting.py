"""From scores to weights to a context: masked softmax and its sparse relatives, temperature, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels import backends, native, ops, reference
from seqattn_kernels.functional.arguments import FLOATS, WIDE, expect_rank
from seqattn_kernels.functional.masks import resolve
from seqattn_kernels.ops.autograd import forward_mode
from seqattn_kernels.reference.attention import attended, without_unattended
from seqattn_kernels.reference.normalizers import NORMALIZERS


@dataclass(frozen=True, slots=True)
class Weighting:
    """How scores become weights: ``normalizer((scale * scores, masked) / temperature)``.

    Attributes:
        normalizer: "softmax"; "sparsemax" (Martins and Astudillo, 2016) and "entmax15" (Peters, Niculae, Martins,
            2019), which sum to 1 but leave most keys without weight; "sigmoid", each key by itself.
        scale: a factor before masks are added or filled in.
        temperature: a divisor after them.
        fill: what stands for the score of a key that lengths or a boolean mask hide. With a finite number hidden keys
            may keep a little weight, and what stands there then counts, as in the libraries that do so.
        empty_rows: "zeros": a query that may attend to nothing has zero weights; "eager": what the formula gives, NaN
            with a fill of -inf and equal weights with a finite one.
        dropout: the share of weights dropped on the way to the context, by torch's generator. The weights returned are
            those before. Modules drop in training mode alone.
    """

    normalizer: str = "softmax"
    scale: float = 1.0
    temperature: float = 1.0
    fill: float = -math.inf
    empty_rows: str = "zeros"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer: expected one of {sorted(NORMALIZERS)}, got {self.normalizer!r}")
        if self.empty_rows not in ("zeros", "eager"):
            raise ValueError(f"empty_rows: expected 'zeros' or 'eager', got {self.empty_rows!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: expected a number in [0, 1], got {self.dropout}")
        if math.isnan(self.fill) or self.fill == math.inf:
            raise ValueError(f"fill: expected a finite number or -inf, got {self.fill}")

    @property
    def is_softmax(self) -> bool:
        """Softmax that leaves masked keys and empty rows without weight, whatever its scale, temperature, dropout."""
        return self.normalizer == "softmax" and self.fill == -math.inf and self.empty_rows == "zeros"


SOFTMAX = Weighting()
_PLAIN = {kind: Weighting(kind) for kind in NORMALIZERS}


def _weighting(kind: str, scale: float, temperature: float, fill: float, empty_rows: str) -> Weighting:
    if scale == 1 and temperature == 1 and fill == -math.inf and empty_rows == "zeros":
        return _PLAIN[kind]  # making one takes longer than a row's softmax
    return Weighting(kind, scale, temperature, fill, empty_rows)


def weighting_of(given: Weighting | str | None) -> Weighting:
    if given is None:
        return SOFTMAX
    if isinstance(given, str):
        return Weighting(given)
    if not isinstance(given, Weighting):
        raise TypeError(f"weighting: expected a Weighting or the name of a normalizer, got {type(given).__name__}")
    return given


def choose_backend(t: Tensor, wish: str | None = None) -> str:
    """Who computes on tensors like this one."""
    return backends.choose(backends.ATTENTION, backends.AttentionRequest(t.device, t.dtype), wish)


def computed_wide(t: Tensor, backend: str) -> bool:
    """Whether halves are converted first: CPU kernels and the reference compute those in float32."""
    return backend in ("cpu", "reference") and t.dtype not in WIDE


def taken_as_given(t: Any, mask: Any, mask_polarity: str, backend: str | None) -> bool:
    """Whether a CPU operator gets its arguments as they are. It looks at everything itself; what it refuses is looked
    at again in Python, to convert it or to say why."""
    return (
        backend is None
        and isinstance(t, Tensor)
        and t.is_cpu
        and t.dtype in WIDE
        and (mask is None or (mask_polarity == "attend" and isinstance(mask, Tensor) and not mask.requires_grad))
        and native.why_not() is None
        and not torch.compiler.is_compiling()
        and not forward_mode()
    )


def normalize(
    weighting: Weighting,
    scores: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    compute: Callable[..., Tensor] = ops.scores.normalize,
) -> Tensor:
    """``compute`` of the scores and masks with the numbers of a weighting."""
    return compute(
        weighting.normalizer,
        scores,
        lengths,
        mask,
        float(weighting.scale),
        float(weighting.temperature),
        float(weighting.fill),
        weighting.empty_rows == "zeros",
    )


def weigh(
    scores: Tensor, lengths: Tensor | None, mask: Tensor | None, weighting: Weighting, backend: str | None = None
) -> Tensor:
    """Weights [B, T, S] of scores [B, T, S]; the masks are resolved ones."""
    name = choose_backend(scores, backend)
    dtype = scores.dtype
    if computed_wide(scores, name):
        scores = scores.float()
    if mask is not None and mask.dtype != torch.bool and mask.dtype != scores.dtype:
        mask = mask.to(scores.dtype)
    compute = reference.normalizers.normalize if name == "reference" else ops.scores.normalize
    weights = normalize(weighting, scores, lengths, mask, compute)
    return weights if weights.dtype == dtype else weights.to(dtype)


def products_of(
    query: Tensor, keys: Tensor, lengths: Tensor | None, mask: Tensor | None, factor: float = 1.0
) -> Tensor:
    """Scores [B, T, S], ``factor * query @ keys^T``: arbitrary numbers where the masks hide a key, as it may be one."""
    if (lengths is None and mask is None) or choose_backend(keys) == "reference":
        return ops.scores.plain_product(query, without_unattended(keys, attended(keys, lengths, mask)), factor)
    return ops.scores.product(query, keys, factor)


def context_of(
    weights: Tensor, values: Tensor, lengths: Tensor | None, mask: Tensor | None, weighting: Weighting
) -> Tensor:
    """Context [B, T, D] of weights [B, T, S], with dropout; values of keys without any weight may be anything."""
    dropped = F.dropout(weights, weighting.dropout) if weighting.dropout else weights
    dropped = dropped if dropped.dtype == values.dtype else dropped.to(values.dtype)
    if lengths is None and mask is None:
        return torch.bmm(dropped, values)
    if choose_backend(values) != "reference":
        return ops.scores.context(dropped, values)
    attend = attended(values, lengths, mask)
    if weighting.fill != -math.inf or weighting.empty_rows == "eager":
        assert attend is not None
        attend = attend | (weights != 0)
    return torch.bmm(dropped, without_unattended(values, attend))


def masked_softmax(
    scores: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    scale: float = 1.0,
    temperature: float = 1.0,
    fill: float = -math.inf,
    empty_rows: str = "zeros",
    backend: str | None = None,
) -> Tensor:
    """Softmax over the last dimension of masked scores, as one operator.

    Args:
        scores: [B, S], [B, T, S] or, with heads, [B, N, T, S]; floating. bfloat16 and float16 compute in float32.
        lengths: integer tensor [B] on any device: only the first ``lengths[b]`` keys count. A floating one holds
            fractions of S, as SpeechBrain has them, and is rounded to whole keys.
        mask: [B, S], [B, 1, S] or [B, T, S], for every head the same: boolean, or floating and added to the scores
            (-inf: hidden); its gradient is computed too.
        mask_polarity: what True of a boolean mask means: "attend", or "ignore" as torch's ``key_padding_mask``.
        causal: query t sees keys 0 to t alone.
        scale, temperature, fill, empty_rows: see `Weighting`.
        backend: "cpu" or "reference"; None chooses.

    Returns:
        weights, shaped as scores. NaN at a hidden position changes nothing.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or type; the message names it.
    """
    weighting = _weighting("softmax", scale, temperature, fill, empty_rows)
    return _normalized(weighting, scores, lengths, mask, mask_polarity, causal, backend)


def sparsemax(scores: Tensor, *, backend: str | None = None, **masks: Any) -> Tensor:
    """Sparsemax (Martins and Astudillo, 2016) of masked scores: the nearest point of the simplex.

    Arguments and results are those of `masked_softmax`. Exact: a threshold is found for each row without sorting.
    """
    return _sparse("sparsemax", scores, backend, **masks)


def entmax15(scores: Tensor, *, backend: str | None = None, **masks: Any) -> Tensor:
    """1.5-entmax (Peters, Niculae, Martins, 2019) of masked scores, between softmax and sparsemax.

    Arguments and results are those of `masked_softmax`.
    """
    return _sparse("entmax15", scores, backend, **masks)


def _sparse(
    kind: str,
    scores: Tensor,
    backend: str | None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    scale: float = 1.0,
    temperature: float = 1.0,
    fill: float = -math.inf,
    empty_rows: str = "zeros",
) -> Tensor:
    weighting = _weighting(kind, scale, temperature, fill, empty_rows)
    return _normalized(weighting, scores, lengths, mask, mask_polarity, causal, backend)


def _normalized(
    weighting: Weighting,
    scores: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    mask_polarity: str,
    causal: bool,
    backend: str | None,
) -> Tensor:
    if not causal and taken_as_given(scores, mask, mask_polarity, backend) and scores.dim() < 4:
        try:
            return normalize(weighting, scores, lengths, mask)
        except (RuntimeError, TypeError, ValueError):
            pass
    expect_rank("scores", scores, "[B, S], [B, T, S] or [B, N, T, S]", 2, 3, 4)
    if scores.dtype not in FLOATS:
        raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
    batch, source = scores.shape[0], scores.shape[-1]
    steps = scores.shape[-2] if scores.dim() > 2 else None
    lengths, mask = resolve(batch, steps, source, scores.device, lengths, mask, mask_polarity, causal)
    if scores.dim() == 3:
        return weigh(scores, lengths, mask, weighting, backend)
    if scores.dim() == 2:
        return weigh(scores.unsqueeze(1), lengths, mask, weighting, backend).squeeze(1)
    heads = scores.shape[1]
    lengths, mask = each_head(lengths, mask, heads)
    return weigh(scores.flatten(0, 1), lengths, mask, weighting, backend).view_as(scores)


def each_head(lengths: Tensor | None, mask: Tensor | None, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """The masks of every batch element once for each of its heads, which are folded into the batch."""
    if lengths is not None:
        lengths = lengths.repeat_interleave(heads)
    if mask is not None:
        mask = mask.repeat_interleave(heads, 0)
    return lengths, mask
