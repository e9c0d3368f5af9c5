// Additive scores with a term of features. The product with U, the sum with query and key, tanh and the sum over a
// happen in registers: nothing of size S * A is stored.
#include "attention_location_kernels.h"

#include "gemm.h"
#include "lanes.h"
#include "scores/registry.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// acc[i] += sum over k of x[i][k] u[k][a..], rows of x `ldx` apart; `left` columns remain from a.
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

// Features of keys, rows `ld` apart.
template <class T>
struct Features {
  const T* data;
  int64_t ld;
};

// Sums k + f U of N keys and NV vectors of columns; `left` columns remain from here.
template <class T, int N, int NV>
SEQATTN_INLINE void row_sums(const LocationArgs<T>& args, const T* keys, Features<T> features, int64_t a, int64_t left,
                             Vec<T> (&acc)[N][NV]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      const T* k = keys + i * args.A + a + j * W;
      acc[i][j] = NV > 1 ? load(k) : load_partial(k, left);
    }
  }
  add_products<T, N, NV>(acc, features.data, features.ld, args.weight + a, args.weight_stride, args.F, left);
}

template <class T, int N, int NV>
SEQATTN_INLINE void add_scores(const LocationArgs<T>& args, const T* query, const T* v, const T* keys,
                               Features<T> features, int64_t a, int64_t left, Vec<T> (&sum)[N]) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[N][NV];
  row_sums<T, N, NV>(args, keys, features, a, left, acc);
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
void score_keys(const LocationArgs<T>& args, const T* query, const T* v, const T* keys, Features<T> features, T* out) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sum[i] = Vec<T>{};
  int64_t a = 0;
  for (; a + 2 * W <= args.A; a += 2 * W) {
    add_scores<T, N, 2>(args, query, v, keys, features, a, 2 * W, sum);
  }
  for (; a < args.A; a += W) add_scores<T, N, 1>(args, query, v, keys, features, a, args.A - a, sum);
  for (int i = 0; i < N; ++i) out[i] = sum_all<T>(sum[i])[0];
}

template <class T, int N>
void sum_keys(const LocationArgs<T>& args, const T* keys, Features<T> features, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t a = 0; a < args.A; a += W) {
    Vec<T> acc[N][1];
    row_sums<T, N, 1>(args, keys, features, a, args.A - a, acc);
    for (int i = 0; i < N; ++i) store_partial(out + i * args.A + a, acc[i][0], args.A - a);
  }
}

// The keys [s, end) of an item, of which those from `length` on count as absent.
struct Keys {
  int64_t s, end, length;
};

template <class T>
SEQATTN_INLINE Keys keys_of(const LocationArgs<T>& args, int64_t b, int64_t block) {
  const int64_t s = block * kLocationRows, end = s + kLocationRows < args.S ? s + kLocationRows : args.S;
  const int64_t length = args.lengths ? args.lengths[b] : args.S;
  return {s, end, length < end ? length : end};
}

template <class T>
void pack(const LocationArgs<T>& args) {
  constexpr int W = kLanes<T>;
  const int64_t taps = args.channels * args.taps;
  for (int64_t f = 0; f < args.F; f += W) {
    transpose_strip(args.packed_conv + f, args.padded_features(), args.conv_weight + f * taps, taps,
                    args.F - f < W ? args.F - f : W, taps);
  }
  for (int64_t a = 0; a < args.A; a += W) {
    transpose_strip(args.packed_weight + a, args.weight_stride, args.feature_weight + a * args.F, args.F,
                    args.A - a < W ? args.A - a : W, args.F);
  }
}

