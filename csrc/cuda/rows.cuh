// Kernels around every path: rows into and out of the internal order, biases, their gradients.
#pragma once

#include "stepwise.cuh"

namespace seqattn::gpu {

inline constexpr int kSumColumns = 32, kSumLanes = 8;  // of a block of column_sums
inline constexpr int kWrittenValues = 400;             // kernel arguments hold 4 KiB

template <class From, class To>
SEQATTN_KERNEL(kStepThreads)
convert_kernel(const From* from, To* to, int64_t count) {
  const int64_t i = global_thread();
  if (i >= count) return;
  if constexpr (std::is_same_v<To, double>) {
    to[i] = from ? double(widen(from[i])) : 0.0;
  } else {
    to[i] = rounded<To>(from ? Sum<To>(widen(from[i])) : Sum<To>(0));
  }
}

template <class Cell, class T>
SEQATTN_KERNEL(kStepThreads)
combine_bias_kernel(const T* b_ih0, const T* b_hh0, const T* b_ih1, const T* b_hh1, Sum<T>* bias, int64_t hidden) {
  constexpr int G = Cell::kGates, S = Cell::kSlots;
  const int64_t j = global_thread();
  if (j >= hidden) return;
  const int d = block_index_z();
  const T *b_ih = d ? b_ih1 : b_ih0, *b_hh = d ? b_hh1 : b_hh0;
  SEQATTN_UNROLL
  for (int s = 0; s < S; ++s) {
    Sum<T> sum = 0;
    if (s < G) sum += widen(b_ih[Cell::x_gate(s) * hidden + j]);
    if (s >= S - G) sum += widen(b_hh[Cell::h_gate(s) * hidden + j]);
    bias[(int64_t(d) * S + s) * hidden + j] = sum;
  }
}

template <class Cell, class T>
SEQATTN_KERNEL(kStepThreads)
split_bias_kernel(const Sum<T>* sums, T* d_b_ih, T* d_b_hh, int64_t hidden) {
  constexpr int G = Cell::kGates, S = Cell::kSlots;
  const int64_t j = global_thread();
  if (j >= hidden) return;
  SEQATTN_UNROLL
  for (int s = 0; s < S; ++s) {
    const T sum = rounded<T>(sums[s * hidden + j]);
    if (s < G) d_b_ih[Cell::x_gate(s) * hidden + j] = sum;
    if (s >= S - G) d_b_hh[Cell::h_gate(s) * hidden + j] = sum;
  }
}

// One thread for each value; `scatter` says which way.
template <class T, bool scatter>
SEQATTN_KERNEL(kStepThreads)
move_rows_kernel(SEQATTN_KERNEL_PARAM Rows rows, const T* from, T* to, int64_t width) {
  const int64_t n = global_thread(), pair = n / width, i = n % width;
  if (pair >= rows.steps * rows.batch) return;
  // Neighbours on the written side are neighbours here.
  const bool by_batch = scatter && rows.out_batch > rows.out_step;
  const int64_t t = by_batch ? pair % rows.steps : pair / rows.batch;
  const int64_t b = by_batch ? pair / rows.steps : pair % rows.batch;
  if (!rows.exists(t, b)) return;
  const int64_t inside = rows.row(t, b) * width + i, outside = rows.out_row(t, b) * width + i;
  const T zero = rounded<T>(0);
  if constexpr (scatter) {
    to[outside] = rows.valid(t, b) ? from[inside] : zero;
  } else {
    to[inside] = rows.valid(t, b) ? from[outside] : zero;
  }
}

// Blocks of kSumColumns columns (x) and chunk_rows rows (y), kSumLanes threads a column.
template <class T>
SEQATTN_KERNEL(kSumColumns* kSumLanes)
partial_sums_kernel(const T* from, int64_t rows, int64_t columns, int64_t chunk_rows, Sum<T>* partial) {
  using R = Sum<T>;
  const Shared<R> lanes = shared_array<R, kSumColumns * kSumLanes>();
  const int column = thread_index() % kSumColumns, lane = thread_index() / kSumColumns;
  const int64_t j = int64_t(block_index()) * kSumColumns + column;
  const int64_t begin = block_index_y() * chunk_rows;
  const int64_t end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
  R sum = 0;
  if (j < columns) {
    for (int64_t r = begin + lane; r < end; r += kSumLanes) sum += widen(from[r * columns + j]);
  }
  store(lanes + thread_index(), sum);
  block_sync();
  if (lane != 0 || j >= columns) return;
  for (int l = 1; l < kSumLanes; ++l) sum += load(lanes + l * kSumColumns + column);
  partial[block_index_y() * columns + j] = sum;
}

template <class R>
SEQATTN_KERNEL(kStepThreads)
total_sums_kernel(const R* partial, int64_t chunks, int64_t columns, R* sums) {
  const int64_t j = global_thread();
  if (j >= columns) return;
  R sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[c * columns + j];
  sums[j] = sum;
}

// A float as two bfloat16, of which the first holds its upper bits: together 16 bits of precision. Finite wherever x
// is. An infinite x meets zeros in the other factor's second half, so products of infinities are NaN.
struct Halves {
  bfloat16 high, low;
};
SEQATTN_DEVICE Halves halves(float x) {
  const float high = x - x == 0 ? bits_float(float_bits(x) & 0xffff0000u) : x;
  return {from_float<bfloat16>(high), from_float<bfloat16>(x - x == 0 ? x - high : 0.f)};
}

// Three copies of a matrix, high, high, low (second_low: high, low, high), beside each other or below each other; each
// is the part from `begin` on of a factor with `depth` columns (rows).
template <class T>
SEQATTN_KERNEL(kStepThreads)
split_kernel(const T* from, int64_t rows, int64_t columns, int64_t ld, bfloat16* to, int64_t depth, int64_t begin,
             bool stacked, bool second_low) {
  const int64_t i = global_thread(), r = i / columns, c = i % columns;
  if (r >= rows) return;
  const Halves x = halves(from[r * ld + c]);
  SEQATTN_UNROLL
  for (int part = 0; part < 3; ++part) {
    const int64_t place = part * depth + begin;
    const int64_t index = stacked ? (place + r) * columns + c : r * 3 * depth + place + c;
    to[index] = part == (second_low ? 1 : 2) ? x.low : x.high;
  }
}

template <int N>
struct Values {
  int64_t value[N];
};

template <int N>
SEQATTN_KERNEL(kStepThreads)
write_values_kernel(SEQATTN_KERNEL_PARAM Values<N> values, int count, int64_t* to) {
  for (int i = thread_index(); i < count; i += block_size()) to[i] = values.value[i];
}

}  // namespace seqattn::gpu
