"""Attention as functions: scores, masked softmax over the source, context.

All take query [B, Q] (one decoder step) or [B, T, Q], keys [B, S, K] and values [B, S, D] (the keys by default), and
return the context [B, D] or [B, T, D] and the weights [B, S] or [B, T, S].
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels import backends, native, ops, reference
from seqattn_kernels.reference.attention import attended, masked_softmax, without_unattended

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)


class PreparedKeys:
    """What `prepare_keys` made of keys: a snapshot, for as many calls as one likes.

    Forward reads the snapshot alone. Gradients flow to `keys`, which must not have been changed in place since.
    """

    __slots__ = ("_version", "keys", "packed", "shape", "wide")

    def __init__(self, keys: Tensor, packed: Tensor | None, wide: Tensor) -> None:
        self.keys = keys
        self.wide = wide  # keys in the precision of the kernels
        self.packed = packed
        self.shape = keys.shape
        # Traced code and inference tensors keep no count of changes.
        counted = not torch.compiler.is_compiling() and not keys.is_inference()
        self._version = keys._version if counted else None

    def select(self, index: Tensor) -> PreparedKeys:
        """The prepared keys of the rows ``index`` [N], in that order, as beam search reorders them."""
        packed = None if self.packed is None else self.packed.index_select(0, index)
        wide = self.wide.index_select(0, index)
        return PreparedKeys(wide if self.keys is self.wide else self.keys.index_select(0, index), packed, wide)

    def check_unchanged(self) -> None:
        if self._version is not None and self.keys._version != self._version:
            raise RuntimeError(
                f"keys: changed in place since prepare_keys (version {self._version}, now {self.keys._version}); "
                "gradients need them as they were. Prepare them again"
            )


def prepare_keys(keys: Tensor, *, backend: str | None = None) -> PreparedKeys:
    """Keys [B, S, A] made ready for `additive_attention`, for decoders that attend to the same keys step after step.

    Exponentials and layout are computed here, once. The result is a snapshot: a later change of `keys` doesn't show in
    a call that needs no gradient, and one that does raises RuntimeError when they were changed in place. Calls
    differentiate with respect to `keys` as if they had been given themselves.
    """
    _expect_rank("keys", keys, "[B, S, A]", 3)
    wide = keys if keys.dtype in _WIDE else keys.float()
    packed = None
    if _backend(wide, None, backend) == "cpu":
        packed = ops.attention.pack_keys(wide)
    elif not keys.requires_grad:
        keys = wide = wide.clone()
    return PreparedKeys(keys, packed, wide)


def additive_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    v: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Additive attention (Bahdanau, Cho, Bengio, 2014): scores ``sum_a v[a] * tanh(query[a] + keys[a] + bias[a])``.

    Args:
        query: [B, A] or [B, T, A], already projected.
        keys: [B, S, A], already projected, or what `prepare_keys` made of them.
        v: [A].
        values: [B, S, D]; the keys by default.
        bias: [A], optional.
        lengths: integer tensor [B] on any device, zeros allowed: only the first ``lengths[b]`` keys are attended to.
        mask: [B, S], [B, 1, S] or [B, T, S]: boolean, True where to attend; or floating, added to the scores, -inf
            where not to attend. Together with ``lengths``, both hold.
        need_weights: False returns None for the weights.
        backend: "cpu" or "reference"; None chooses.

    Returns:
        context [B, D] or [B, T, D], and weights [B, S] or [B, T, S] (differentiable). A query that may attend to
        nothing (length 0, all masked, S = 0) gets zero weights and a zero context. What stands at positions no query
        attends to, NaN included, changes nothing. float32 and float64 compute in their own precision, bfloat16 and
        float16 in float32; results have the dtype of the query.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or type; the message names it.
        RuntimeError: ``backend`` was asked for by name and can't serve.
    """
    packed = prepared = None
    if isinstance(keys, PreparedKeys):
        prepared = keys
        keys, packed = prepared.keys, prepared.packed
        if torch.is_grad_enabled() or packed is None:
            prepared.check_unchanged()
    if values is None:
        values = keys
    if (
        backend is None
        and bias is None
        and (mask is None or not mask.requires_grad)
        and query.dtype in _WIDE
        and native.why_not() is None
        and not torch.compiler.is_compiling()
    ):
        # The operator looks at everything itself; what it refuses is looked at below, to convert it or to say why.
        try:
            context, weights = ops.attention.additive(query, keys, packed, values, v, lengths, mask, need_weights)
        except (RuntimeError, TypeError):
            pass
        else:
            return context, weights if need_weights else None
    shape = query.shape
    single = len(shape) == 2
    if not (
        (single or len(shape) == 3)
        and keys.dim() == 3
        and values.dim() == 3
        and shape[0] == keys.shape[0]
        and shape[-1] == keys.shape[2]
        and values.shape[:2] == keys.shape[:2]
        and v.shape == shape[-1:]
    ):
        _explain(query, keys, values, v)
    dtype = query.dtype
    if not dtype == keys.dtype == values.dtype == v.dtype or dtype not in _WIDE:
        _expect_floats(query=query, keys=keys, values=values, v=v)
        if prepared is not None:
            keys = prepared.wide
        query, keys, values, v = (t if t.dtype == torch.float64 else t.float() for t in (query, keys, values, v))
    if bias is not None:
        if bias.shape != v.shape:
            raise ValueError(f"bias: expected [A] with A={v.shape[0]} (from v), got {list(bias.shape)}")
        query = query + bias.to(query.dtype)
    if lengths is not None or mask is not None:
        lengths, mask = _check_masks(query, keys, lengths, mask)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
    if _backend(query, mask, backend) == "cpu":
        if not query.device == keys.device == values.device == v.device:
            _expect_devices(query, keys=keys, values=values, v=v)
        context, weights = ops.attention.additive(query, keys, packed, values, v, lengths, mask, need_weights)
    else:
        _expect_devices(query, keys=keys, values=values, v=v)
        _check_lengths(lengths, keys)
        context, weights = reference.attention.additive_attention(
            query.unsqueeze(1) if single else query, keys, values, v, lengths, mask
        )
        if single:
            context, weights = context.squeeze(1), weights.squeeze(1)
    if context.dtype != dtype:
        context, weights = context.to(dtype), weights.to(dtype)
    return context, weights if need_weights else None


