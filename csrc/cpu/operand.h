// The operands of a product that is summed in another type: what a packed panel and the rows it is multiplied with
// hold.
//
// A float or a double is an operand of its own. A Bfloat16Pair is two consecutive values of k, rounded to bfloat16:
// halves the weights to be read, and one instruction multiplies and adds both where there is AVX512-BF16 (which takes
// denormal numbers for zero). Elsewhere the pair is widened and multiplied in two steps.
#pragma once

#include <cstdint>

#include "simd.h"

namespace seqattn::SEQATTN_ISA {

enum class Bfloat16Pair : uint32_t {};  // the first value in the low half

// An operand type A gives kDepth, the values of k it holds; kSteps, the multiplications it takes; and for each step a
// row of a panel, a value of the other operand in all lanes, and sum += value * row.
template <class A>
struct Operand {
  using Sum = A;
  static constexpr int kDepth = 1, kSteps = 1;
  static SEQATTN_INLINE Vec<A> row(const A* p, int) { return load(p); }
  static SEQATTN_INLINE Vec<A> value(A a, int) { return broadcast(a); }
  static SEQATTN_INLINE void multiply_add(Vec<A>& sum, Vec<A> value, Vec<A> row) { sum += value * row; }
};

template <>
struct Operand<Bfloat16Pair> {
  using Sum = float;
  using Bits = IntVec<float>;
  static constexpr int kDepth = 2;

  static SEQATTN_INLINE Bits load_bits(const Bfloat16Pair* p) {
    Bits bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return bits;
  }

#if defined(__AVX512BF16__)
  static constexpr int kSteps = 1;
  static SEQATTN_INLINE Bits row(const Bfloat16Pair* p, int) { return load_bits(p); }
  static SEQATTN_INLINE Bits value(Bfloat16Pair a, int) { return (Bits)_mm512_set1_epi32(int(a)); }
  static SEQATTN_INLINE void multiply_add(Vec<float>& sum, Bits value, Bits row) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)value, (__m512bh)row);
  }
#else
  static constexpr int kSteps = 2;
  static SEQATTN_INLINE Vec<float> widen(Bits bits, int step) {
    return (Vec<float>)(step == 0 ? bits << 16 : bits & int32_t(0xffff0000));
  }
  static SEQATTN_INLINE Vec<float> row(const Bfloat16Pair* p, int step) { return widen(load_bits(p), step); }
  static SEQATTN_INLINE Vec<float> value(Bfloat16Pair a, int step) { return widen(int32_t(a) - Bits{}, step); }
  static SEQATTN_INLINE void multiply_add(Vec<float>& sum, Vec<float> value, Vec<float> row) { sum += value * row; }
#endif
};

// Operands that hold K values.
template <class A>
constexpr int64_t depth(int64_t K) {
  return (K + Operand<A>::kDepth - 1) / Operand<A>::kDepth;
}

// The bits of x rounded to bfloat16, to nearest even; NaN stays NaN.
SEQATTN_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return uint16_t((x == x ? rounded : bits | 0x400000) >> 16);
}

// out[0 .. depth(n)) = in[0 .. n) as pairs, zero beside an odd last value.
inline void round_row(Bfloat16Pair* out, const float* in, int64_t n) {
  auto* values = reinterpret_cast<unsigned char*>(out);
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t value = to_bfloat16(in[i]);
    __builtin_memcpy(values + 2 * i, &value, sizeof(value));
  }
  if (n % 2) __builtin_memset(values + 2 * n, 0, 2);
}

// A vector of values as half a vector of pairs.
SEQATTN_INLINE void round_vector(Bfloat16Pair* out, Vec<float> x) {
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  const Wide bits = (Wide)x;
  const Wide rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Narrow values = __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Narrow);
  __builtin_memcpy(out, &values, sizeof(values));
}

// out[j * ldout + i] = pair j of in[i * ldin ..] for i < rows, zero for i in [rows, lanes); rows of `columns` values.
inline void transpose_pairs(Bfloat16Pair* out, int64_t ldout, const float* in, int64_t ldin, int64_t rows,
                            int64_t columns) {
  for (int64_t j = 0; j < depth<Bfloat16Pair>(columns); ++j) {
    for (int64_t i = 0; i < kLanes<float>; ++i) {
      uint32_t pair = 0;
      if (i < rows) {
        pair = to_bfloat16(in[i * ldin + 2 * j]);
        if (2 * j + 1 < columns) pair |= uint32_t(to_bfloat16(in[i * ldin + 2 * j + 1])) << 16;
      }
      out[j * ldout + i] = Bfloat16Pair(pair);
    }
  }
}

}  // namespace seqattn::SEQATTN_ISA
