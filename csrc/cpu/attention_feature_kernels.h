// Attention over time for each feature, softmax over s of tanh(linear(input)[b, s, d]) times input: arguments and entry
// points.
#pragma once

#include <cstdint>

#include "attention_linear_args.h"
#include "dispatch.h"

namespace seqattn {

// Shapes: input, weights, tangents and gradients of the first two [B, S, D]; result and its gradient [B, S, D], or
// [B, D] with `reduce`; all contiguous. Masks [B, S]. No output may overlap an input.
template <class T>
struct FeatureArgs {
  LinearArgs<T> linear;      // K = N = D
  const uint8_t* mask_bool;  // or null; element (b, s) at b * mask_b + s
  int64_t mask_b;
  bool reduce;
  T* weights;   // read by backward
  T* tangents;  // tanh(linear(input)), zero where not attended to; read by backward, or null
  T* result;
  // Backward.
  const T* d_result;   // or null
  const T* d_weights;  // or null
  T* sums;             // [B, D]

  SEQATTN_HERE const uint8_t* mask(int64_t b) const { return mask_bool ? mask_bool + b * mask_b : nullptr; }
};

template <class T>
struct FeatureKernels {
  int columns;  // of a chunk
  // Items are panels of the linear layer, `columns` wide.
  void (*pack)(const FeatureArgs<T>&, int64_t begin, int64_t end);
  void (*pack_back)(const FeatureArgs<T>&, int64_t begin, int64_t end);
  // Items are (b, chunk of columns). `scratch` holds kLinearRows * columns elements.
  void (*forward)(const FeatureArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // Backward, one after the other: items are (b, chunk of columns); groups of linear.groups, with linear_scratch
  // elements; rows of the gradient of the weight and that of the bias.
  void (*weighted_sums)(const FeatureArgs<T>&, int64_t begin, int64_t end);
  void (*gradients)(const FeatureArgs<T>&, int64_t begin, int64_t end, T* scratch);
  void (*sum_parts)(const FeatureArgs<T>&, int64_t begin, int64_t end);
};

SEQATTN_DECLARE_KERNELS(FeatureKernels<float>, feature_kernels_f32)
SEQATTN_DECLARE_KERNELS(FeatureKernels<double>, feature_kernels_f64)

}  // namespace seqattn
