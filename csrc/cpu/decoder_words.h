// From logits to the most probable word and its log-probability. For decoder_kernels.cpp alone.
#pragma once

#include "attention_keys.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// ln x of a finite x >= 1: halved to below 2, then 2 artanh((x - 1) / (x + 1)).
template <class T>
T log_of(T x) {
  T halvings = 0;
  for (; x >= T(2); x *= T(0.5)) halvings += 1;
  const T r = (x - 1) / (x + 1);
  T term = r, sum = 0;
  for (int k = 1; k < 40; k += 2) {
    sum += term / T(k);
    term *= r * r;
  }
  return halvings * T(0.69314718055994530942) + 2 * sum;
}

// The first word of the largest of V logits; its log-probability is NaN where a logit is, or none is finite.
template <class T>
int64_t most_probable(const T* logits, int64_t V, T* log_prob) {
  constexpr int W = kLanes<T>;
  Vec<T> largest = broadcast(-kInfinity<T>), sums{};
  for (int64_t v = 0; v < V; v += W) {
    Vec<T> x = load_partial(logits + v, V - v);
    for (int64_t j = V - v; j < W; ++j) x[j] = -kInfinity<T>;
    largest = x > largest ? x : largest;
  }
  const T most = max_lanes<T>(largest);
  int64_t best = 0;
  while (best + 1 < V && logits[best] != most) ++best;
  for (int64_t v = 0; v < V; v += W) {
    Vec<T> x = exp<T>(load_partial(logits + v, V - v) - broadcast(most));
    for (int64_t j = V - v; j < W; ++j) x[j] = 0;
    sums += x;
  }
  const T sum = sum_lanes<T>(sums);
  *log_prob = sum >= 1 && sum < kInfinity<T> ? -log_of(sum) : T(__builtin_nan(""));
  return best;
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
