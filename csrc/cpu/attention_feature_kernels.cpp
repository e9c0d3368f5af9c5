// Attention over time for each feature: two passes over the rows of a few columns, which stay in the caches between.
#include "attention_feature_kernels.h"

#include "simd.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// Columns side by side in registers.
template <class T>
inline constexpr int kWide = kRegisters == 32 ? 4 : 2;

// Calls f(vectors<N>, column, columns left) for the columns of a chunk.
template <int N>
struct Vectors {};
template <class T, class F>
SEQATTN_INLINE void for_columns(int64_t begin, int64_t end, F&& f) {
  constexpr int W = kLanes<T>;
  int64_t d = begin;
  for (; d + kWide<T> * W <= end; d += kWide<T> * W) f(Vectors<kWide<T>>{}, d, int64_t(kWide<T> * W));
  for (; d < end; d += W) f(Vectors<1>{}, d, end - d);
}

template <class T, int N>
SEQATTN_INLINE Vec<T> load_column(const T* p, int j, int64_t left) {
  return N > 1 ? load(p + j * kLanes<T>) : load_partial(p, left);
}
template <class T, int N>
SEQATTN_INLINE void store_column(T* p, int j, Vec<T> v, int64_t left) {
  if constexpr (N > 1) {
    store(p + j * kLanes<T>, v);
  } else {
    store_partial(p, v, left);
  }
}

template <class T>
struct Rows {
  const uint8_t* mask;
  int64_t length;
  Rows(const FeatureArgs<T>& args, int64_t b)
      : mask(args.mask_bool ? args.mask_bool + b * args.mask_b : nullptr), length(args.length(b)) {}
  SEQATTN_INLINE bool attended(int64_t s) const { return s < length && (!mask || mask[s]); }
};

template <class T, int N>
SEQATTN_INLINE void forward_columns(const FeatureArgs<T>& args, int64_t b, int64_t d, int64_t left) {
  const Rows<T> rows(args, b);
  const int64_t S = args.S, D = args.D, at = b * S * D + d;
  Vec<T> sum[N], context[N];
  for (int j = 0; j < N; ++j) sum[j] = context[j] = Vec<T>{};
  for (int64_t s = 0; s < rows.length; ++s) {
    if (!rows.attended(s)) continue;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      // tanh lies in [-1, 1]: its exponential needs no largest one taken off, and no digits of a small tanh.
      const Vec<T> x = load_column<T, N>(args.inner + at + s * D, j, left);
      const Vec<T> e = exp<T>(T(1) - T(2) / (T(1) + exp<T>(x + x)));
      sum[j] += e;
      store_column<T, N>(args.weights + at + s * D, j, e, left);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) sum[j] = T(1) / sum[j];
  for (int64_t s = 0; s < S; ++s) {
    const bool attended = rows.attended(s);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      Vec<T> w{}, r{};
      if (attended) {
        w = load_column<T, N>(args.weights + at + s * D, j, left) * sum[j];
        r = w * load_column<T, N>(args.input + at + s * D, j, left);
      }
      store_column<T, N>(args.weights + at + s * D, j, w, left);
      if (args.reduce) {
        context[j] += r;
      } else {
        store_column<T, N>(args.result + at + s * D, j, r, left);
      }
    }
  }
  if (!args.reduce) return;
  for (int j = 0; j < N; ++j) store_column<T, N>(args.result + b * D + d, j, context[j], left);
}

// The gradient of the weight at (s, d), and the result's beside it.
template <class T, int N>
SEQATTN_INLINE Vec<T> weight_gradient(const FeatureArgs<T>& args, int64_t b, int64_t d, int64_t s, int j, int64_t left,
                                      Vec<T>* d_result) {
  const int64_t at = (b * args.S + s) * args.D + d;
  Vec<T> dw{};
  *d_result = Vec<T>{};
  if (args.d_result) {
    *d_result = load_column<T, N>(args.d_result + (args.reduce ? b * args.D + d : at), j, left);
    dw = *d_result * load_column<T, N>(args.input + at, j, left);
  }
  if (args.d_weights) dw += load_column<T, N>(args.d_weights + at, j, left);
  return dw;
}

template <class T, int N>
SEQATTN_INLINE void backward_columns(const FeatureArgs<T>& args, int64_t b, int64_t d, int64_t left) {
  const Rows<T> rows(args, b);
  const int64_t S = args.S, D = args.D, at = b * S * D + d;
  Vec<T> sum[N], dr;
  for (int j = 0; j < N; ++j) sum[j] = Vec<T>{};
  for (int64_t s = 0; s < rows.length; ++s) {
    if (!rows.attended(s)) continue;
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Vec<T> w = load_column<T, N>(args.weights + at + s * D, j, left);
      sum[j] += w * weight_gradient<T, N>(args, b, d, s, j, left, &dr);
    }
  }
  for (int64_t s = 0; s < S; ++s) {
    const bool attended = rows.attended(s);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      Vec<T> d_inner{}, d_input{};
      if (attended) {
        const Vec<T> w = load_column<T, N>(args.weights + at + s * D, j, left);
        const Vec<T> dw = weight_gradient<T, N>(args, b, d, s, j, left, &dr);
        const Vec<T> x = load_column<T, N>(args.inner + at + s * D, j, left);
        const Vec<T> r = T(1) / (T(1) + exp<T>(x + x));  // tanh is 1 - 2 r, its derivative 4 r (1 - r)
        d_inner = w * (dw - sum[j]) * (T(4) * r * (T(1) - r));
        d_input = dr * w;
      }
      store_column<T, N>(args.d_inner + at + s * D, j, d_inner, left);
      store_column<T, N>(args.d_input + at + s * D, j, d_input, left);
    }
  }
}

template <class T, bool is_forward>
void run(const FeatureArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / args.chunks(), d = item % args.chunks() * kFeatureColumns;
    const int64_t stop = d + kFeatureColumns < args.D ? d + kFeatureColumns : args.D;
    for_columns<T>(d, stop, [&]<int N>(Vectors<N>, int64_t column, int64_t left) {
      if constexpr (is_forward) {
        forward_columns<T, N>(args, b, column, left);
      } else {
        backward_columns<T, N>(args, b, column, left);
      }
    });
  }
}

}  // namespace

extern const FeatureKernels<float> feature_kernels_f32 = {run<float, true>, run<float, false>};
extern const FeatureKernels<double> feature_kernels_f64 = {run<double, true>, run<double, false>};

}  // namespace seqattn::SEQATTN_ISA
