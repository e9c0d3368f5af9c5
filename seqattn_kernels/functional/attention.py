"""Additive attention and its relatives as functions: scores, masked softmax over the source, context.

All take query [B, Q] (one decoder step) or [B, T, Q], keys [B, S, K] and values [B, S, D] (the keys by default), and
return the context [B, D] or [B, T, D] and the weights [B, S] or [B, T, S].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqattn_kernels import native, ops
from seqattn_kernels.functional.arguments import (
    WIDE,
    expect_devices,
    expect_floats,
    expect_rank,
    expect_shape,
    explain_shapes,
)
from seqattn_kernels.functional.masks import attended_keys, resolve_masks
from seqattn_kernels.functional.scoring import attend
from seqattn_kernels.functional.weighting import Weighting, choose_backend, computed_wide, each_head, weighting_of
from seqattn_kernels.ops.autograd import forward_mode


class PreparedKeys:
    """What `prepare_keys` made of keys: a snapshot, for as many calls as one likes.

    Forward reads the snapshot alone. Gradients flow to `keys`, which must not have been changed in place since.
    """

    __slots__ = ("_version", "heads", "keys", "packed", "shape", "wide")

    def __init__(self, keys: Tensor, packed: Tensor | None, wide: Tensor, heads: int = 1) -> None:
        self.keys = keys
        self.wide = wide  # keys in the precision of the kernels
        self.packed = packed
        self.shape = keys.shape
        self.heads = heads  # folded into the batch of all three
        # Traced code and inference tensors keep no count of changes.
        counted = not torch.compiler.is_compiling() and not keys.is_inference()
        self._version = keys._version if counted else None

    @classmethod
    def unpacked(cls, keys: Tensor) -> PreparedKeys:
        """Keys [B, S, A] as they are, for scores with a term besides query and key: exponentials are no use there."""
        return cls(keys, None, keys if keys.dtype in WIDE else keys.float())

    def select(self, index: Tensor) -> PreparedKeys:
        """The prepared keys of the rows ``index`` [N], in that order, as beam search reorders them."""
        if self.heads > 1:
            index = (index.unsqueeze(1) * self.heads + torch.arange(self.heads, device=index.device)).flatten()
        packed = None if self.packed is None else self.packed.index_select(0, index)
        wide = self.wide.index_select(0, index)
        keys = wide if self.keys is self.wide else self.keys.index_select(0, index)
        return PreparedKeys(keys, packed, wide, self.heads)

    def check_unchanged(self) -> None:
        if self._version is not None and self.keys._version != self._version:
            raise RuntimeError(
                f"keys: changed in place since prepare_keys (version {self._version}, now {self.keys._version}); "
                "gradients need them as they were. Prepare them again"
            )


def prepare_keys(keys: Tensor, *, heads: int = 1, backend: str | None = None) -> PreparedKeys:
    """Keys [B, S, A] made ready for `additive_attention`, for decoders that attend to the same keys step after step.

    Exponentials and layout are computed here, once. The result is a snapshot: a later change of `keys` doesn't show in
    a call that needs no gradient, and one that does raises RuntimeError when they were changed in place. Calls
    differentiate with respect to `keys` as if they had been given themselves.

    heads: for `multi_head_additive_attention`, keys [B, S, heads * A].
    """
    expect_rank("keys", keys, "[B, S, A]", 3)
    if heads != 1:
        keys = fold_heads("keys", keys, heads)
    name, packed = choose_backend(keys, backend), None
    wide = keys.float() if computed_wide(keys, name) else keys
    if name == "cpu":
        packed = ops.attention.pack_keys(wide)
    elif not keys.requires_grad:
        keys = wide = wide.clone()
    return PreparedKeys(keys, packed, wide, heads)


def additive_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    v: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    score_bias: Tensor | float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    weighting: Weighting | str | None = None,
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
        score_bias: a number or a tensor without dimensions, added to the scores. No softmax depends on it (its gradient
            is then zero), a sigmoid does.
        lengths: tensor [B] on any device: only the first ``lengths[b]`` keys are attended to. Integers, zeros allowed;
            or floating fractions of S, as SpeechBrain has them, rounded to whole keys.
        mask: [B, S], [B, 1, S] or [B, T, S]: boolean, True where to attend; or floating, added to the scores, -inf
            where not to attend. Together with ``lengths``, both hold.
        mask_polarity: "ignore" where True of a boolean mask hides a key instead, as in torch's ``key_padding_mask``.
        causal: query t attends to keys 0 to t alone.
        weighting: another normalizer than softmax by its name, or a `Weighting`: temperature, dropout, fill and so on.
        need_weights: False returns None for the weights.
        backend: "cpu" or "reference"; None chooses.

    Returns:
        context [B, D] or [B, T, D], and weights [B, S] or [B, T, S] (differentiable). A query that may attend to
        nothing (length 0, all masked, S = 0) gets zero weights and a zero context. What stands at positions no query
        attends to, NaN included, changes nothing; at positions that one query doesn't attend to, nothing of that
        query's, nor gradients through it (of the backend "reference" only the first holds). float32 and float64 compute
        in their own precision, bfloat16 and float16 in float32; results have the dtype of the query.

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
        and weighting is None
        and score_bias is None
        and not causal
        and (mask is None or not (mask.requires_grad or mask_polarity == "ignore"))
        and query.dtype in WIDE
        and native.why_not() is None
        and not forward_mode()
        and not torch.compiler.is_compiling()
    ):
        # The operator looks at everything itself; what it refuses is looked at below, to convert it or to say why.
        try:
            context, weights = ops.attention.additive(query, keys, packed, values, v, lengths, mask, need_weights)
        except (RuntimeError, TypeError, ValueError):
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
        explain_shapes(query, keys, values, v)
    expect_floats(query=query, keys=keys, values=values, v=v)
    expect_devices(query, keys=keys, values=values, v=v)
    if bias is not None:
        expect_shape("bias", bias, "[A]", {"A": v.shape[0]})
    lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity, causal)
    dtype = query.dtype
    if dtype not in WIDE and prepared is not None:
        keys = prepared.wide
    if bias is not None:
        query = (query if query.dtype in WIDE else query.float()) + bias
    chosen = weighting_of(weighting)
    if score_bias is not None and isinstance(score_bias, Tensor) and score_bias.dim():
        raise ValueError(f"score_bias: expected a number or a tensor [], got {list(score_bias.shape)}")
    found = attend(
        "additive",
        query.unsqueeze(1) if single else query,
        keys,
        v,
        values,
        lengths,
        mask,
        packed=packed,
        weighting=chosen,
        score_bias=score_bias,
        need_weights=need_weights,
        backend=backend,
    )
    return finish(*found, single, dtype)


def finish(context: Tensor, weights: Tensor | None, single: bool, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Results without the dimension of time where the query had none, in its dtype."""
    if single:
        context, weights = context.squeeze(1), None if weights is None else weights.squeeze(1)
    if context.dtype != dtype:
        context, weights = context.to(dtype), None if weights is None else weights.to(dtype)
    return context, weights


