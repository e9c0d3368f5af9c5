// Vectors of float or double in the width of the instruction set this unit is compiled for, and the functions the
// kernels need of them. Everything lives in a namespace named after the instruction set, and no standard-library
// function is called: units of different instruction sets must not share inline code that the linker could merge.
//
// GCC and Clang vector extensions give the arithmetic (a * b + c is contracted to a fused multiply-add where there is
// one), so the same source serves AVX-512, AVX2, SSE2 and NEON; intrinsics appear where one saves instructions.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SEQATTN_ISA
#error "compile this with -DSEQATTN_ISA=<namespace of the instruction set>"
#endif

namespace seqattn::SEQATTN_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif
#endif

#define SEQATTN_INLINE inline __attribute__((always_inline))

namespace detail {
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
};
}  // namespace detail

template <class T>
using Vec = typename detail::VectorOf<T>::type;
template <class T>
using IntVec = typename detail::VectorOf<T>::integer;

// Lanes of a vector of T.
template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
SEQATTN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
SEQATTN_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
SEQATTN_INLINE Vec<T> broadcast(T a) {
  return a - Vec<T>{};
}

// The first n lanes from memory, zero in the others; reads nothing past p + n.
template <class T>
SEQATTN_INLINE Vec<T> load_partial(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  }
#else
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

// Writes the first n lanes and nothing past them.
template <class T>
SEQATTN_INLINE void store_partial(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    store(p, v);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  }
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// max(bound, x) and min(bound, x) that let a NaN in x through, as the instructions do that return their second operand
// where either is one.
template <class V>
SEQATTN_INLINE V at_least(V x, V bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x);
  if constexpr (sizeof(x[0]) == 8) return (V)_mm512_maskz_max_pd(0xff, (__m512d)bound, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm256_max_ps((__m256)bound, (__m256)x);
  if constexpr (sizeof(x[0]) == 8) return (V)_mm256_max_pd((__m256d)bound, (__m256d)x);
#endif
  return bound > x ? bound : x;
}
template <class V>
SEQATTN_INLINE V at_most(V x, V bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm512_maskz_min_ps(0xffff, (__m512)bound, (__m512)x);
  if constexpr (sizeof(x[0]) == 8) return (V)_mm512_maskz_min_pd(0xff, (__m512d)bound, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm256_min_ps((__m256)bound, (__m256)x);
  if constexpr (sizeof(x[0]) == 8) return (V)_mm256_min_pd((__m256d)bound, (__m256d)x);
#endif
  return bound < x ? bound : x;
}

template <class T>
SEQATTN_INLINE IntVec<T> sign_bits(Vec<T> x) {
  return (IntVec<T>)x & (IntVec<T>)broadcast<T>(T(-0.0));
}

template <class T>
SEQATTN_INLINE Vec<T> abs(Vec<T> x) {
  return (Vec<T>)((IntVec<T>)x ^ sign_bits<T>(x));
}

template <class T>
SEQATTN_INLINE T sum_lanes(Vec<T> v) {
  T s = 0;
  for (int i = 0; i < kLanes<T>; ++i) s += v[i];
  return s;
}

template <class T>
SEQATTN_INLINE T max_lanes(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < kLanes<T>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

namespace detail {
// x = n ln 2 + f with |f| <= ln 2 / 2 : e^f = 1 + f + f^2 q(f), q a minimax polynomial (4e-9 relative for float, 5e-19
// for double before rounding).
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLn2Hi = 0.693145751953125f;
  static constexpr float kLn2Lo = 1.42860682030941723212e-6f;
  static constexpr float kMin = -104.0f, kMax = 89.0f;  // exp is 0 below and infinite above
  static constexpr int kDegree = 4;
  static constexpr float kQ[kDegree + 1] = {1.3814320377154e-3f, 8.3688510851485e-3f, 4.1668401087841e-2f,
                                            0.1666651952389f, 0.49999993373066f};
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.4426950408889634074;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kMin = -746.0, kMax = 710.0;
  static constexpr int kDegree = 10;
  static constexpr double kQ[kDegree + 1] = {2.0914717341716375952e-9,
                                             2.5105259538448493419e-8,
                                             2.7557273570102139673e-7,
                                             2.7557255297969644392e-6,
                                             2.4801587325605322782e-5,
                                             1.9841269874901259234e-4,
                                             1.3888888888883731828e-3,
                                             8.3333333333261120526e-3,
                                             4.1666666666666669767e-2,
                                             0.16666666666666671008,
                                             0.5};
  static constexpr int kMantissa = 52, kBias = 1023;
};

// tanh(x) = x + x^3 q(x^2) up to kNear (relative error 4e-9 for float, 2e-21 for double before rounding); it rounds to
// 1 from kOne on.
template <class T>
struct TanhConstants;
template <>
struct TanhConstants<float> {
  static constexpr float kNear = 0.55f, kOne = 9.1f;
  static constexpr int kDegree = 4;
  static constexpr float kQ[kDegree + 1] = {-6.61022783111e-3f, 2.13093886644e-2f, -5.39094288275e-2f, 0.13333113729f,
                                            -0.33333332008f};
};
template <>
struct TanhConstants<double> {
  static constexpr double kNear = 0.55, kOne = 19.1;
  static constexpr int kDegree = 12;
  static constexpr double kQ[kDegree + 1] = {
      -3.0095084486657233497e-6, 1.3343110444710784723e-5, -3.8069134199441373402e-5, 9.6537711954963358817e-5,
      -2.390482421681319867e-4,  5.9001544820398743353e-4, -1.4558331632523268668e-3, 3.5921279525916010399e-3,
      -8.8632355261935669705e-3, 2.1869488536057545266e-2, -5.3968253968252629996e-2, 0.13333333333333332612,
      -0.33333333333333333333};
};

// Splits x = n ln 2 + f; returns f, and n + kMagic in *shifted: a whole number in its lowest bits.
template <class T>
SEQATTN_INLINE Vec<T> reduce(Vec<T> x, Vec<T>* shifted) {
  using C = ExpConstants<T>;
  *shifted = x * C::kLog2e + C::kMagic;
  const Vec<T> n = *shifted - C::kMagic;
  return (x - n * C::kLn2Hi) - n * C::kLn2Lo;
}

// The sum of kQ[i] x^(kDegree - i).
template <class Constants, class T>
SEQATTN_INLINE Vec<T> polynomial(Vec<T> x) {
  Vec<T> q = broadcast<T>(Constants::kQ[0]);
#pragma GCC unroll 16
  for (int i = 1; i <= Constants::kDegree; ++i) q = q * x + Constants::kQ[i];
  return q;
}

// e^f for what `reduce` leaves.
template <class T>
SEQATTN_INLINE Vec<T> exp_reduced(Vec<T> f) {
  return (polynomial<ExpConstants<T>, T>(f) * f + T(1)) * f + T(1);
}

// v * 2^n for n in [-2 * bias, 2 * bias].
template <class T>
SEQATTN_INLINE Vec<T> scale(Vec<T> v, Vec<T> shifted) {
  using C = ExpConstants<T>;
#if defined(__AVX512F__)
  const Vec<T> n = shifted - C::kMagic;
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)n);
  } else {
    return (Vec<T>)_mm512_maskz_scalef_pd(0xff, (__m512d)v, (__m512d)n);
  }
