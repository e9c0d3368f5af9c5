// The way back through scores that know of earlier weights. For decoder_backward.h alone.
//
// At step t the channels hold the weights of the steps before it. Their gradients go two ways: that of the last weights
// waits for step t - 1, that of the sum is added up for all steps before.
#pragma once

#include "decoder_backward_rows.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class Cell, class T>
class HistoryBackward : TileRows<Cell, T> {
 public:
  HistoryBackward(const DecoderProblem<T>& problem, const BackwardWeights<Cell, T>& weights, int64_t tile, T* shared,
                  const Gang& team)
      : TileRows<Cell, T>(problem, tile, shared), w_(weights), team_(team) {}

  void begin() {
    each_row([&](int64_t i) { set_row(last(i), nullptr, 0, 2 * s_.ld_source); });
  }

  // The channels of steps [t0, t1), summed in the order in which forward sums them.
  void begin_chunk(int64_t t0, int64_t t1) {
    t0_ = t0;
    steps_ = t1 - t0;
    each_row([&](int64_t i) {
      T* first = channels(i, t0);
      begin_channels(p_, b0_ + i, first);
      for (int64_t t = 0; t < t0; ++t) extend_channels(p_, weights(i, t), fertility(i), first);
      for (int64_t t = t0 + 1; t < t1; ++t) {
        __builtin_memcpy(channels(i, t), channels(i, t - 1), std::size_t(s_.ld_channels) * sizeof(T));
        extend_channels(p_, weights(i, t - 1), fertility(i), channels(i, t));
      }
    });
  }

  // What the steps after t say of the weights of keys [s, s + lanes) of step t.
  Vec<T> passed(int64_t i, int64_t t, int64_t s, int64_t left) const {
    Vec<T> d{};
    if (p_.knows_last()) d = load_partial(last(i) + s, left);
    if (!p_.knows_sum()) return d;
    Vec<T> sum = load_partial(total(i) + s, left);
    if (fertility(i)) {
      const Vec<T> f = load_partial(fertility(i) + s, left);
      sum = sum / f;
      T* out = p_.d_fertility + (b0_ + i) * p_.S + s;
      store_partial(out, load_partial(out, left) - sum * load_partial(weights(i, t) + s, left) / f, left);
    }
    return d + sum;
  }

  void features(int64_t i, int64_t t, int64_t s, int64_t rows) const {
    location_features(p_, w_.history, channels(i, t), s, rows, s_.features + (i * p_.S + s) * s_.ld_features);
  }

  // From gradients of scores to those of query (returned), keys, v, U and the sums under tanh, columns from a on.
  Vec<T> column(int64_t i, int64_t a, int64_t length, const T* query, const T* d_scores) const {
    const int64_t b = b0_ + i, left = p_.A - a;
    const FeatureTerm<T> term = w_.history.term(p_);
    const T* f = s_.features + i * p_.S * s_.ld_features;
    const T* keys = p_.attention.keys + b * p_.S * p_.A;
    T* d_sums = s_.d_sums + i * p_.S * s_.ld_sums + a;
    T* d_keys = p_.d_keys + b * p_.S * p_.A + a;
    const Vec<T> q = load_partial(query, left), v = load_partial(p_.attention.v + a, left);
    Vec<T> dq{}, dv{};
    const auto keys_from = [&]<int N>(int64_t s) {
      Vec<T> sums[N][1];
      row_sums<T, N, 1>(term, keys + s * p_.A, f + s * s_.ld_features, a, left, sums);
      for (int j = 0; j < N; ++j) {
        const Vec<T> y = Additive::forward<Math<T>>(q, sums[j][0]), d = broadcast(d_scores[s + j]);
        const Vec<T> slope = d * v * Additive::gradient(y);
        dv += d * y;
        dq += slope;
        store(d_sums + (s + j) * s_.ld_sums, slope);
        T* out = d_keys + (s + j) * p_.A;
        store_partial(out, load_partial(out, left) + slope, left);
      }
    };
    int64_t s = 0;
    for (; s + kRows<T> <= length; s += kRows<T>) keys_from.template operator()<kRows<T>>(s);
    for (; s < length; ++s) keys_from.template operator()<1>(s);
    T* out = p_.d_v + b * p_.A + a;
    store_partial(out, load_partial(out, left) + dv, left);
    for (int64_t n = 0; n < p_.F; n += kSums) feature_weights(i, a, n, length, f, d_sums);
    return dq;
  }

