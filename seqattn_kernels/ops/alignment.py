"""The operator of monotonic alignment: fake kernels, autograd, and what Python calls."""

from __future__ import annotations

import torch
from torch import Tensor

from seqattn_kernels import reference
from seqattn_kernels.ops import attention_cuda
from seqattn_kernels.ops.autograd import apply_function, needs_gradients
from seqattn_kernels.ops.fakes import register_fake


def _register_fakes() -> None:
    @register_fake("seqattn::monotonic_fwd")
    def _(choose, previous):
        return choose.new_empty(choose.shape)

    @register_fake("seqattn::monotonic_bwd")
    def _(choose, previous, weights, d_weights):
        return choose.new_empty(choose.shape), choose.new_empty(previous.shape)


if attention_cuda.declared():
    _register_fakes()


class MonotonicFunction(torch.autograd.Function):
    """Saves its inputs and the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(choose, previous):
        return torch.ops.seqattn.monotonic_fwd.default(choose, previous)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, d_weights):
        choose, previous, weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            given = [choose.view_as(choose), previous.view_as(previous)]
            again = reference.alignment.monotonic_alignment(given[0], given[1])
            wanted = [t for t, need in zip(given, needs, strict=True) if need]
            found = iter(torch.autograd.grad(again, wanted, d_weights, create_graph=True))
            return tuple(next(found) if need else None for need in needs)
        d_choose, d_previous = torch.ops.seqattn.monotonic_bwd.default(choose, previous, weights, d_weights)
        return d_choose if needs[0] else None, d_previous if needs[1] else None


def monotonic(choose: Tensor, previous: Tensor) -> Tensor:
    """`seqattn_kernels.reference.alignment.monotonic_alignment` by one operator: float32 or, on the CPU, float64."""
    if needs_gradients(choose, previous):
        return apply_function(MonotonicFunction, choose, previous)
    return torch.ops.seqattn.monotonic_fwd.default(choose, previous)
