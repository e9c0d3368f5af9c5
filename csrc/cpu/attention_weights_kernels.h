// Weights from scores (masks, then softmax, sparsemax, entmax-1.5 or sigmoid) and their gradient: arguments and entry
// points.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace seqattn {

// In the order of the `kind` argument of the operators.
enum class Normalizer { softmax, sparsemax, entmax15, sigmoid };
inline constexpr int kNormalizerCount = 4;

// Shapes: scores, weights and their gradients [B, T, S], contiguous. Masks as in AttentionArgs. d_scores may be
// d_weights; otherwise no output may overlap an input.
template <class T>
struct WeightArgs {
  int64_t B, T_, S;
  const int64_t* lengths;
  const uint8_t* mask_bool;
  const T* mask_add;
  int64_t mask_b, mask_t;
  // Forward: weights of (scale * scores + mask) / temperature, with `fill` at hidden keys.
  const T* scores;
  T* weights;
  T scale, inverse_temperature, fill;
  bool zero_empty;
  // Backward, which reads weights: d_scores = factor * (gradient by what the normalizer was given).
  const T* d_weights;
  T* d_scores;
  T factor;

  int64_t length(int64_t b) const { return lengths ? lengths[b] : S; }
};

template <class T>
struct WeightKernels {
  // Items are rows (b, t).
  void (*forward[kNormalizerCount])(const WeightArgs<T>&, int64_t begin, int64_t end);
  void (*backward[kNormalizerCount])(const WeightArgs<T>&, int64_t begin, int64_t end);
};

SEQATTN_DECLARE_KERNELS(WeightKernels<float>, weight_kernels_f32)
SEQATTN_DECLARE_KERNELS(WeightKernels<double>, weight_kernels_f64)

}  // namespace seqattn
