// Self-attentive pooling, scores v[r] . tanh(linear(input)[b, s]), their softmax over s and the sums of values:
// arguments and entry points.
#pragma once

#include "attention_kernels.h"
#include "attention_linear_args.h"

namespace seqattn {

// Shapes: input [B, S, K], v [R, N], values [B, S, D], context [B, R, D], weights [B, R, S]; all contiguous. Masks as
// in AttentionArgs, for every r the same. No output may overlap an input.
template <class T>
struct PoolingArgs {
  LinearArgs<T> linear;
  // T_ = R; values, masks, context, weights, rows, context_chunk, and in backward d_context as query, are used.
  AttentionArgs<T> attention;
  const T* v;
  T* tangents;  // [B, S, N] tanh(linear(input)), zero from the lengths on; read by backward, or null
  // Backward.
  const T* d_context;  // or null
  const T* d_weights;  // or null
  T* d_scores;         // [B, R, S]
  bool same;           // the values are the input: their gradients are one
  T* d_values;         // or null
  T* d_v;
};

template <class T>
struct PoolingKernels {
  int columns;  // of a panel
  // Items are panels of the linear layer, `columns` wide.
  void (*pack)(const PoolingArgs<T>&, int64_t begin, int64_t end);
  void (*pack_back)(const PoolingArgs<T>&, int64_t begin, int64_t end);
  // Forward, one after the other: items are (b, block of rows), with kLinearRows * linear.width() elements of scratch;
  // (b, r); (b, chunk of columns), with S elements.
  void (*scores)(const PoolingArgs<T>&, int64_t begin, int64_t end, T* scratch);
  void (*softmax)(const PoolingArgs<T>&, int64_t begin, int64_t end);
  void (*context)(const PoolingArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // Backward likewise: items are b; groups of linear.groups, with linear_scratch elements; rows of the gradient of the
  // weight, that of the bias, that of v.
  void (*weight_gradients)(const PoolingArgs<T>&, int64_t begin, int64_t end);
  void (*gradients)(const PoolingArgs<T>&, int64_t begin, int64_t end, T* scratch);
  void (*sum_parts)(const PoolingArgs<T>&, int64_t begin, int64_t end);
};

SEQATTN_DECLARE_KERNELS(PoolingKernels<float>, pooling_kernels_f32)
SEQATTN_DECLARE_KERNELS(PoolingKernels<double>, pooling_kernels_f64)

}  // namespace seqattn
