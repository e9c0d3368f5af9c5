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
// eq may overflow or vanish: tanh is then +-1 to the last bit, provided that |k| <= kLargestKey. Past it the sum q + k
// is needed (q = 60, k = -60), and keys are kept as they are.
struct Additive {
  static constexpr const char* kName = "additive";
  static constexpr int kMerged = 4;  // elements a merged division serves

  // Bounds by the element type: the largest |k| for the exponential form, the largest |q|, |k| for the sum form, and
  // the bound of x in the merged forms of forward (four factors) and backward (two factors).
  template <class T>
  static constexpr T kLargestKey = sizeof(T) == 4 ? T(30) : T(300);
  static constexpr double kSmall = 1;
  template <class T>
  static constexpr T kBoundOfFour = sizeof(T) == 4 ? T(2147483648.0) : T(0x1p250);
  template <class T>
  static constexpr T kBoundOfTwo = sizeof(T) == 4 ? T(0x1p60) : T(0x1p500);

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

  // r = 1 / x of two elements with one division. tanh = 1 - 2 r, its derivative 4 (r - r^2).
  template <class M, class V = typename M::Value>
  static SEQATTN_SCORE void reciprocals(V eq0, V eq1, V ek, V bound, V* r0, V* r1) {
    const V x0 = M::at_most(1 + eq0 * ek, bound), x1 = M::at_most(1 + eq1 * ek, bound);
    const V r = 1 / (x0 * x1);
    *r0 = r * x1;
    *r1 = r * x0;
  }
};

}  // namespace seqattn
