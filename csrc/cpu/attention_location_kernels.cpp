// Additive scores with a term of features. The product with U, the sum with query and key, tanh and the sum over a
// happen in registers: nothing of size S * A is stored.
#include "attention_location_kernels.h"

#include "lanes.h"
#include "scores/registry.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// Sums k + f U of up to N keys and NV vectors of columns; `left` columns remain from here.
template <class T, int N, int NV>
SEQATTN_INLINE void row_sums(const LocationArgs<T>& args, const T* keys, const T* features, int64_t a, int64_t left,
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
  for (int64_t f = 0; f < args.F; ++f) {
    const T* row = args.weight + f * args.A + a;
    Vec<T> u[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) u[j] = NV > 1 ? load(row + j * W) : load_partial(row, left);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> x = broadcast(features[i * args.F + f]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += x * u[j];
    }
  }
}

template <class T, int N, int NV>
SEQATTN_INLINE void add_scores(const LocationArgs<T>& args, const T* query, const T* v, const T* keys,
                               const T* features, int64_t a, int64_t left, Vec<T> (&sum)[N]) {
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
void score_keys(const LocationArgs<T>& args, const T* query, const T* v, const T* keys, const T* features, T* out) {
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
void sum_keys(const LocationArgs<T>& args, const T* keys, const T* features, T* out) {
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
void scores(const LocationArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.row_blocks(), S = args.S, A = args.A;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, b = row / args.T_;
    const Keys at = keys_of(args, b, item % blocks);
    const T* query = args.query + row * A;
    const T* v = args.v + b % args.heads * A;
    const T* features = args.features + (args.feature_t ? row : b) * S * args.F;
    T* out = args.scores + row * S;
    int64_t s = at.s;
    for (; s + kRows<T> <= at.length; s += kRows<T>) {
      score_keys<T, kRows<T>>(args, query, v, args.keys + (b * S + s) * A, features + s * args.F, out + s);
    }
    for (; s < at.length; ++s) {
      score_keys<T, 1>(args, query, v, args.keys + (b * S + s) * A, features + s * args.F, out + s);
    }
    for (; s < at.end; ++s) out[s] = 0;
  }
}

template <class T>
void sums(const LocationArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.row_blocks(), S = args.S, A = args.A;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks;
    const Keys at = keys_of(args, b, item % blocks);
    const T* features = args.features + (args.feature_t ? b * args.T_ + args.step : b) * S * args.F;
    T* out = args.sums + b * S * A;
    int64_t s = at.s;
    for (; s + kRows<T> <= at.length; s += kRows<T>) {
      sum_keys<T, kRows<T>>(args, args.keys + (b * S + s) * A, features + s * args.F, out + s * A);
    }
    for (; s < at.length; ++s) {
      sum_keys<T, 1>(args, args.keys + (b * S + s) * A, features + s * args.F, out + s * A);
    }
    for (; s < at.end; ++s) {
      for (int64_t a = 0; a < A; a += kLanes<T>) store_partial(out + s * A + a, Vec<T>{}, A - a);
    }
  }
}

}  // namespace

extern const LocationKernels<float> location_kernels_f32 = {scores<float>, sums<float>};
extern const LocationKernels<double> location_kernels_f64 = {scores<double>, sums<double>};

}  // namespace seqattn::SEQATTN_ISA
