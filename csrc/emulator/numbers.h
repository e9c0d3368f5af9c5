// Number types a CPU doesn't have: two halves and tf32, by their bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace seqattn::emulator {

// Trivial, so that they can stand in unions and arrays as CUDA's do.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even.
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign *
         std::bit_cast<float>(static_cast<uint32_t>(exponent + 112) << 23 | static_cast<uint32_t>(mantissa) << 13);
}

// To nearest, ties to even.
inline uint16_t float_to_half(float x) {
  const uint16_t sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return 0x7FFF;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  const uint32_t u = std::bit_cast<uint32_t>(size);
  return sign | static_cast<uint16_t>((u + 0xFFF + (u >> 13 & 1) - (112u << 23)) >> 13);
}

// To nearest, ties away from zero.
inline uint32_t float_to_tf32(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  return (u & 0x7F800000) == 0x7F800000 ? u : (u + 0x1000) & 0xFFFFE000;
}
inline float tf32_to_float(uint32_t bits) { return std::bit_cast<float>(bits & 0xFFFFE000); }

}  // namespace seqattn::emulator
