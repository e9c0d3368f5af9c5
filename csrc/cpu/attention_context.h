// Masked softmax and context of additive attention and of pooling.
#pragma once

#include "attention_keys.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class T>
SEQATTN_INLINE bool attends(const AttentionArgs<T>& args, int64_t b, int64_t t, int64_t s) {
  const int64_t at = b * args.mask_b + t * args.mask_t + s;
  return args.mask_bool ? args.mask_bool[at] != 0 : args.mask_add[at] != -kInfinity<T>;
}

// Masked softmax of one row, in place, of round_up(length, 16) scores; zeros where nothing is attended to.
template <class T>
void softmax_row(const AttentionArgs<T>& args, int64_t b, int64_t t, T* row) {
  constexpr int W = kLanes<T>;
  const int64_t length = args.length(b), padded = round_up(length, kKeyBlock);
  bool any = length > 0;
  if (args.mask_bool) {
    const uint8_t* mask = args.mask_bool + b * args.mask_b + t * args.mask_t;
    unsigned seen = 0;
    for (int64_t s = 0; s < length; ++s) {
      seen |= mask[s];
      row[s] = mask[s] ? row[s] : -kInfinity<T>;
    }
    any = seen != 0;
  } else if (args.mask_add) {
    const T* mask = args.mask_add + b * args.mask_b + t * args.mask_t;
    any = false;
    for (int64_t s = 0; s < length; ++s) {
      const bool attend = mask[s] != -kInfinity<T>;
      any |= attend;
      row[s] = attend ? row[s] + mask[s] : -kInfinity<T>;
    }
  }
  for (int64_t s = length; s < padded; ++s) row[s] = -kInfinity<T>;
  T* weights = args.weights ? args.weights + (b * args.T_ + t) * args.S : nullptr;
  if (!any) {
    for (int64_t s = 0; s < padded; ++s) row[s] = 0;
  } else {
    Vec<T> largest = broadcast(-kInfinity<T>);
    for (int64_t s = 0; s < padded; s += W) {
      const Vec<T> x = load(row + s);
      largest = x > largest ? x : largest;
    }
    const Vec<T> top = max_all<T>(largest);
    Vec<T> sum{};
    for (int64_t s = 0; s < padded; s += W) {
      const Vec<T> e = exp<T>(load(row + s) - top);
      sum += e;
      store(row + s, e);
    }
    const Vec<T> total = sum_all<T>(sum);
    for (int64_t s = 0; s < padded; s += W) store(row + s, load(row + s) / total);
    if (total[0] != total[0] && (args.mask_bool || args.mask_add)) {
      // A NaN among the keys this query sees gives those it doesn't see no weight: theirs is the NaN of 0 / NaN.
      for (int64_t s = 0; s < length; ++s) row[s] = attends(args, b, t, s) ? row[s] : T(0);
    }
  }
  if (weights) {
    int64_t s = 0;
    for (; s < length; s += W) store_partial(weights + s, load(row + s), length - s);
    for (s = length; s < args.S; ++s) weights[s] = 0;
  }
}

