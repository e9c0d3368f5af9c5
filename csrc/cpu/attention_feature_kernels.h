// Attention over time for each feature, softmax over s of tanh(inner[b, s, d]) times input: arguments and entry points.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace seqattn {

inline constexpr int64_t kFeatureColumns = 64;  // columns an item handles

// Shapes: inner, input, weights and their gradients [B, S, D]; result and its gradient [B, S, D], or [B, D] with
// `reduce`; all contiguous. Masks [B, S]. No output may overlap an input.
template <class T>
struct FeatureArgs {
  int64_t B, S, D;
  const int64_t* lengths;    // or null
  const uint8_t* mask_bool;  // or null; element (b, s) at b * mask_b + s
  int64_t mask_b;
  bool reduce;
  const T* inner;
  const T* input;
  T* weights;  // read by backward
  T* result;
  // Backward.
  const T* d_result;   // or null
  const T* d_weights;  // or null
  T* d_inner;
  T* d_input;

  int64_t chunks() const { return (D + kFeatureColumns - 1) / kFeatureColumns; }
  int64_t length(int64_t b) const { return lengths ? lengths[b] : S; }
};

template <class T>
struct FeatureKernels {
  // Items are (b, chunk of columns).
  void (*forward)(const FeatureArgs<T>&, int64_t begin, int64_t end);
  void (*backward)(const FeatureArgs<T>&, int64_t begin, int64_t end);
};

SEQATTN_DECLARE_KERNELS(FeatureKernels<float>, feature_kernels_f32)
SEQATTN_DECLARE_KERNELS(FeatureKernels<double>, feature_kernels_f64)

}  // namespace seqattn
