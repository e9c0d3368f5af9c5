// Gradients of additive attention, computing the scores' part again. For attention_kernels.cpp alone.
#pragma once

#include "attention_context.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// d_scores = w * (d_w - sum(w * d_w)) over the attended keys, 0 elsewhere.
template <class T>
void d_scores(const AttentionArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / args.T_, t = item % args.T_, length = args.length(b);
    const T* w = args.weights + item * args.S;
    const T* dw = args.d_weights + item * args.S;
    T* ds = args.d_scores + item * args.S;
    if (args.d_weights_too) {
      const T* more = args.d_weights_too + item * args.S;
      for (int64_t s = 0; s < length; ++s) ds[s] = dw[s] + more[s];
      dw = ds;
    }
    if (args.mask_bool || args.mask_add) {
      T sum = 0;
      for (int64_t s = 0; s < length; ++s) {
        if (!attends(args, b, t, s)) continue;
        sum += w[s] * dw[s];
        __atomic_store_n(&args.used[b * args.S + s], uint8_t(1), __ATOMIC_RELAXED);
      }
      for (int64_t s = 0; s < length; ++s) ds[s] = attends(args, b, t, s) ? w[s] * (dw[s] - sum) : T(0);
    } else {
      Vec<T> sums{};
      for (int64_t s = 0; s < length; s += W)
        sums += load_partial(w + s, length - s) * load_partial(dw + s, length - s);
      const Vec<T> sum = sum_all<T>(sums);
      for (int64_t s = 0; s < length; s += W) {
        const Vec<T> x = load_partial(w + s, length - s) * (load_partial(dw + s, length - s) - sum);
        store_partial(ds + s, x, length - s);
      }
    }
    for (int64_t s = length; s < args.S; ++s) ds[s] = 0;
  }
}

// How backward computes tanh(q + k) and its derivative.
enum class Slope { exponential, small, plain };

template <class T>
struct Columns {
  const T *q, *k;  // [T, lanes], [length, lanes]: e^2x, tanh x or x
  T *dq, *dk;      // sums of d_score times the derivative, short of v (and of 4 but in the form of small arguments)
  Vec<T> dv;
};

// Adds the part of queries [t0, t0 + N) and keys [s0, s1) to the sums of one column block. But for small arguments, dv
// gathers d_score * (r - 1/2) (tanh = 1 - 2 r).
template <class T, Slope slope, int N>
SEQATTN_INLINE void slopes(const T* ds, int64_t S, int64_t t0, int64_t s0, int64_t s1, Columns<T>& c) {
  using M = Math<T>;
  constexpr int W = kLanes<T>;
  Vec<T> q[N], dq[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    q[i] = load(c.q + (t0 + i) * W);
    dq[i] = Vec<T>{};
  }
  const Vec<T> bound = broadcast(Additive::kBound<T>);
  Vec<T> dv{};
  ds += t0 * S;
  for (int64_t s = s0; s < s1; ++s) {
    const Vec<T> k = load(c.k + s * W);
    Vec<T> dk{}, dv_key{};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> g = broadcast(ds[i * S + s]);
      Vec<T> u, w;
      if constexpr (slope == Slope::small) {
        const Vec<T> term = Additive::forward_small(q[i], k);
        u = g * term;
        w = g - u * term;
      } else {
        Vec<T> rest;
        const Vec<T> e = slope == Slope::exponential ? q[i] * k : exp<T>(T(2) * (q[i] + k));
        u = g * Additive::reciprocal(M::at_most(e, bound), &rest);
        w = u * rest;
        u -= T(0.5) * g;
        if constexpr (slope == Slope::plain) {
          // Keys and queries may be NaN here; where the score has no gradient, that is nobody's.
          u = g != Vec<T>{} ? u : Vec<T>{};
          w = g != Vec<T>{} ? w : Vec<T>{};
        }
      }
      dv_key += u;
      dq[i] += w;
      dk += w;
    }
    dv += dv_key;
    store(c.dk + s * W, load(c.dk + s * W) + dk);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    T* sum = c.dq + (t0 + i) * W;
    store(sum, load(sum) + dq[i]);
  }
  c.dv += dv;
}

