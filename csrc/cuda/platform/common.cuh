// What is made of the platform's primitives, the same text for nvcc and the emulator.
#pragma once

#include <cmath>

namespace seqattn::gpu {

// N numbers loaded and stored as one: 4, 8 or 16 bytes, aligned to its size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  SEQATTN_DEVICE T& operator[](int i) { return data[i]; }
  SEQATTN_DEVICE const T& operator[](int i) const { return data[i]; }
};

SEQATTN_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

template <class T>
SEQATTN_DEVICE T warp_sum(T x) {
  SEQATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <class T>
SEQATTN_DEVICE T warp_max(T x) {
  SEQATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    const T y = shuffle_xor(x, mask);
    x = x < y ? y : x;
  }
  return x;
}

// A barrier of all blocks of a cooperative launch, in halves, over a counter in global memory that starts at 0 and only
// grows: the n-th barrier ends when it reaches n * blocks. Called by all threads of a block; what the block wrote
// before grid_arrive, others see after grid_wait (with load_coherent).
SEQATTN_DEVICE void grid_arrive(uint32_t* counter) {
  block_sync();
  if (thread_index() == 0) add_release(counter, 1);
}
SEQATTN_DEVICE void grid_wait(const uint32_t* counter, uint32_t target) {
  if (thread_index() == 0) {
    SpinGuard guard;
    while (load_acquire(counter) < target) guard.spin();
  }
  block_sync();
}

// Math of the cells (../../cells/cell.h). Exact: for float and double, as accurate as the C library.
template <class T>
struct Math {
  using Value = T;
  static SEQATTN_DEVICE T exp(T x) { return ::exp(x); }
  static SEQATTN_DEVICE T sigmoid(T x) { return 1 / (1 + ::exp(-x)); }
  static SEQATTN_DEVICE T tanh(T x) { return ::tanh(x); }
  static SEQATTN_DEVICE T relu(T x) { return x > 0 || x != x ? x : T(0); }
  static SEQATTN_DEVICE T positive(T x, T y) { return x > 0 ? y : T(0); }
};
// Fast: ex2 and rcp of the special function unit, absolute error below 1e-6, no branches.
struct FastMath {
  using Value = float;
  static constexpr float kLog2e = 1.44269504f;
  static SEQATTN_DEVICE float exp(float x) { return exp2_approx(kLog2e * x); }
  static SEQATTN_DEVICE float sigmoid(float x) { return reciprocal_approx(1 + exp2_approx(-kLog2e * x)); }
  static SEQATTN_DEVICE float tanh(float x) { return 1 - 2 * reciprocal_approx(1 + exp2_approx(2 * kLog2e * x)); }
  static SEQATTN_DEVICE float relu(float x) { return x > 0 || x != x ? x : 0; }
  static SEQATTN_DEVICE float positive(float x, float y) { return x > 0 ? y : 0; }
};

// For results that are rounded to bfloat16: tanh.approx, relative error 2^-11, absolute error of sigmoid 2^-12.
struct BriefMath : FastMath {
  static SEQATTN_DEVICE float sigmoid(float x) { return 0.5f + 0.5f * tanh_approx(0.5f * x); }
  static SEQATTN_DEVICE float tanh(float x) { return tanh_approx(x); }
};

}  // namespace seqattn::gpu