// The convolution at N keys, out[i][padded F], from a window of the history whose rows are `ld` apart.
template <class T, int N>
SEQATTN_INLINE void convolve(const LocationArgs<T>& args, const T* window, int64_t ld, T* out) {
  constexpr int W = kLanes<T>;
  const int64_t width = args.padded_features();
  const auto columns = [&]<int NV>(int64_t f) {
    Vec<T> acc[N][NV] = {};
    for (int64_t c = 0; c < args.channels; ++c) {
      add_products<T, N, NV>(acc, window + c * ld, 1, args.packed_conv + c * args.taps * width + f, width, args.taps,
                             W);
    }
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < NV; ++j) store(out + i * width + f + j * W, acc[i][j]);
    }
  };
  int64_t f = 0;
  for (; f + 2 * W <= args.F; f += 2 * W) columns.template operator()<2>(f);
  for (; f < args.F; f += W) columns.template operator()<1>(f);
}

// The features of keys [s, end) of row (b, t), from the keys' own or by a convolution into scratch.
template <class T>
SEQATTN_INLINE Features<T> features_of(const LocationArgs<T>& args, int64_t b, int64_t row, int64_t s, int64_t end,
                                       T* scratch) {
  const int64_t at = args.per_query ? row : b, S = args.S;
  if (!args.history) return {args.features + (at * S + s) * args.F, args.F};
  const int64_t ld = args.window(), before = args.taps / 2;
  for (int64_t c = 0; c < args.channels; ++c) {
    const T* history = args.history + (at * args.channels + c) * S;
    for (int64_t i = 0; i < ld; ++i) {
      const int64_t from = s - before + i;
      scratch[c * ld + i] = from >= 0 && from < S ? history[from] : T(0);
    }
  }
  T* out = scratch + args.channels * ld;
  int64_t i = 0;
  for (; i + kRows<T> <= end - s; i += kRows<T>) {
    convolve<T, kRows<T>>(args, scratch + i, ld, out + i * args.padded_features());
  }
  for (; i < end - s; ++i) convolve<T, 1>(args, scratch + i, ld, out + i * args.padded_features());
  return {out, args.padded_features()};
}

// Calls run.operator()<N>(s, features) for N keys at a time from s to `end`.
template <class T, class F>
SEQATTN_INLINE void for_keys(Features<T> features, int64_t s, int64_t end, F&& run) {
  for (; s + kRows<T> <= end; s += kRows<T>, features.data += kRows<T> * features.ld) {
    run.template operator()<kRows<T>>(s, features);
  }
  for (; s < end; ++s, features.data += features.ld) run.template operator()<1>(s, features);
}

template <class T>
void scores(const LocationArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const int64_t blocks = args.row_blocks(), S = args.S, A = args.A;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, b = row / args.T_;
    const Keys at = keys_of(args, b, item % blocks);
    T* out = args.scores + row * S;
    if (at.s < at.length) {
      for_keys(features_of(args, b, row, at.s, at.length, scratch), at.s, at.length,
               [&]<int N>(int64_t s, Features<T> features) {
                 score_keys<T, N>(args, args.query + row * A, args.v + b % args.heads * A, args.keys + (b * S + s) * A,
                                  features, out + s);
               });
    }
    for (int64_t s = at.length > at.s ? at.length : at.s; s < at.end; ++s) out[s] = 0;
  }
}

template <class T>
void sums(const LocationArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.row_blocks(), S = args.S, A = args.A;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks;
    const Keys at = keys_of(args, b, item % blocks);
    T* out = args.sums + b * S * A;
    if (at.s < at.length) {
      for_keys(features_of(args, b, b * args.T_ + args.step, at.s, at.length, static_cast<T*>(nullptr)), at.s,
               at.length, [&]<int N>(int64_t s, Features<T> features) {
                 sum_keys<T, N>(args, args.keys + (b * S + s) * A, features, out + s * A);
               });
    }
    for (int64_t s = at.length > at.s ? at.length : at.s; s < at.end; ++s) {
      for (int64_t a = 0; a < A; a += kLanes<T>) store_partial(out + s * A + a, Vec<T>{}, A - a);
    }
  }
}

}  // namespace

extern const LocationKernels<float> location_kernels_f32 = {pack<float>, scores<float>, sums<float>};
extern const LocationKernels<double> location_kernels_f64 = {pack<double>, scores<double>, sums<double>};

}  // namespace seqattn::SEQATTN_ISA
