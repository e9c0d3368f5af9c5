"""Why we lose where we lose, as far as it was found out. Tables and reports put it beside the loss."""

from __future__ import annotations

import re

# A pattern over "contestant in case" and the reason; the first that matches counts.
REASONS: tuple[tuple[str, str], ...] = (
    (
        r"ours_context in dot/.*,T1,",
        "torch's fused attention is slower than its parts for single queries; measured before we chose the parts there",
    ),
    (r"ours in dot/.*,T1,", "the same two products and softmax as stock's, and the checks before them"),
    (
        r"ours in decoder/.*forward\+backward.*/bfloat16",
        "training is composed a step at a time, and the host can't start kernels as fast as they run",
    ),
    (
        r"ours in additive/.*forward\+backward.*,T1,.*/bfloat16",
        "a small problem: the time is that of starting the kernels of backward, and of summing in float32",
    ),
)


def reason(contestant: str, case: str) -> str:
    """Why ``contestant`` is slower than stock in ``case``; says so where nobody knows yet."""
    where = f"{contestant} in {case}"
    return next((text for pattern, text in REASONS if re.search(pattern, where)), "reason not found out yet")
