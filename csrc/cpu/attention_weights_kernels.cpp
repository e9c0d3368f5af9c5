// Weights from scores, a row at a time while it stays in the first-level cache.
#include "attention_weights_kernels.h"

#include "lanes.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class T>
inline constexpr T kInfinity = T(__builtin_inf());

template <class T>
SEQATTN_INLINE Vec<T> square_root(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
  } else {
    return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
  }
#else
  for (int i = 0; i < kLanes<T>; ++i) v[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(v[i]))) : T(__builtin_sqrt(v[i]));
  return v;
#endif
}

// As many bytes as a vector of T has lanes.
template <class T>
struct BytesOf;
template <>
struct BytesOf<float> {
  typedef uint8_t type __attribute__((vector_size(kVectorBytes / 4)));
};
template <>
struct BytesOf<double> {
  typedef uint8_t type __attribute__((vector_size(kVectorBytes / 8)));
};

// All ones in the lanes whose byte is not zero; reads the first n bytes.
template <class T>
SEQATTN_INLINE IntVec<T> load_flags(const uint8_t* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16(n >= kLanes<T> ? (1u << kLanes<T>)-1 : (1u << n) - 1), p);
  if constexpr (sizeof(T) == 4) {
    return (IntVec<T>)_mm512_maskz_cvtepu8_epi32(0xffff, bytes) != IntVec<T>{};
  } else {
    return (IntVec<T>)_mm512_maskz_cvtepu8_epi64(0xff, bytes) != IntVec<T>{};
  }
#else
  typename BytesOf<T>::type bytes{};
  if (n >= kLanes<T>) {
    __builtin_memcpy(&bytes, p, sizeof(bytes));
  } else {
    for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  }
  return __builtin_convertvector(bytes, IntVec<T>) != IntVec<T>{};
#endif
}

template <class T, int... I>
SEQATTN_INLINE IntVec<T> lane_numbers(Lanes<I...>) {
  return IntVec<T>{I...};
}

// All ones in the lanes below n.
template <class T>
SEQATTN_INLINE IntVec<T> first_lanes(int64_t n) {
  using I = decltype(IntVec<T>{}[0] + 0);
  return lane_numbers<T>(AllLanes<T>()) < IntVec<T>{} + I(n < kLanes<T> ? n : kLanes<T>);
}

template <class T>
SEQATTN_INLINE bool any_lane(IntVec<T> v) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)v, (__m512i)v) != 0;
#else
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= v[i] != 0;
  return any;
#endif
}

// The mask of one row.
template <class T>
struct RowMask {
  const uint8_t* flags;
  const T* added;
  int64_t length;

  RowMask(const WeightArgs<T>& args, int64_t b, int64_t t) {
    const int64_t at = b * args.mask_b + t * args.mask_t;
    flags = args.mask_bool ? args.mask_bool + at : nullptr;
    added = args.mask_add ? args.mask_add + at : nullptr;
    length = args.length(b);
  }
  // Which of the keys from s on are attended to; none past S = s + left.
  SEQATTN_INLINE IntVec<T> attended(int64_t s, int64_t left) const {
    IntVec<T> attend = first_lanes<T>(length - s < left ? length - s : left);
    if (flags) attend &= load_flags<T>(flags + s, left);
    if (added) attend &= load_partial(added + s, left) != broadcast(-kInfinity<T>);
    return attend;
  }
};

// What the normalizer gets, into `row`. Returns whether anything is attended to; *top is the largest, NaNs aside.
template <class T>
SEQATTN_INLINE bool masked_row(const WeightArgs<T>& args, const RowMask<T>& mask, const T* scores, T* row, int64_t S,
                               T* top) {
  constexpr int W = kLanes<T>;
  const Vec<T> scale = broadcast(args.scale), cooling = broadcast(args.inverse_temperature);
  const Vec<T> none = broadcast(-kInfinity<T>), fill = broadcast(args.fill);
  const bool masked = mask.flags || mask.added || mask.length < S;
  Vec<T> largest = none;
  IntVec<T> seen{};
  for (int64_t s = 0; s < S; s += W) {
    const int64_t left = S - s;
    Vec<T> x = load_partial(scores + s, left) * scale;
    if (masked) {
      const IntVec<T> attend = mask.attended(s, left);
      seen |= attend;
      if (mask.added) {
        const Vec<T> m = load_partial(mask.added + s, left);
        // Hidden by the added mask itself: -inf, whatever the score; by the length: `fill`.
        x = attend ? x + m : none;
        x = first_lanes<T>(mask.length - s) ? x : fill;
      } else {
        x = attend ? x : fill;
      }
    }
    x = x * cooling;
    if (left < W) x = first_lanes<T>(left) ? x : none;
    largest = x > largest ? x : largest;
    store_partial(row + s, x, left);
  }
  *top = max_all<T>(largest)[0];
  return masked ? any_lane<T>(seen) : S > 0;
}