template <class T, Slope slope>
void all_slopes(const T* ds, int64_t T_, int64_t S, int64_t length, Columns<T>& c) {
  constexpr int64_t kChunk = 64;  // keys and their sums stay in the first-level cache, partial sums small
  constexpr int kRows = slope == Slope::plain || kRegisters < 32 ? 2 : 6;
  for (int64_t s0 = 0; s0 < length; s0 += kChunk) {
    const int64_t s1 = s0 + kChunk < length ? s0 + kChunk : length;
    int64_t t = 0;
    for (; t + kRows <= T_; t += kRows) slopes<T, slope, kRows>(ds, S, t, s0, s1, c);
    for (; t < T_; ++t) slopes<T, slope, 1>(ds, S, t, s0, s1, c);
  }
}

template <class T>
void backward(const AttentionArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  constexpr int W = kLanes<T>;
  const int64_t columns = ceil_div(args.A, W), A = args.A, S = args.S;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / columns, a = item % columns * W, left = A - a, length = args.length(b);
    const uint8_t* used = args.used ? args.used + b * S : nullptr;
    T *q = scratch, *dq = q + args.T_ * W, *k = dq + args.T_ * W, *dk = k + S * W;
    Columns<T> c{q, k, dq, dk, Vec<T>{}};
    Vec<T> kmax{}, qmax{};
    for (int64_t s = 0; s < length; ++s) {
      const Vec<T> x = used && !used[s] ? Vec<T>{} : load_partial(args.keys + (b * S + s) * A + a, left);
      kmax = larger<T>(kmax, x);
      store(k + s * W, x);
      store(dk + s * W, Vec<T>{});
    }
    for (int64_t t = 0; t < args.T_; ++t) {
      const Vec<T> x = load_partial(args.query + (b * args.T_ + t) * A + a, left);
      qmax = larger<T>(qmax, x);
      store(q + t * W, x);
      store(dq + t * W, Vec<T>{});
    }
    const T bound = T(Additive::kSmall);
    const bool small = all_at_most<T>(qmax, bound) && all_at_most<T>(kmax, bound);
    const bool moderate = all_at_most<T>(kmax, Additive::kLargestKey<T>) && all_at_most<T>(qmax, kInfinity<T>);
    const T* ds = args.d_scores + b * args.T_ * S;
    const Vec<T> v = load_partial(args.v + args.head(b) * args.v_stride + a, left);
    Vec<T> factor = v, dv;
    if (small) {
      for (int64_t s = 0; s < length; ++s) store(k + s * W, tanh<T>(load(k + s * W)));
      for (int64_t t = 0; t < args.T_; ++t) store(q + t * W, tanh<T>(load(q + t * W)));
      all_slopes<T, Slope::small>(ds, args.T_, S, length, c);
      dv = c.dv;
    } else {
      if (moderate) {
        for (int64_t s = 0; s < length; ++s) store(k + s * W, exp<T>(T(2) * load(k + s * W)));
        for (int64_t t = 0; t < args.T_; ++t) store(q + t * W, exp<T>(T(2) * load(q + t * W)));
        all_slopes<T, Slope::exponential>(ds, args.T_, S, length, c);
      } else {
        all_slopes<T, Slope::plain>(ds, args.T_, S, length, c);
      }
      dv = T(-2) * c.dv;
      factor = T(4) * v;
    }
    for (int64_t s = 0; s < length; ++s) {
      store_partial(args.d_keys + (b * S + s) * A + a, factor * load(dk + s * W), left);
    }
    for (int64_t s = length; s < S; ++s) store_partial(args.d_keys + (b * S + s) * A + a, Vec<T>{}, left);
    for (int64_t t = 0; t < args.T_; ++t) {
      store_partial(args.d_query + (b * args.T_ + t) * A + a, factor * load(dq + t * W), left);
    }
    store_partial(args.d_v + b * A + a, dv, left);
  }
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