def concat_attention(
    query: Tensor,
    keys: Tensor,
    weight: Tensor,
    v: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Attention with scores ``v . tanh(weight [query; key] + bias)`` (Luong, Pham, Manning, 2015, "concat").

    The linear map of the pair is a sum of one of the query and one of the key, so this is `additive_attention` after
    two small projections.

    Args:
        query: [B, Q] or [B, T, Q].
        keys: [B, S, K].
        weight: [A, Q + K], the query's columns first.
        v: [A].
        bias: [A], optional.
        values, lengths, mask, need_weights, backend: as in `additive_attention`, and so are the results.
    """
    _expect_rank("query", query, "[B, Q] or [B, T, Q]", 2, 3)
    _expect_rank("keys", keys, "[B, S, K]", 3)
    values = keys if values is None else values
    keys = attended_keys(query, keys, lengths, mask)
    width = query.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width + keys.shape[2]:
        raise ValueError(
            f"weight: expected [A, Q + K] with Q={width} (from query), K={keys.shape[2]} (from keys), "
            f"got {list(weight.shape)}"
        )
    return additive_attention(
        F.linear(query, weight[:, :width], bias),
        F.linear(keys, weight[:, width:]),
        v,
        values,
        lengths=lengths,
        mask=mask,
        need_weights=need_weights,
        backend=backend,
    )


def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    scale: float | bool | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, Any]:
    """Dot-product attention (Luong, Pham, Manning, 2015): scores ``scale * (query . keys)``.

    Args:
        query: [B, K] or [B, T, K].
        keys: [B, S, K].
        scale: a number; True for 1 / sqrt(K) (Vaswani et al., 2017); None for 1.
        values, lengths, mask, need_weights: as in `additive_attention`, and so are the results. Computed by torch's
            matrix products, and without weights or masks by its ``scaled_dot_product_attention``.
    """
    values = keys if values is None else values
    _expect_rank("query", query, "[B, K] or [B, T, K]", 2, 3)
    if not (
        keys.dim() == 3
        and values.dim() == 3
        and query.shape[0] == keys.shape[0]
        and query.shape[-1] == keys.shape[2]
        and values.shape[:2] == keys.shape[:2]
    ):
        _explain(query, keys, values)
    if not query.dtype == keys.dtype == values.dtype:
        _expect_floats(query=query, keys=keys, values=values)
    _expect_devices(query, keys=keys, values=values)
    if lengths is not None or mask is not None:
        lengths, mask = _check_masks(query, keys, lengths, mask)
        _check_lengths(lengths, keys)
    factor = query.shape[-1] ** -0.5 if scale is True else 1.0 if scale is None or scale is False else scale
    single = query.dim() == 2
    if single:
        query = query.unsqueeze(1)
    attend = attended(keys, lengths, mask)
    weights: Tensor | None = None
    if not need_weights and attend is None and keys.shape[1]:
        context = F.scaled_dot_product_attention(query, keys, values, scale=factor)
    else:
        if attend is not None:
            keys, values = without_unattended(keys, attend), without_unattended(values, attend)
        if factor == 1.0:
            scores = torch.bmm(query, keys.transpose(1, 2))
        else:
            scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=factor)
        weights = masked_softmax(scores, attend, mask)
        context = torch.bmm(weights.to(values.dtype), values)
    if single:
        return context.squeeze(1), weights.squeeze(1) if need_weights and weights is not None else None
    return context, weights if need_weights else None


def general_attention(
    query: Tensor,
    keys: Tensor,
    weight: Tensor,
    values: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
) -> tuple[Tensor, Any]:
    """Bilinear attention (Luong, Pham, Manning, 2015, "general"): scores ``query @ weight @ key``, weight [Q, K].

    Args:
        query: [B, Q] or [B, T, Q].
        keys: [B, S, K].
        values, lengths, mask, need_weights: as in `additive_attention`, and so are the results. The shorter of query
            and keys is projected.
    """
    _expect_rank("query", query, "[B, Q] or [B, T, Q]", 2, 3)
    _expect_rank("keys", keys, "[B, S, K]", 3)
    if weight.shape != (query.shape[-1], keys.shape[2]):
        raise ValueError(
            f"weight: expected [Q, K] with Q={query.shape[-1]} (from query), K={keys.shape[2]} (from keys), "
            f"got {list(weight.shape)}"
        )
    values = keys if values is None else values
    steps = query.shape[1] if query.dim() == 3 else 1
    if steps <= keys.shape[1]:
        query = query @ weight
    else:
        keys = F.linear(attended_keys(query, keys, lengths, mask), weight)
    return dot_attention(query, keys, values, lengths=lengths, mask=mask, need_weights=need_weights)


def feature_attention(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reduce: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over time for each feature: ``weights = softmax(tanh(linear(input)), dim=1)``, result weights * input.

    Args:
        input: [B, S, D], states of an encoder.
        weight: [D, D]; bias: [D] or None: those of the linear layer.
        lengths: integer tensor [B] on any device, zeros allowed.
        mask: boolean [B, S], True where to attend.
        reduce: sum over time.

    Returns:
        weights * input [B, S, D], or its sum over time [B, D]; weights [B, S, D]. Both are zero where not attended to.
    """
    _expect_rank("input", input, "[B, S, D]", 3)
    width = input.shape[2]
    if weight.shape != (width, width):
        raise ValueError(f"weight: expected [D, D] with D={width} (from input), got {list(weight.shape)}")
    attend = None
    if lengths is not None or mask is not None:
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        if mask is not None and mask.shape != input.shape[:2]:
            raise ValueError(
                f"mask: expected [B, S] with B={input.shape[0]}, S={input.shape[1]} (from input), "
                f"got {list(mask.shape)}"
            )
        lengths, mask = _check_masks(input, input, lengths, mask)
        _check_lengths(lengths, input)
        attend = attended(input, lengths, mask)
        assert attend is not None
        attend = attend.transpose(1, 2)
    result, weights = reference.attention.feature_attention(input, weight, bias, attend)
    return result.sum(1) if reduce else result, weights


def attended_keys(query: Tensor, keys: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """keys with zeros where no query attends, before a projection: its gradient multiplies them by zero, and 0 * NaN
    is NaN."""
    if lengths is None and mask is None:
        return keys
    lengths, mask = _check_masks(query, keys, lengths, mask)
    return without_unattended(keys, attended(keys, lengths, mask))


def _backend(t: Tensor, mask: Tensor | None, wish: str | None) -> str:
    request = backends.AttentionRequest(t.device, t.dtype, mask is not None and mask.requires_grad)
    return backends.choose(backends.ATTENTION, request, wish)


def _expect_rank(name: str, t: Tensor, shape: str, *ranks: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(t).__name__}")
    if t.dim() not in ranks:
        raise ValueError(f"{name}: expected {shape}, got {list(t.shape)}")


def _expect_floats(**tensors: Tensor) -> None:
    """All floating and of one dtype; under autocast, where linear layers return another than they were given, any."""
    mixed = len({t.dtype for t in tensors.values()}) > 1
    first = next(iter(tensors))
    for name, t in tensors.items():
        if t.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
        if mixed and t.dtype != tensors[first].dtype and not torch.is_autocast_enabled(t.device.type):
            raise TypeError(f"{name}: expected {tensors[first].dtype} (from {first}), got {t.dtype}")


def _expect_devices(query: Tensor, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.device != query.device:
            raise ValueError(f"{name}: expected device {query.device} (from query), got {t.device}")


def _explain(query: Tensor, keys: Tensor, values: Tensor, v: Tensor | None = None) -> NoReturn:
    """Says which shape is wrong."""
    _expect_rank("query", query, "[B, A] or [B, T, A]", 2, 3)
    _expect_rank("keys", keys, "[B, S, A]", 3)
    _expect_rank("values", values, "[B, S, D]", 3)
    if v is not None:
        _expect_rank("v", v, "[A]", 1)
        if v.shape[0] != query.shape[-1]:
            raise ValueError(f"v: expected [A] with A={query.shape[-1]} (from query), got {list(v.shape)}")
    batch, width = query.shape[0], query.shape[-1]
    if keys.shape[0] != batch or keys.shape[2] != width:
        raise ValueError(f"keys: expected [B, S, A] with B={batch}, A={width} (from query), got {list(keys.shape)}")
    raise ValueError(
        f"values: expected [B, S, D] with B={batch}, S={keys.shape[1]} (from keys), got {list(values.shape)}"
    )


def _check_masks(
    query: Tensor, keys: Tensor, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The masks on the query's device, of the right shape and type."""
    batch, source = keys.shape[0], keys.shape[1]
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths: expected a tensor, got {type(lengths).__name__}")
        if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths: expected [B] with B={batch} (from keys), got {list(lengths.shape)}")
        if lengths.dtype != torch.int64 or lengths.device != query.device:
            lengths = lengths.to(query.device, torch.int64)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool and mask.dtype not in _FLOATS:
            raise TypeError(f"mask: expected torch.bool (True: attend) or a floating dtype, got {mask.dtype}")
        steps = query.shape[1] if query.dim() == 3 else 1
        shapes = [(batch, source), (batch, 1, source), (batch, steps, source)]
        if mask.shape not in shapes:
            raise ValueError(
                f"mask: expected [B, S], [B, 1, S] or [B, T, S] with B={batch}, T={steps}, S={source}, "
                f"got {list(mask.shape)}"
            )
        if mask.device != query.device:
            raise ValueError(f"mask: expected device {query.device} (from query), got {mask.device}")
    return lengths, mask


def _check_lengths(lengths: Tensor | None, keys: Tensor) -> None:
    """Values of lengths, where looking at them needs no wait for a device; the kernels look themselves."""
    if lengths is None or torch.compiler.is_compiling() or lengths.device.type != "cpu":
        return
    source = keys.shape[1]
    wrong = (lengths < 0) | (lengths > source)
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ValueError(
            f"lengths: expected values in [0, {source}] (S of keys), got {int(lengths[place])} at [{place}]"
        )