template <class T>
SEQATTN_INLINE void fill_row(T* row, int64_t S, T value) {
  for (int64_t s = 0; s < S; s += kLanes<T>) store_partial(row + s, broadcast(value), S - s);
}

// Loads lanes [s, S), -inf past the end.
template <class T>
SEQATTN_INLINE Vec<T> load_row(const T* row, int64_t s, int64_t S) {
  if (S - s >= kLanes<T>) return load(row + s);
  const Vec<T> x = load_partial(row + s, S - s);
  return first_lanes<T>(S - s) ? x : broadcast(-kInfinity<T>);
}

// Each returns whether the row holds a NaN.
template <class T>
SEQATTN_INLINE bool softmax(T* row, int64_t S, T top) {
  Vec<T> sum{};
  for (int64_t s = 0; s < S; s += kLanes<T>) {
    const Vec<T> e = exp<T>(load_row(row, s, S) - top);
    sum += e;
    store_partial(row + s, e, S - s);
  }
  const Vec<T> inverse = T(1) / sum_all<T>(sum);
  for (int64_t s = 0; s < S; s += kLanes<T>) {
    store_partial(row + s, load_partial(row + s, S - s) * inverse, S - s);
  }
  return inverse[0] != inverse[0];
}

// Sets the row to its distance from `top`, times `factor`; true where that is NaN somewhere.
template <class T>
SEQATTN_INLINE bool lower(T* row, int64_t S, T top, T factor) {
  IntVec<T> bad{};
  for (int64_t s = 0; s < S; s += kLanes<T>) {
    const Vec<T> x = (load_row(row, s, S) - top) * factor;
    bad |= x != x;
    store_partial(row + s, x, S - s);
  }
  if (!any_lane<T>(bad) && top != -kInfinity<T>) return false;
  fill_row(row, S, T(__builtin_nan("")));
  return true;
}

// sum max(x - tau, 0) = 1 by Newton's method from below. The sum is convex and piecewise linear in tau, so each step
// gives the root for the keys above tau, and it ends, exact, once no more of them fall below.
template <class T>
SEQATTN_INLINE bool sparsemax(T* row, int64_t S, T top) {
  if (lower(row, S, top, T(1))) return true;
  T tau = -1, above = T(S) + 1;
  for (;;) {
    const Vec<T> bound = broadcast(tau);
    Vec<T> sum{}, count{};
    for (int64_t s = 0; s < S; s += kLanes<T>) {
      const Vec<T> x = load_row(row, s, S);
      sum += x > bound ? x : Vec<T>{};
      count += x > bound ? broadcast(T(1)) : Vec<T>{};
    }
    const T now = sum_all<T>(count)[0];
    if (!(now < above)) break;
    above = now;
    tau = (sum_all<T>(sum)[0] - 1) / now;
  }
  for (int64_t s = 0; s < S; s += kLanes<T>) {
    const Vec<T> x = load_row(row, s, S) - tau;
    store_partial(row + s, x > Vec<T>{} ? x : Vec<T>{}, S - s);
  }
  return false;
}

