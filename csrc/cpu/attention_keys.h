// Packing of keys for additive attention, and the vector helpers its kernels share. For attention_kernels.cpp alone.
#pragma once

#include "attention_kernels.h"
#include "lanes.h"
#include "scores/registry.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// max(most, |x|), NaN from the first NaN on.
template <class T>
SEQATTN_INLINE Vec<T> larger(Vec<T> most, Vec<T> x) {
  const Vec<T> size = abs<T>(x);
  return (most > size) | (most != most) ? most : size;
}

// Whether no lane is past the bound, or NaN.
template <class T>
SEQATTN_INLINE bool all_at_most(Vec<T> x, T bound) {
  bool all = true;
  for (int i = 0; i < kLanes<T>; ++i) all &= x[i] <= bound;
  return all;
}

template <class T>
inline constexpr T kInfinity = T(__builtin_inf());

// One query makes a single pass over keys and values, at the speed of the outer caches: ask for what comes next early
// enough that neither the end of a page nor the work between two passes leaves them idle.
template <class T, int lines>
SEQATTN_INLINE void prefetch_ahead(const T* p) {
  constexpr int kAhead = 2048;
#pragma GCC unroll 16
  for (int i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + i * 64);
}

// The lower (upper) halves of a and b, interleaved.
template <class T, int N, int... I>
struct MakeLanes : MakeLanes<T, N - 1, N - 1, I...> {};
template <class T, int... I>
struct MakeLanes<T, 0, I...> {
  static SEQATTN_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
    return __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + I / 2)...);
  }
  static SEQATTN_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
    return __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + kLanes<T> / 2 + I / 2)...);
  }
};

// Transposes kLanes vectors of kLanes elements: each stage is a perfect shuffle of all of them.
template <class T>
SEQATTN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  using Pick = MakeLanes<T, W>;
#pragma GCC unroll 8
  for (int stage = 1; stage < W; stage *= 2) {
    Vec<T> next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = Pick::interleave_low(rows[i], rows[i + W / 2]);
      next[2 * i + 1] = Pick::interleave_high(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// What a packed block holds: tanh k, e^2k or k, by its largest |k|.
enum class Keys { small, exponential, plain };

template <class T>
SEQATTN_INLINE Keys form_of(T kmax) {
  return kmax <= T(Additive::kSmall) ? Keys::small : kmax <= Additive::kLargestKey<T> ? Keys::exponential : Keys::plain;
}

// Packs keys [16, A] (the last `16 - count` missing: taken as 0) into one block.
template <class T>
void pack_block(const T* keys, int64_t count, int64_t A, T* block) {
  constexpr int W = kLanes<T>;
  Vec<T> largest{};
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t a = 0; a < A; a += W) {
      const Vec<T> size = abs<T>(load_partial(keys + s * A + a, A - a));
      largest = size > largest ? size : largest;
    }
  }
  const T kmax = max_lanes<T>(largest);
  const Keys form = form_of(kmax);
  const int64_t rows = packed_rows(A) - 1;
  for (int64_t a = 0; a < rows; a += W) {
    const int64_t columns = rows - a < W ? rows - a : W, left = A > a ? A - a : 0;
    for (int64_t first = 0; first < kKeyBlock; first += W) {
      Vec<T> tile[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int64_t s = first + i;
        const Vec<T> k = s < count ? load_partial(keys + s * A + a, left) : Vec<T>{};
        tile[i] = form == Keys::exponential ? exp<T>(k + k) : form == Keys::small ? tanh<T>(k) : k;
      }
      transpose<T>(tile);
      for (int64_t i = 0; i < columns; ++i) store(block + (a + i) * kKeyBlock + first, tile[i]);
    }
  }
  for (int64_t i = 0; i < kKeyBlock; i += W) store(block + rows * kKeyBlock + i, broadcast(kmax));
}

template <class T>
void pack(const AttentionArgs<T>& args, T* packed, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / args.blocks(), s = item % args.blocks() * kKeyBlock;
    const int64_t count = args.S - s < kKeyBlock ? args.S - s : kKeyBlock;
    pack_block(args.keys + (b * args.S + s) * args.A, count, args.A, packed + item * packed_block(args.A));
  }
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
