"""seqattn_kernels, in the forms a user can choose."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from benchmarks.peers import Entry, Peer
from benchmarks.problems import Problem


class Ours(Peer):
    """Our module in place of the stock one, weights free to change from call to call."""

    name = "ours"
    package = "seqattn_kernels"

    def installed(self) -> str | None:
        try:
            import seqattn_kernels  # noqa: F401
        except ImportError as error:
            return f"seqattn_kernels can't be imported: {error}"
        return None

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        module = problem.ours()
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call), module=module)


class OursFrozen(Ours):
    """Weights promised unchanged, so that they are packed once."""

    name = "ours_frozen"

    def why_not(self, problem: Problem) -> str | None:
        return "frozen weights have no gradients" if problem.case.mode.has_gradients else None

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        import seqattn_kernels

        module = problem.ours()
        stack.enter_context(seqattn_kernels.frozen(module))
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call), module=module)


class OursLengths(OursFrozen):
    """Padded input with ``lengths=`` in place of a packed sequence; weights frozen."""

    name = "ours_lengths"

    def why_not(self, problem: Problem) -> str | None:
        if problem.case.suite != "lengths":
            return "for variable lengths only"
        return super().why_not(problem) if problem.case.device == "cpu" else None

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        import seqattn_kernels

        module = problem.ours()
        if problem.case.device == "cpu":
            stack.enter_context(seqattn_kernels.frozen(module))
        call = problem.call(module, padded=True)
        return Entry(call, lambda: problem.outcome(module, call), module=module)


class OursBf16(OursFrozen):
    """Weights rounded to bfloat16 and frozen; input, state and sums stay in float32."""

    name = "ours_bf16"

    def prepare(self, problem: Problem, stack: ExitStack) -> Entry:
        import seqattn_kernels

        module = seqattn_kernels.accelerate(problem.stock(), frozen=True, weights=torch.bfloat16)
        call = problem.call(module)
        return Entry(call, lambda: problem.outcome(module, call), dtype=torch.bfloat16, module=module)


VARIANTS: tuple[Peer, ...] = (Ours(), OursFrozen(), OursLengths(), OursBf16())
