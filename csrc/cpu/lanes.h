// What all lanes of a vector come to: their sum, and the largest.
#pragma once

#include "simd.h"

namespace seqattn::SEQATTN_ISA {

template <int... I>
struct Lanes {};
template <int N, int... I>
struct Counted : Counted<N - 1, N - 1, I...> {};
template <int... I>
struct Counted<0, I...> {
  using type = Lanes<I...>;
};
// The numbers of all lanes of a vector of T.
template <class T>
using AllLanes = typename Counted<kLanes<T>>::type;

namespace detail {
// v with lanes whose numbers differ in the bit `step` exchanged.
template <class T, int step, int... I>
SEQATTN_INLINE Vec<T> exchange(Vec<T> v, Lanes<I...>) {
  return __builtin_shufflevector(v, v, (I ^ step)...);
}
}  // namespace detail

// The sum (the largest, NaNs aside) of all lanes, in all lanes; by halves, so that the order is the same everywhere.
template <class T, int step = kLanes<T> / 2>
SEQATTN_INLINE Vec<T> sum_all(Vec<T> v) {
  if constexpr (step > 0) return sum_all<T, step / 2>(v + detail::exchange<T, step>(v, AllLanes<T>()));
  return v;
}
template <class T, int step = kLanes<T> / 2>
SEQATTN_INLINE Vec<T> max_all(Vec<T> v) {
  if constexpr (step > 0) {
    const Vec<T> other = detail::exchange<T, step>(v, AllLanes<T>());
    return max_all<T, step / 2>(other > v ? other : v);
  }
  return v;
}

}  // namespace seqattn::SEQATTN_ISA