#else
  // Two factors, so that overflow and denormal results come out right.
  IntVec<T> i = (IntVec<T>)shifted - (IntVec<T>)broadcast<T>(C::kMagic);
  IntVec<T> half = i >> 1;
  Vec<T> a = (Vec<T>)((half + C::kBias) << C::kMantissa);
  Vec<T> b = (Vec<T>)((i - half + C::kBias) << C::kMantissa);
  return v * a * b;
#endif
}

// 2^n for n in (-bias, bias]: what lies above the number in the bits of `shifted` is shifted out.
template <class T>
SEQATTN_INLINE Vec<T> power_of_two(Vec<T> shifted) {
  using C = ExpConstants<T>;
  return (Vec<T>)(((IntVec<T>)shifted << C::kMantissa) + (IntVec<T>)broadcast<T>(1));
}
}  // namespace detail

template <class T>
SEQATTN_INLINE Vec<T> exp(Vec<T> x) {
  using C = detail::ExpConstants<T>;
  x = at_most(at_least(x, broadcast<T>(C::kMin)), broadcast<T>(C::kMax));
  Vec<T> shifted;
  const Vec<T> f = detail::reduce<T>(x, &shifted);
  return detail::scale<T>(detail::exp_reduced<T>(f), shifted);
}

// 1 / (1 + e^-x), relative error about 1.5 units in the last place.
template <class T>
SEQATTN_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

// About a unit in the last place: x + x^3 q(x^2) near 0, elsewhere 1 - 2 / (e^2|x| + 1), where the last subtraction
// rounds a quotient that is small beside 1.
template <class T>
SEQATTN_INLINE Vec<T> tanh(Vec<T> x) {
  using C = detail::TanhConstants<T>;
  const Vec<T> m = at_most(abs<T>(x), broadcast<T>(C::kOne));
  Vec<T> shifted;
  const Vec<T> f = detail::reduce<T>(m + m, &shifted);
  const Vec<T> far = T(1) - T(2) / (detail::exp_reduced<T>(f) * detail::power_of_two<T>(shifted) + T(1));
  const Vec<T> square = m * m;
  const Vec<T> near = m + m * (square * detail::polynomial<C, T>(square));
  return (Vec<T>)((IntVec<T>)(m < broadcast<T>(C::kNear) ? near : far) | sign_bits<T>(x));
}

// The functions a cell or a score asks for, as one name to pass to its templates.
template <class T>
struct Math {
  using Value = Vec<T>;
  static SEQATTN_INLINE Value exp(Value x) { return SEQATTN_ISA::exp<T>(x); }
  static SEQATTN_INLINE Value sigmoid(Value x) { return SEQATTN_ISA::sigmoid<T>(x); }
  static SEQATTN_INLINE Value tanh(Value x) { return SEQATTN_ISA::tanh<T>(x); }
  static SEQATTN_INLINE Value relu(Value x) { return at_least(x, Value{}); }
  static SEQATTN_INLINE Value at_most(Value x, Value bound) { return SEQATTN_ISA::at_most(x, bound); }
  static SEQATTN_INLINE Value positive(Value x, Value y) { return x > Value{} ? y : Value{}; }
};

}  // namespace seqattn::SEQATTN_ISA
