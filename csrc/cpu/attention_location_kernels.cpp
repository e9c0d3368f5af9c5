// Additive scores with a term of features, for one instruction set.
#include "attention_location_kernels.h"

#include "attention_location.h"
#include "gemm.h"

namespace seqattn::SEQATTN_ISA {
namespace {

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

// Features of keys, rows `ld` apart.
template <class T>
struct Features {
  const T* data;
  int64_t ld;
};

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

// Calls run.operator()<N>(s, term, features) for N keys at a time from s to `end`.
template <class T, class F>
SEQATTN_INLINE void for_keys(const LocationArgs<T>& args, Features<T> features, int64_t s, int64_t end, F&& run) {
  const FeatureTerm<T> term{args.A, args.F, args.weight, args.weight_stride, features.ld};
  const T* at = features.data;
  for (; s + kRows<T> <= end; s += kRows<T>, at += kRows<T> * features.ld) {
    run.template operator()<kRows<T>>(s, term, at);
  }
  for (; s < end; ++s, at += features.ld) run.template operator()<1>(s, term, at);
}

template <class T>
void scores(const LocationArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const int64_t blocks = args.row_blocks(), S = args.S, A = args.A;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / blocks, b = row / args.T_;
    const Keys at = keys_of(args, b, item % blocks);
    T* out = args.scores + row * S;
    if (at.s < at.length) {
      for_keys(args, features_of(args, b, row, at.s, at.length, scratch), at.s, at.length,
               [&]<int N>(int64_t s, const FeatureTerm<T>& term, const T* features) {
                 score_keys<T, N>(term, args.query + row * A, args.v + b % args.heads * A, args.keys + (b * S + s) * A,
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
      for_keys(args, features_of(args, b, b * args.T_ + args.step, at.s, at.length, static_cast<T*>(nullptr)), at.s,
               at.length, [&]<int N>(int64_t s, const FeatureTerm<T>& term, const T* features) {
                 sum_keys<T, N>(term, args.keys + (b * S + s) * A, features, out + s * A);
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