  // Gradients of the features of keys [s, s + rows), and of what the convolution multiplied.
  void feature_gradients(int64_t i, int64_t s, int64_t rows) const {
    T* d = s_.d_features + (i * p_.S + s) * s_.ld_features;
    multiply_rows(d, s_.ld_features, s_.d_sums + (i * p_.S + s) * s_.ld_sums, s_.ld_sums, w_.feature_t, s_.ld_features,
                  p_.A, p_.F, rows, false);
    if (!p_.history_gradient) return;
    multiply_rows(s_.d_taps + (i * p_.S + s) * s_.ld_taps, s_.ld_taps, d, s_.ld_features, w_.conv_t, s_.ld_taps, p_.F,
                  p_.C * p_.window, rows, false);
  }

  // Gradients of the convolution and of the channels, for this thread's channels.
  void channel_gradients(int64_t t) const {
    int64_t begin, end;
    team_.share(n_ * p_.C, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / p_.C, c = item % p_.C, length = p_.attention.length(b0_ + i);
      multiply_rows(p_.d_conv + ((b0_ + i) * p_.C + c) * p_.window * s_.ld_features, s_.ld_features,
                    channels(i, t) + c * channel_stride(p_), 1, s_.d_features + i * p_.S * s_.ld_features,
                    s_.ld_features, length, p_.F, p_.window, true);
      if (p_.history_gradient) channel_gradient(i, c, length);
    }
  }

  void finish() {
    if (!p_.d_history0) return;
    each_row([&](int64_t i) {
      T* out = p_.d_history0 + (b0_ + i) * p_.C * p_.S;
      if (p_.knows_last()) copy(out, 0, last(i), p_.S);
      if (p_.knows_sum()) copy(out, (p_.C - 1) * p_.S, total(i), p_.S);
    });
  }

 private:
  using Rows = TileRows<Cell, T>;
  using Rows::p_, Rows::s_, Rows::b0_, Rows::n_, Rows::t0_, Rows::steps_;
  using Rows::row, Rows::set_row, Rows::copy;
  static constexpr int W = kLanes<T>;
  static constexpr int kSums = 8 < W ? 8 : W;  // rows of U at a time; features are padded to a multiple of it

  template <class F>
  void each_row(F&& body) const {
    int64_t begin, end;
    team_.share(n_, &begin, &end);
    for (int64_t i = begin; i < end; ++i) body(i);
  }

  T* channels(int64_t i, int64_t t) const { return s_.channels + row(i, t) * s_.ld_channels; }
  T* last(int64_t i) const { return s_.passed + i * 2 * s_.ld_source; }
  T* total(int64_t i) const { return last(i) + s_.ld_source; }
  const T* weights(int64_t i, int64_t t) const { return p_.attention.weights + ((b0_ + i) * p_.steps + t) * p_.S; }
  const T* fertility(int64_t i) const { return p_.fertility ? p_.fertility + (b0_ + i) * p_.S : nullptr; }

  void feature_weights(int64_t i, int64_t a, int64_t n, int64_t length, const T* features, const T* d_sums) const {
    Vec<T> sums[kSums] = {};
    for (int64_t s = 0; s < length; ++s) {
      const Vec<T> d = load(d_sums + s * s_.ld_sums);
#pragma GCC unroll 8
      for (int j = 0; j < kSums; ++j) sums[j] += broadcast(features[s * s_.ld_features + n + j]) * d;
    }
    T* out = p_.d_feature + ((b0_ + i) * p_.F + n) * s_.ld_sums + a;
    for (int j = 0; j < kSums && n + j < p_.F; ++j) store(out + j * s_.ld_sums, load(out + j * s_.ld_sums) + sums[j]);
  }

  void channel_gradient(int64_t i, int64_t c, int64_t length) const {
    T* d = s_.d_channels + i * s_.ld_channels + c * channel_stride(p_);
    set_row(d, nullptr, 0, channel_stride(p_));
    const T* taps = s_.d_taps + i * p_.S * s_.ld_taps + c * p_.window;
    for (int64_t s = 0; s < length; ++s) {
      for (int64_t k = 0; k < p_.window; k += W) {
        const int64_t left = p_.window - k;
        store_partial(d + s + k, load_partial(d + s + k, left) + load_partial(taps + s * s_.ld_taps + k, left), left);
      }
    }
    const bool is_sum = p_.knows_sum() && c == p_.C - 1;
    T* out = is_sum ? total(i) : last(i);
    for (int64_t s = 0; s < p_.S; s += W) {
      const Vec<T> x = load_partial(d + p_.window / 2 + s, p_.S - s);
      store(out + s, is_sum ? load(out + s) + x : x);
    }
  }

  const BackwardWeights<Cell, T>& w_;
  const Gang& team_;
};

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
