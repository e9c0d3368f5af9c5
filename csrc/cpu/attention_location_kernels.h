// Additive scores with a term of features, tanh(q + k + f U): their arguments and their entry points. For few queries a
// key, where packing keys first would cost more than the scores themselves.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace seqattn {

inline constexpr int64_t kLocationRows = 8;  // keys an item handles

// Shapes: query [B, T, A], keys [B, S, A], features [B, S, F] or [B, T, S, F], weight U [F, A], v [heads, A]; all
// contiguous. No output may overlap an input.
template <class T>
struct LocationArgs {
  int64_t B, T_, S, A, F, heads;
  const T* query;
  const T* keys;
  const T* features;
  int64_t feature_t;  // elements from one query's features to the next: S * F, or 0 where they share them
  const T* weight;
  const T* v;
  const int64_t* lengths;  // [B] or null
  T* scores;               // [B, T, S]; 0 at and past the length
  T* sums;                 // [B, S, A]: k + f U of query `step`; 0 at and past the length
  int64_t step;

  int64_t row_blocks() const { return (S + kLocationRows - 1) / kLocationRows; }
};

template <class T>
struct LocationKernels {
  // Items are (b, t, block of keys).
  void (*scores)(const LocationArgs<T>&, int64_t begin, int64_t end);
  // Items are (b, block of keys).
  void (*sums)(const LocationArgs<T>&, int64_t begin, int64_t end);
};

SEQATTN_DECLARE_KERNELS(LocationKernels<float>, location_kernels_f32)
SEQATTN_DECLARE_KERNELS(LocationKernels<double>, location_kernels_f64)

}  // namespace seqattn
