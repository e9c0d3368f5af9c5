// Additive scores with a term of features, tanh(q + k + f U): their arguments and their entry points. For few queries a
// key, where packing keys first would cost more than the scores themselves.
#pragma once

#include <cstdint>

#include "attention_kernels.h"

namespace seqattn {

inline constexpr int64_t kLocationRows = 8;  // keys an item handles

// Shapes: query [B, T, A], keys [B, S, A], features [B, S, F] or [B, T, S, F], weight U [F, A] with rows weight_stride
// apart, v [heads, A]; all others contiguous. Features may instead be made on the way, by a convolution of a history
// [B, C, S] or [B, T, C, S] that keeps the length. No output may overlap an input.
template <class T>
struct LocationArgs {
  int64_t B, T_, S, A, F, heads;
  const T* query;
  const T* keys;
  const T* features;
  bool per_query;  // features or history of each query, not of all
  const T* weight;
  int64_t weight_stride;
  const T* history;  // or null: `features` are there
  int64_t channels, taps;
  T *packed_conv, *packed_weight;  // for `pack`: [C * W, padded F], and [F, padded A], of these:
  const T* conv_weight;            // [F, C, W]
  const T* feature_weight;         // [A, F]
  const T* v;
  const int64_t* lengths;  // [B] or null
  T* scores;               // [B, T, S]; 0 at and past the length
  T* sums;                 // [B, S, A]: k + f U of query `step`; 0 at and past the length
  int64_t step;

  SEQATTN_HERE int64_t row_blocks() const { return ceil_div(S, kLocationRows); }
  SEQATTN_HERE int64_t window() const { return kLocationRows + taps - 1; }
  SEQATTN_HERE int64_t padded_features() const { return round_up(F, kKeyBlock); }
};

template <class T>
struct LocationKernels {
  // Both weights of a convolution's features, into packed_*; `weight` is then the second.
  void (*pack)(const LocationArgs<T>&);
  // Items are (b, t, block of keys). `scratch` holds location_scratch elements where there is a history.
  void (*scores)(const LocationArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // Items are (b, block of keys).
  void (*sums)(const LocationArgs<T>&, int64_t begin, int64_t end);
};

template <class T>
inline int64_t location_scratch(const LocationArgs<T>& a) {
  return round_up(a.channels * a.window() + kLocationRows * a.padded_features(), 64 / int64_t(sizeof(T)));
}

SEQATTN_DECLARE_KERNELS(LocationKernels<float>, location_kernels_f32)
SEQATTN_DECLARE_KERNELS(LocationKernels<double>, location_kernels_f64)

// For launchers: kernels choose nothing.
template <class T>
inline const LocationKernels<T>& location_kernels() {
  if constexpr (sizeof(T) == 4) {
    return SEQATTN_KERNELS(location_kernels_f32);
  } else {
    return SEQATTN_KERNELS(location_kernels_f64);
  }
}

}  // namespace seqattn
