"""The table of scores: what one pair of a query and a key contributes, and its derivatives.

A score is ``score[t, s] = sum_a v[a] * forward(q[t, a], k[s, a])``. To add one, write the two functions and register
a record::

    @triton.jit
    def distance(q, k):
        return tl.abs(q - k)

    @triton.jit
    def distance_gradient(q, k):
        sign = tl.where(q > k, 1.0, -1.0)
        return sign, -sign

    register("distance", (distance, distance_gradient))

Functions get float32 blocks that broadcast against each other, and return float32 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


@dataclass(frozen=True)
class Score:
    """forward(q, k) is a term of the sum over a, gradient(q, k) its derivatives by q and by k.

    product: the term is q * k, so that the sum is a matrix product.
    exponential: the term is tanh(q + k), for which the kernels have a form with a third of the special functions.
    quick(q, k, TARGET) gives term and both derivatives to within a rounding of the largest term, however small the
    term itself, which is enough where a softmax follows; None: forward and gradient serve there too.
    """

    name: str
    forward: Any
    gradient: Any
    product: bool = False
    exponential: bool = False
    quick: Any = None


SCORES: dict[str, Score] = {}


def register(name: str, functions: tuple[Any, Any], **properties: Any) -> Score:
    """Adds a score to the table. functions: forward and gradient, see `Score`, which has the other properties too."""
    if name in SCORES:
        raise ValueError(f"name: expected one that is not taken, got {name!r}")
    SCORES[name] = Score(name, *functions, **properties)
    return SCORES[name]


@triton.jit
def tanh(x):
    """Within two roundings at any size of x; infinities and NaN as in eager."""
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    size = tl.abs(x)
    tail = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    return tl.where(size < 0.625, series * z * x + x, tl.where(x < 0, -tail, tail))


@triton.jit
def reciprocal(x, TARGET: tl.constexpr):
    """1 / x in one special function; x is finite, not zero and not subnormal."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    elif TARGET == "hip":
        return tl.inline_asm_elementwise("v_rcp_f32 $0, $1", "=v,v", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def rounded_product(x, y, TARGET: tl.constexpr):
    """x * y of float32, rounded before anything is added: where lanes hold copies of a sum, each would fuse its own
    product into it, and the copies would differ in the last bit."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        return x * y


@triton.jit
def additive(q, k):
    return tanh(q + k)


@triton.jit
def additive_gradient(q, k):
    term = tanh(q + k)
    slope = 1.0 - term * term
    return slope, slope


@triton.jit
def additive_quick(q, k, TARGET: tl.constexpr):
    term = 1.0 - 2.0 * reciprocal(1.0 + tl.exp2(2.8853900817779268 * (q + k)), TARGET)
    slope = 1.0 - term * term
    return term, slope, slope


# With Eq = e^2q and Ek = e^2k, tanh(q + k) = 1 - 2 / x where x = 1 + Eq * Ek. Reciprocals merge: for y = x / v,
# 1/y0 + 1/y1 = (y0 + y1) / (y0 * y1), and so on. Prepared queries hold Eq / v, so that y is one multiply-add. A merged
# sum of three elements takes eight operations of the multiply-add class and one special function, which keeps both
# units of an NVIDIA multiprocessor equally busy; of four, twelve and one. The caller sees to it that the product of
# four stays finite.
@triton.jit
def additive_merged3(q0, q1, q2, k0, k1, k2, c0, c1, c2, TARGET: tl.constexpr):
    """sum of v / x over three elements; q = Eq / v, c = 1 / v."""
    y0 = q0 * k0 + c0
    y1 = q1 * k1 + c1
    y2 = q2 * k2 + c2
    p = y0 * y1
    return ((y0 + y1) * y2 + p) * reciprocal(p * y2, TARGET)


@triton.jit
def additive_merged4(q0, q1, q2, q3, k0, k1, k2, k3, c0, c1, c2, c3, TARGET: tl.constexpr):
    y0 = q0 * k0 + c0
    y1 = q1 * k1 + c1
    y2 = q2 * k2 + c2
    y3 = q3 * k3 + c3
    p = y0 * y1
    r = y2 * y3
    return ((y0 + y1) * r + (y2 + y3) * p) * reciprocal(p * r, TARGET)


@triton.jit
def additive_bounded(q, k, c, TARGET: tl.constexpr):
    """v / x of one element, for any exponent: x is held below 2^31, which changes tanh by less than 1e-9."""
    v = 1.0 / c
    return v * reciprocal(tl.minimum(1.0 + q * v * k, 2147483648.0), TARGET)


# The derivative of tanh is 4 r (1 - r) with r = 1 / x. Where r is near 1, 1 - r has lost digits that (x - 1) r has.
@triton.jit
def additive_pair(x0, x1, TARGET: tl.constexpr):
    """1 / x of two elements, from one special function."""
    d = reciprocal(x0 * x1, TARGET)
    return d * x1, d * x0


@triton.jit
def additive_slope(part, sum_v, d, own, other, r, WITH_V: tl.constexpr, BOUNDED: tl.constexpr, PRECISE: tl.constexpr):
    """part + d * r (1 - r), sum_v + d * r, of own * other = x - 1. PRECISE: to the last bits of a small 1 - r; the
    factor `own` is then left to who has the whole sum, unless BOUNDED."""
    t = d * r
    if PRECISE:
        if BOUNDED:
            part += t * (tl.minimum(own * other, 2147483648.0) * r)
        else:
            part += t * (other * r)
    else:
        part += d * (r - r * r)
    if WITH_V:
        sum_v += t
    return part, sum_v


@triton.jit
def dot(q, k):
    return q * k


@triton.jit
def dot_gradient(q, k):
    return k, q


register("additive", (additive, additive_gradient), exponential=True, quick=additive_quick)
register("dot", (dot, dot_gradient), product=True)
