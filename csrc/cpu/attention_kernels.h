// The additive attention kernels: their arguments and their entry points. Work is given out in items; which thread does
// which item never changes a result.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace seqattn {

inline constexpr int64_t kKeyBlock = 16;  // keys side by side in the packed layout, whatever the vector width
inline constexpr int64_t kTileRows = 12;  // queries that share one pass over a block of keys

// Always inlined: units of different instruction sets include this.
#define SEQATTN_HERE inline __attribute__((always_inline))
SEQATTN_HERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SEQATTN_HERE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Packed keys are [B, ceil(S / 16), P + 1, 16] with P = A rounded up to 4: blocks of 16 keys, transposed. Rows [0, P)
// hold tanh k, e^2k or k, as the largest |k| of the block is at most Additive::kSmall, at most Additive::kLargestKey,
// or past it; all lanes of row P hold that largest |k|, NaNs aside.
SEQATTN_HERE int64_t packed_rows(int64_t A) { return round_up(A, 4) + 1; }
SEQATTN_HERE int64_t packed_block(int64_t A) { return packed_rows(A) * kKeyBlock; }

// Shapes: query [B, T, A], keys [B, S, A], values [B, S, D], v [A], context [B, T, D], weights and scores [B, T, S],
// all contiguous. No output may overlap an input.
template <class T>
struct AttentionArgs {
  int64_t B, T_, S, A, D;
  const T* query;
  const T* keys;    // not read by forward where packed is there
  const T* packed;  // [B, ceil(S/16), P + 1, 16], or null: each tile packs the block it needs
  const T* values;
  // Batch element b has row b % heads of what depends on v.
  int64_t heads;
  const T* v_groups;  // [heads, P / 4, 8]: v[0..3] * 2^-e, -half their sum, 3 unused
  const T* v;         // [heads, v_stride]; forward: zero from A to P
  int64_t v_stride;
  const T* scales;  // [heads]: 2^e that makes the largest |v| at most 1
  bool v_finite;
  const int64_t* lengths;    // [B] or null
  const uint8_t* mask_bool;  // nonzero: attend; element (b, t, s) at b * mask_b + t * mask_t + s; or null
  const T* mask_add;         // added to the scores, -inf: don't attend; strides alike; or null
  int64_t mask_b, mask_t;
  T* context;
  T* weights;  // or null in forward
  // Split forward: scores then weights of every row, rows padded to `row` elements; each entry once per (b, t).
  T* rows;
  int64_t row;
  int64_t key_chunk;      // key blocks per item of `scores`
  int64_t context_chunk;  // columns an item of `context` computes
  bool by_weight;         // `context` alone: keys without weight are not there, whatever the masks

  // Backward.
  const T* d_weights;      // [B, T, S] gradient of the weights
  const T* d_weights_too;  // [B, T, S] another to add to it, or null
  T* d_scores;             // [B, T, S], may be d_weights itself
  uint8_t* used;           // [B, S] zeroed; set where some query attends to the key; null without a mask
  T* d_query;
  T* d_keys;
  T* d_v;  // [B, A] one sum per batch element

  SEQATTN_HERE int64_t tiles() const { return ceil_div(T_, kTileRows); }
  SEQATTN_HERE int64_t blocks() const { return ceil_div(S, kKeyBlock); }
  SEQATTN_HERE int64_t length(int64_t b) const { return lengths ? lengths[b] : S; }
  SEQATTN_HERE int64_t head(int64_t b) const { return heads == 1 ? 0 : b % heads; }
};

template <class T>
struct AttentionKernels {
  int lanes;
  // Items are (b, block of 16 keys): packs into `packed`.
  void (*pack)(const AttentionArgs<T>&, T* packed, int64_t begin, int64_t end);
  // Items are (b, tile of queries): the whole forward. `scratch` holds forward_scratch elements.
  void (*forward)(const AttentionArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // The forward in three steps with barriers between, for few tiles: items are (b, tile, chunk of key blocks),
  // (b, t), and (b, tile, chunk of columns).
  void (*scores)(const AttentionArgs<T>&, int64_t begin, int64_t end, T* scratch);
  void (*softmax)(const AttentionArgs<T>&, int64_t begin, int64_t end);
  void (*context)(const AttentionArgs<T>&, int64_t begin, int64_t end, T* scratch);
  // Items are (b, t): gradient of the scores from that of the weights.
  void (*d_scores)(const AttentionArgs<T>&, int64_t begin, int64_t end);
  // Items are (b, `lanes` columns of A): gradients of query, keys and v. `scratch` holds backward_scratch elements.
  void (*backward)(const AttentionArgs<T>&, int64_t begin, int64_t end, T* scratch);
};

// Elements of T each thread needs as scratch.
template <class T>
inline int64_t forward_scratch(const AttentionArgs<T>& a) {
  const int64_t width = packed_rows(a.A);
  const int64_t list = ceil_div(a.S * int64_t(sizeof(int32_t)), int64_t(sizeof(T)));
  return 3 * kTileRows * width + kTileRows * round_up(a.S, kKeyBlock) + packed_block(a.A) + list + 64;
}
template <class T>
inline int64_t backward_scratch(const AttentionArgs<T>& a, int lanes) {
  return (2 * a.T_ + 2 * a.S + 1) * lanes + 64;
}

SEQATTN_DECLARE_KERNELS(AttentionKernels<float>, attention_kernels_f32)
SEQATTN_DECLARE_KERNELS(AttentionKernels<double>, attention_kernels_f64)

}  // namespace seqattn
