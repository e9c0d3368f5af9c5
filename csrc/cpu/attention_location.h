// Additive scores with a term of features, tanh(q + k + f U), of a few keys at a time: the product with U, the sum with
// query and key, tanh and the sum over a happen in registers, and nothing of size S * A is stored.
#pragma once

#include <cstdint>

#include "lanes.h"
#include "scores/registry.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// U [F][A] with rows ld_weight apart; the features of one key and the next are ld_features apart.
template <class T>
struct FeatureTerm {
  int64_t A, F;
  const T* weight;
  int64_t ld_weight, ld_features;
};

// acc[i] += sum over k of x[i][k] u[k][..], rows of x ldx apart, of u ldu; `left` columns remain.
template <class T, int N, int NV>
SEQATTN_INLINE void add_products(Vec<T> (&acc)[N][NV], const T* x, int64_t ldx, const T* u, int64_t ldu, int64_t K,
                                 int64_t left) {
  constexpr int W = kLanes<T>;
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> row[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) row[j] = NV > 1 ? load(u + k * ldu + j * W) : load_partial(u + k * ldu, left);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> value = broadcast(x[i * ldx + k]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += value * row[j];
    }
  }
}

// Sums k + f U of up to N keys and NV vectors of columns; `left` columns remain from here.
template <class T, int N, int NV>
SEQATTN_INLINE void row_sums(const FeatureTerm<T>& term, const T* keys, const T* features, int64_t a, int64_t left,
                             Vec<T> (&acc)[N][NV]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      const T* k = keys + i * term.A + a + j * W;
      acc[i][j] = NV > 1 ? load(k) : load_partial(k, left);
    }
  }
  add_products<T, N, NV>(acc, features, term.ld_features, term.weight + a, term.ld_weight, term.F, left);
}

template <class T, int N, int NV>
SEQATTN_INLINE void add_scores(const FeatureTerm<T>& term, const T* query, const T* v, const T* keys, const T* features,
                               int64_t a, int64_t left, Vec<T> (&sum)[N]) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[N][NV];
  row_sums<T, N, NV>(term, keys, features, a, left, acc);
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    const Vec<T> q = NV > 1 ? load(query + a + j * W) : load_partial(query + a, left);
    const Vec<T> w = NV > 1 ? load(v + a + j * W) : load_partial(v + a, left);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[i] += w * Additive::forward<Math<T>>(q, acc[i][j]);
  }
}

// Enough sums in registers to hide latencies, no more than there are.
template <class T>
inline constexpr int kRows = kRegisters == 32 ? 8 : 4;

template <class T, int N>
void score_keys(const FeatureTerm<T>& term, const T* query, const T* v, const T* keys, const T* features, T* out) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sum[i] = Vec<T>{};
  int64_t a = 0;
  for (; a + 2 * W <= term.A; a += 2 * W) {
    add_scores<T, N, 2>(term, query, v, keys, features, a, 2 * W, sum);
  }
  for (; a < term.A; a += W) add_scores<T, N, 1>(term, query, v, keys, features, a, term.A - a, sum);
  for (int i = 0; i < N; ++i) out[i] = sum_all<T>(sum[i])[0];
}

template <class T, int N>
void sum_keys(const FeatureTerm<T>& term, const T* keys, const T* features, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t a = 0; a < term.A; a += W) {
    Vec<T> acc[N][1];
    row_sums<T, N, 1>(term, keys, features, a, term.A - a, acc);
    for (int i = 0; i < N; ++i) store_partial(out + i * term.A + a, acc[i][0], term.A - a);
  }
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