// sum max(x / 2 - tau, 0)^2 = 1 likewise; steps shrink quadratically until rounding ends them.
template <class T>
SEQATTN_INLINE bool entmax15(T* row, int64_t S, T top) {
  if (lower(row, S, top, T(0.5))) return true;
  T tau = -1;
  for (int step = 0; step < 64; ++step) {
    Vec<T> squares{}, sum{};
    for (int64_t s = 0; s < S; s += kLanes<T>) {
      const Vec<T> x = load_row(row, s, S) - tau, d = x > Vec<T>{} ? x : Vec<T>{};
      squares += d * d;
      sum += d;
    }
    const T next = tau + (sum_all<T>(squares)[0] - 1) / (2 * sum_all<T>(sum)[0]);
    if (!(next > tau)) break;
    tau = next;
  }
  for (int64_t s = 0; s < S; s += kLanes<T>) {
    const Vec<T> x = load_row(row, s, S) - tau, d = x > Vec<T>{} ? x : Vec<T>{};
    store_partial(row + s, d * d, S - s);
  }
  return false;
}

template <class T>
SEQATTN_INLINE bool sigmoids(T* row, int64_t S) {
  IntVec<T> bad{};
  for (int64_t s = 0; s < S; s += kLanes<T>) {
    const Vec<T> x = sigmoid<T>(load_partial(row + s, S - s));
    bad |= x != x;
    store_partial(row + s, x, S - s);
  }
  return any_lane<T>(bad);
}

// Keys up to which a row is kept in registers.
template <class T>
inline constexpr int64_t kShort = 8 * kLanes<T>;

// Softmax of the S keys of a row, NV vectors of them, hidden by the mask's flags at most: zero where hidden, and where
// all are.
template <class T, int NV, bool flagged>
SEQATTN_INLINE void softmax_in_registers(const WeightArgs<T>& args, const RowMask<T>& mask, const T* scores, T* weights,
                                         int64_t S) {
  constexpr int W = kLanes<T>;
  const Vec<T> scale = broadcast(args.scale), cooling = broadcast(args.inverse_temperature);
  const Vec<T> none = broadcast(-kInfinity<T>);
  const int64_t last = S - (NV - 1) * W;
  Vec<T> x[NV], largest[2] = {none, none}, sum[2] = {};
  IntVec<T> attend[NV], seen{};
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    const bool whole = j < NV - 1;
    x[j] = (whole ? load(scores + j * W) : load_partial(scores + j * W, last)) * scale * cooling;
    if (flagged) {
      attend[j] = load_flags<T>(mask.flags + j * W, whole ? W : last);
      seen |= attend[j];
    } else if (!whole) {
      attend[j] = first_lanes<T>(last);
    }
    if (flagged || !whole) x[j] = attend[j] ? x[j] : none;
    largest[j % 2] = x[j] > largest[j % 2] ? x[j] : largest[j % 2];
  }
  const Vec<T> top = max_all<T>(largest[0] > largest[1] ? largest[0] : largest[1]);
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    x[j] = exp<T>(x[j] - top);
    sum[j % 2] += x[j];
  }
  const Vec<T> inverse = T(1) / sum_all<T>(sum[0] + sum[1]);
  const bool any = !flagged || any_lane<T>(seen);
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    Vec<T> w = x[j] * inverse;
    if (flagged) w = any && attend[j] ? w : Vec<T>{};
    if (j < NV - 1) {
      store(weights + j * W, w);
    } else {
      store_partial(weights + j * W, w, last);
    }
  }
}

template <class T, bool flagged>
void short_softmax(const WeightArgs<T>& args, const RowMask<T>& mask, const T* scores, T* weights, int64_t S) {
  switch ((S + kLanes<T> - 1) / kLanes<T>) {
    case 1:
      return softmax_in_registers<T, 1, flagged>(args, mask, scores, weights, S);
    case 2:
      return softmax_in_registers<T, 2, flagged>(args, mask, scores, weights, S);
    case 3:
      return softmax_in_registers<T, 3, flagged>(args, mask, scores, weights, S);
    case 4:
      return softmax_in_registers<T, 4, flagged>(args, mask, scores, weights, S);
    case 5:
      return softmax_in_registers<T, 5, flagged>(args, mask, scores, weights, S);
    case 6:
      return softmax_in_registers<T, 6, flagged>(args, mask, scores, weights, S);
    case 7:
      return softmax_in_registers<T, 7, flagged>(args, mask, scores, weights, S);
    default:
      return softmax_in_registers<T, 8, flagged>(args, mask, scores, weights, S);
  }
}

