// A linear layer x W^T whose results attention uses up a block of rows at a time, while they are in the caches, and its
// gradients: what its kernels are given, and how much memory they need.
#pragma once

#include <cstdint>

#include "attention_kernels.h"

namespace seqattn {

// Rows of a block: whole tiles of every instruction set's products.
inline constexpr int64_t kLinearRows = 60;
// Panels of every instruction set fit what is rounded up to this, and so do the rows of a block.
inline constexpr int64_t kLinearPad = 16;

// Shapes: input [B, S, K], weight [N, K], bias [N], gradients alike; all contiguous.
template <class T>
struct LinearArgs {
  int64_t B, S, K, N;
  const T* input;
  const T* weight;
  const T* bias;           // or null
  const int64_t* lengths;  // [B] or null: rows from there on are not looked at
  T* packed;               // [K, N rounded up]: W^T in panels, by `pack`
  // Backward.
  T* packed_back;  // [N, K rounded up]: W in panels, by `pack_back`
  T* d_input;      // or null
  T* d_weight;
  T* d_bias;  // or null
  // One part of the gradients for each group of blocks, so that which thread does which group never changes a sum:
  // of the weight [N, input_width()], of the bias [width()], and whatever else a kernel sums over rows.
  T* parts;
  int64_t groups, part;

  SEQATTN_HERE int64_t length(int64_t b) const { return lengths ? lengths[b] : S; }
  SEQATTN_HERE int64_t blocks() const { return ceil_div(S, kLinearRows); }
  SEQATTN_HERE int64_t width() const { return round_up(N, kLinearPad); }
  SEQATTN_HERE int64_t input_width() const { return round_up(K, kLinearPad); }
  // Groups of blocks: many, for many threads, but their sums take no more memory than the rows.
  SEQATTN_HERE int64_t most_groups() const {
    const int64_t most = 32, items = B * blocks(), fit = B * S / (2 * N + 1);
    const int64_t n = items < most ? items : most;
    return n < fit ? n : fit > 1 ? fit : 1;
  }
};

// Elements of T each thread needs as scratch.
template <class T>
inline int64_t linear_scratch(const LinearArgs<T>& a) {
  return round_up(kLinearRows * (a.width() + a.input_width() + a.K), 64 / int64_t(sizeof(T)));
}

}  // namespace seqattn