def fold_heads(name: str, t: Tensor, heads: int) -> Tensor:
    """[B, S, N * A] as [B * N, S, A]: heads become batch elements."""
    if heads < 1 or t.shape[-1] % heads:
        raise ValueError(f"{name}: expected a last dimension that N={heads} heads divide, got {list(t.shape)}")
    batch, source, width = t.shape
    return t.reshape(batch, source, heads, width // heads).transpose(1, 2).flatten(0, 1)


def multi_head_additive_attention(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    v: Tensor,
    values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    mask_polarity: str = "attend",
    causal: bool = False,
    weighting: Weighting | str | None = None,
    need_weights: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """Additive attention with N heads, each over its part of query, keys and values, in one operator.

    Args:
        query: [B, N * A] or [B, T, N * A].
        keys: [B, S, N * A], or ``prepare_keys(keys, heads=N)``.
        v: [N, A].
        values: [B, S, N * D]; the keys by default. Needed with prepared keys.
        bias: [N * A], optional.
        The others are as in `additive_attention`; masks hold for every head.

    Returns:
        context [B, N * D] or [B, T, N * D], weights [B, N, S] or [B, N, T, S].
    """
    expect_rank("v", v, "[N, A]", 2)
    heads, width = v.shape
    expect_rank("query", query, "[B, N * A] or [B, T, N * A]", 2, 3)
    if query.shape[-1] != heads * width:
        raise ValueError(f"query: expected a last dimension N * A = {heads * width} (from v), got {list(query.shape)}")
    packed = None
    if isinstance(keys, PreparedKeys):
        if keys.heads != heads:
            raise ValueError(f"keys: expected them prepared for N={heads} heads (from v), got {keys.heads}")
        if values is None:
            raise ValueError("values: expected [B, S, N * D] with prepared keys, got None")
        keys.check_unchanged()
        folded = keys.keys if keys.keys.dtype in WIDE else keys.wide
        packed = keys.packed
    else:
        expect_shape("keys", keys, "[B, S, N * A]", {"B": query.shape[0], "N * A": heads * width})
        values = keys if values is None else values
        folded = fold_heads("keys", keys, heads)
    batch, source = folded.shape[0] // heads, folded.shape[1]
    expect_shape("values", values, "[B, S, N * D]", {"B": batch, "S": source})
    if query.shape[0] != batch:
        raise ValueError(f"query: expected B={batch} (from keys), got {list(query.shape)}")
    if bias is not None:
        expect_shape("bias", bias, "[N * A]", {"N * A": heads * width})
    if packed is None:
        expect_floats(query=query, keys=folded, values=values, v=v)
    expect_devices(query, keys=folded, values=values, v=v)
    single, dtype = query.dim() == 2, query.dtype
    lengths, mask = resolve_masks(query, values, lengths, mask, mask_polarity, causal)
    lengths, mask = each_head(lengths, mask, heads)
    if bias is not None:
        query = (query if query.dtype in WIDE else query.float()) + bias
    context, weights = attend(
        "additive",
        fold_heads("query", query.unsqueeze(1) if single else query, heads),
        folded,
        v,
        fold_heads("values", values, heads),
        lengths,
        mask,
        packed=packed,
        weighting=weighting_of(weighting),
        need_weights=need_weights,
        backend=backend,
    )
    steps = context.shape[1]
    context = context.view(batch, heads, steps, -1).transpose(1, 2).reshape(batch, steps, values.shape[2])
    context, weights = finish(context, weights, False, dtype)
    if weights is not None:
        weights = weights.view(batch, heads, steps, source)
        weights = weights.squeeze(2) if single else weights
    return context.squeeze(1) if single else context, weights


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
    mask_polarity: str = "attend",
    causal: bool = False,
    weighting: Weighting | str | None = None,
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
        values, lengths, mask and the others: as in `additive_attention`, and so are the results.
    """
    expect_rank("query", query, "[B, Q] or [B, T, Q]", 2, 3)
    expect_rank("keys", keys, "[B, S, K]", 3)
    values = keys if values is None else values
    width = query.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width + keys.shape[2]:
        raise ValueError(
            f"weight: expected [A, Q + K] with Q={width} (from query), K={keys.shape[2]} (from keys), "
            f"got {list(weight.shape)}"
        )
    expect_devices(query, keys=keys, weight=weight)
    lengths, mask = resolve_masks(query, keys, lengths, mask, mask_polarity, causal)
    keys = attended_keys(keys, lengths, mask)
    return additive_attention(
        F.linear(query, weight[:, :width], bias),
        F.linear(keys, weight[:, width:]),
        v,
        values,
        lengths=lengths,
        mask=mask,
        weighting=weighting,
        need_weights=need_weights,
        backend=backend,
    )