template <class T, Normalizer kind>
void forward(const WeightArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const RowMask<T> mask(args, item / args.T_, item % args.T_);
    T* row = args.weights + item * args.S;
    const bool hides = args.zero_empty && args.fill == -kInfinity<T>;
    const int64_t S = hides ? mask.length : args.S;  // what lies past has no part in it
    if (S < args.S) fill_row(row + S, args.S - S, T(0));
    if (kind == Normalizer::softmax && hides && !mask.added && S && S <= kShort<T>) {
      const auto function = mask.flags ? short_softmax<T, true> : short_softmax<T, false>;
      function(args, mask, args.scores + item * args.S, row, S);
      continue;
    }
    T top;
    const bool any = masked_row(args, mask, args.scores + item * args.S, row, S, &top);
    if (!any && args.zero_empty) {
      fill_row(row, S, T(0));
      continue;
    }
    bool bad;
    if constexpr (kind == Normalizer::softmax) bad = softmax(row, S, top);
    if constexpr (kind == Normalizer::sparsemax) bad = sparsemax(row, S, top);
    if constexpr (kind == Normalizer::entmax15) bad = entmax15(row, S, top);
    if constexpr (kind == Normalizer::sigmoid) bad = sigmoids(row, S);
    if (bad && hides) {
      for (int64_t s = 0; s < S; s += kLanes<T>) {
        const Vec<T> x = load_partial(row + s, S - s);
        store_partial(row + s, mask.attended(s, S - s) ? x : Vec<T>{}, S - s);
      }
    }
  }
}

template <class T, Normalizer kind>
void backward(const WeightArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  const int64_t S = args.S;
  const Vec<T> zero{}, factor = broadcast(args.factor);
  for (int64_t item = begin; item < end; ++item) {
    const RowMask<T> mask(args, item / args.T_, item % args.T_);
    const bool masked = mask.flags || mask.added || mask.length < S;
    const T *weights = args.weights + item * S, *d_weights = args.d_weights + item * S;
    T* out = args.d_scores + item * S;
    Vec<T> top{}, bottom{};
    // Where there is no weight the gradient of the weight counts as 0: it may be NaN there.
    for (int64_t s = 0; kind != Normalizer::sigmoid && s < S; s += W) {
      const Vec<T> w = load_partial(weights + s, S - s);
      const Vec<T> d = w == zero ? zero : load_partial(d_weights + s, S - s);
      if constexpr (kind == Normalizer::softmax) top += w * d;
      if constexpr (kind == Normalizer::sparsemax) {
        top += d;
        bottom += w == zero ? zero : broadcast(T(1));
      }
      if constexpr (kind == Normalizer::entmax15) {
        const Vec<T> root = square_root<T>(w);
        top += root * d;
        bottom += root;
      }
    }
    const T mean = sum_all<T>(top)[0] / (kind == Normalizer::softmax ? T(1) : sum_all<T>(bottom)[0]);
    for (int64_t s = 0; s < S; s += W) {
      const Vec<T> w = load_partial(weights + s, S - s);
      Vec<T> d = load_partial(d_weights + s, S - s);
      if constexpr (kind == Normalizer::softmax) d = w * (d - mean);
      if constexpr (kind == Normalizer::sparsemax) d = d - mean;
      if constexpr (kind == Normalizer::entmax15) d = square_root<T>(w) * (d - mean);
      if constexpr (kind == Normalizer::sigmoid) d = w * (T(1) - w) * d;
      d = w == zero ? zero : d * factor;
      if (masked) d = mask.attended(s, S - s) ? d : zero;
      store_partial(out + s, d, S - s);
    }
  }
}

template <class T>
constexpr WeightKernels<T> table() {
  using N = Normalizer;
  return {{forward<T, N::softmax>, forward<T, N::sparsemax>, forward<T, N::entmax15>, forward<T, N::sigmoid>},
          {backward<T, N::softmax>, backward<T, N::sparsemax>, backward<T, N::entmax15>, backward<T, N::sigmoid>}};
}

}  // namespace

extern const WeightKernels<float> weight_kernels_f32 = table<float>();
extern const WeightKernels<double> weight_kernels_f64 = table<double>();

}  // namespace seqattn::SEQATTN_ISA
