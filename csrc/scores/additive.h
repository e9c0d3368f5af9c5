#pragma once

#include "score.h"

namespace seqattn {

// score[t, s] = sum_a v[a] * tanh(q[t, a] + k[s, a])  (Bahdanau et al., 2014).
//
// With eq = e^2q and ek = e^2k, computed once per element of q and k, tanh(q + k) = 1 - 2 / x, x = 1 + eq * ek: one
// multiply-add and a division. The forms below rest on it:
//   - four divisions are merged into one; x is held below 2^31 so that the product of four stays finite (a larger x
//     changes tanh by less than 1e-9);
//   - a merged term is v0/x0 + .. + v3/x3 - (v0 + .. + v3)/2, that is, -1/2 of the sum of v * tanh: without the
//     constant, partial sums are as small as those of tanh itself, and so are their rounding errors.
// Where q and k are small, tanh(q + k) = (tq + tk) / (1 + tq * tk) from their tangents keeps digits that 1 - 2 / x
// loses. eq may overflow or vanish: tanh is then +-1 to the last bit, provided that |k| <= kLargestKey. Past it the sum
// q + k is needed (q = 60, k = -60), and keys are kept as they are.
struct Additive {
  static constexpr const char* kName = "additive";
  static constexpr int kMerged = 4;  // elements a merged division serves

  // Bounds by the element type: of |k| for the exponential form, of x in its merged form and of e in `reciprocal`;
  // and of |q|, |k| for the form of small arguments.
  template <class T>
  static constexpr T kLargestKey = sizeof(T) == 4 ? T(30) : T(300);
  template <class T>
  static constexpr T kMergedBound = sizeof(T) == 4 ? T(0x1p31) : T(0x1p250);
  template <class T>
  static constexpr T kBound = sizeof(T) == 4 ? T(0x1p126) : T(0x1p1022);
  static constexpr double kSmall = 1;

  template <class M, class V = typename M::Value>
  static SEQATTN_SCORE V forward(V q, V k) {
    return M::tanh(q + k);
  }
  template <class V>
  static SEQATTN_SCORE V gradient(V term) {
    return 1 - term * term;
  }

  // tanh(q + k) from tq = tanh(q), tk = tanh(k): exact to the last bits however small q and k are, for |q|, |k| <=
  // kSmall (past it 1 + tq * tk loses digits).
  template <class V>
  static SEQATTN_SCORE V forward_small(V tq, V tk) {
    return (tq + tk) / (1 + tq * tk);
  }

  // tanh(q + k) from the exponentials, any eq.
  template <class V>
  static SEQATTN_SCORE V forward_exp(V eq, V ek) {
    return 1 - 2 / (1 + eq * ek);
  }

  // -1/2 * sum_i v[i] * tanh(q[i] + k[i]) over four elements; half = -(v[0] + .. + v[3]) / 2, |v| <= 1.
  template <class M, class V = typename M::Value>
  static SEQATTN_SCORE V forward_merged(const V* eq, const V* ek, const V* v, V half, V bound) {
    const V x0 = M::at_most(1 + eq[0] * ek[0], bound), x1 = M::at_most(1 + eq[1] * ek[1], bound);
    const V x2 = M::at_most(1 + eq[2] * ek[2], bound), x3 = M::at_most(1 + eq[3] * ek[3], bound);
    const V p = x0 * x1, s = x2 * x3, d = p * s;
    const V n = (v[0] * x1 + v[1] * x0) * s + (v[2] * x3 + v[3] * x2) * p;
    return (half * d + n) / d;
  }

  // sum_i v[i] * tanh(q[i] + k[i]) over four elements from tq, tk; |q|, |k| <= kSmall.
  template <class V>
  static SEQATTN_SCORE V forward_small_merged(const V* tq, const V* tk, const V* v) {
    const V x0 = 1 + tq[0] * tk[0], x1 = 1 + tq[1] * tk[1], x2 = 1 + tq[2] * tk[2], x3 = 1 + tq[3] * tk[3];
    const V y0 = v[0] * (tq[0] + tk[0]), y1 = v[1] * (tq[1] + tk[1]);
    const V y2 = v[2] * (tq[2] + tk[2]), y3 = v[3] * (tq[3] + tk[3]);
    const V p = x0 * x1, s = x2 * x3;
    return ((y0 * x1 + y1 * x0) * s + (y2 * x3 + y3 * x2) * p) / (p * s);
  }

  // e^2k from tanh(k).
  template <class V>
  static SEQATTN_SCORE V exp_of_small(V tk) {
    return (1 + tk) / (1 - tk);
  }

  // r = 1 / (1 + e) and 1 - r, each to its own last bits, with e = e^2(q + k) below the bound: tanh = 1 - 2 r, its
  // derivative 4 r (1 - r).
  template <class V>
  static SEQATTN_SCORE V reciprocal(V e, V* complement) {
    const V r = 1 / (1 + e);
    *complement = e * r;
    return r;
  }
};

}  // namespace seqattn