// context[i][0..width) = sum over the listed keys of weights[i][s] * values[s], for N rows. Without a list: keys
// [0, count).
template <class T, int N, int NV, bool listed>
SEQATTN_INLINE void context_vectors(const T* weights, int64_t ld, const T* values, int64_t D, const int32_t* list,
                                    int64_t count, T* out, int64_t width) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[N][NV];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec<T>{};
  }
  for (int64_t n = 0; n < count; ++n) {
    const int64_t s = listed ? list[n] : n;
    if constexpr (N == 1 && NV > 1) prefetch_ahead<T, NV * kVectorBytes / 64>(values + s * D);
    Vec<T> y[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      y[j] = NV == 1 ? load_partial(values + s * D, width) : load(values + s * D + j * W);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> w = broadcast(weights[i * ld + s]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] = acc[i][j] + w * y[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store_partial(out + i * D + j * W, acc[i][j], NV == 1 ? width : W);
  }
}

template <class T, int N, bool listed>
void context_rows(const T* weights, int64_t ld, const T* values, int64_t D, const int32_t* list, int64_t count, T* out,
                  int64_t width) {
  constexpr int W = kLanes<T>;
  // Enough accumulators to hide the latency of a multiply-add, no more than there are registers.
  constexpr int kWide = kRegisters == 32 ? (N == 1 ? 16 : 4) : (N == 1 ? 8 : 2);
  int64_t d = 0;
  for (; d + kWide * W <= width; d += kWide * W) {
    context_vectors<T, N, kWide, listed>(weights, ld, values + d, D, list, count, out + d, W);
  }
  if constexpr (N == 1) {
    for (; d + 4 * W <= width; d += 4 * W) {
      context_vectors<T, N, 4, listed>(weights, ld, values + d, D, list, count, out + d, W);
    }
  }
  for (; d < width; d += W) {
    context_vectors<T, N, 1, listed>(weights, ld, values + d, D, list, count, out + d, width - d < W ? width - d : W);
  }
}

// Lists the keys that some of `rows` rows of weights give weight to.
template <class T>
int64_t list_weighted(const T* weights, int64_t ld, int64_t rows, int64_t length, int32_t* list) {
  int64_t count = 0;
  for (int64_t s = 0; s < length; ++s) {
    bool any = false;
    for (int64_t i = 0; i < rows && !any; ++i) any = weights[i * ld + s] != 0;
    list[count] = int32_t(s);
    count += any;
  }
  return count;
}

// Lists the keys that some of `rows` queries from t0 attend to; a value that none of them does may be anything.
template <class T>
int64_t list_keys(const AttentionArgs<T>& args, int64_t b, int64_t t0, int64_t rows, int32_t* list) {
  const int64_t length = args.length(b), distinct = args.mask_t ? rows : 1;
  int64_t count = 0;
  for (int64_t s = 0; s < length; ++s) {
    bool any = false;
    for (int64_t i = 0; i < distinct && !any; ++i) any = attends(args, b, t0 + i, s);
    list[count] = int32_t(s);
    count += any;
  }
  return count;
}

// Columns [d0, d1) of the context of a tile's queries from their weights.
template <class T>
void context_tile(const AttentionArgs<T>& args, int64_t b, int64_t t0, int64_t rows, const T* weights, int64_t ld,
                  int64_t d0, int64_t d1, int32_t* list) {
  const T* values = args.values + b * args.S * args.D + d0;
  T* out = args.context + (b * args.T_ + t0) * args.D + d0;
  const bool masked = args.mask_bool || args.mask_add || args.by_weight;
  const int64_t length = args.length(b), width = d1 - d0, D = args.D;
  if (!masked) {
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6) {
      context_rows<T, 6, false>(weights + i * ld, ld, values, D, nullptr, length, out + i * D, width);
    }
    for (; i + 2 <= rows; i += 2) {
      context_rows<T, 2, false>(weights + i * ld, ld, values, D, nullptr, length, out + i * D, width);
    }
    if (i < rows) context_rows<T, 1, false>(weights + i * ld, ld, values, D, nullptr, length, out + i * D, width);
    return;
  }
  const auto keys_of = [&](int64_t first, int64_t n) {
    return args.by_weight ? list_weighted(weights + first * ld, ld, n, length, list)
                          : list_keys(args, b, t0 + first, n, list);
  };
  const int64_t count = keys_of(0, rows);
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) {
    context_rows<T, 6, true>(weights + i * ld, ld, values, D, list, count, out + i * D, width);
  }
  for (; i < rows; ++i) context_rows<T, 1, true>(weights + i * ld, ld, values, D, list, count, out + i * D, width);
  if (!args.mask_t && !args.by_weight) return;
  // A query must not see what only its neighbours in the tile attend to: 0 * NaN. Rare, so by a second look.
  for (i = 0; i < rows; ++i) {
    bool finite = true;
    for (int64_t d = 0; d < width; ++d) finite &= out[i * D + d] - out[i * D + d] == 0;
    if (finite) continue;
    const int64_t own = keys_of(i, 1);
    context_rows<T, 1, true>(weights + i * ld, ld, values, D, list, own, out + i * D, width);
  }
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
