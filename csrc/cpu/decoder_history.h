// What scores know of earlier weights: the channels of a history, their convolution, and the weights of both as the
// kernels read them. For the decoder's kernels alone.
//
// A channel of a row holds `window / 2` zeros, S values, and zeros again, so that a convolution needs no bounds.
#pragma once

#include "attention_location.h"
#include "decoder.h"
#include "gemm.h"
#include "recurrence_forward.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// Convolution [C][window][padded F] and U [F][padded A].
template <class T>
struct HistoryWeights {
  int64_t ld_conv, ld_feature;
  T *conv, *feature, *end;

  HistoryWeights() = default;
  HistoryWeights(const DecoderProblem<T>& p, T* data) : ld_conv(padded(p.F)), ld_feature(padded(p.A)), conv(data) {
    feature = conv + p.C * p.window * ld_conv;
    end = feature + (p.has_history() ? p.F * ld_feature : 0);
  }

  void pack(const DecoderProblem<T>& p) const {
    __builtin_memset(conv, 0, std::size_t(end - conv) * sizeof(T));
    for (int64_t f = 0; f < p.F; ++f) {
      const int64_t taps = p.C * p.window;
      for (int64_t k = 0; k < taps; ++k) conv[k * ld_conv + f] = p.w_conv[f * taps + k];
      for (int64_t a = 0; a < p.A; ++a) feature[f * ld_feature + a] = p.w_feature[a * p.F + f];
    }
  }

  FeatureTerm<T> term(const DecoderProblem<T>& p) const { return {p.A, p.F, feature, ld_feature, ld_conv}; }
};

template <class T>
SEQATTN_INLINE int64_t channel_stride(const DecoderProblem<T>& p) {
  return row_stride(p.S + p.window);
}

// c[rows][N] (+)= a[rows][K] b[K][N] with N rounded up to whole vectors in c and b, whose rows are ldb apart.
template <class T>
SEQATTN_INLINE void multiply_rows(T* c, int64_t ldc, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K,
                                  int64_t N, int64_t rows, bool add) {
  constexpr int W = kLanes<T>;
  const Groups groups(vectors_of<T>(N));
  for (int64_t g = 0; g < groups.groups; ++g) {
    const int64_t first = groups.begin(g), vectors = groups.begin(g + 1) - first;
    multiply_strided(c + first * W, ldc, a, lda, b + first * W, ldb, K, rows, int(vectors), add);
  }
}

// Features [rows][padded F] of the keys from s on; channels: of this row, [C][channel_stride].
template <class T>
void location_features(const DecoderProblem<T>& p, const HistoryWeights<T>& w, const T* channels, int64_t s,
                       int64_t rows, T* out) {
  for (int64_t c = 0; c < p.C; ++c) {
    // Row by row of the convolution's input begins one value later: a matrix whose rows are one value apart.
    multiply_rows(out, w.ld_conv, channels + c * channel_stride(p) + s, 1, w.conv + c * p.window * w.ld_conv, w.ld_conv,
                  p.window, p.F, rows, c > 0);
  }
}

// The channels before the first step.
template <class T>
void begin_channels(const DecoderProblem<T>& p, int64_t b, T* channels) {
  __builtin_memset(channels, 0, std::size_t(p.C * channel_stride(p)) * sizeof(T));
  if (!p.history0) return;
  for (int64_t c = 0; c < p.C; ++c) {
    __builtin_memcpy(channels + c * channel_stride(p) + p.window / 2, p.history0 + (b * p.C + c) * p.S,
                     std::size_t(p.S) * sizeof(T));
  }
}

// The channels after a step with these weights [S]; fertility: of this row, or null.
template <class T>
void extend_channels(const DecoderProblem<T>& p, const T* weights, const T* fertility, T* channels) {
  constexpr int W = kLanes<T>;
  T* last = channels + p.window / 2;
  if (p.knows_last()) __builtin_memcpy(last, weights, std::size_t(p.S) * sizeof(T));
  if (!p.knows_sum()) return;
  T* sum = last + (p.C - 1) * channel_stride(p);
  for (int64_t s = 0; s < p.S; s += W) {
    const int64_t left = p.S - s;
    Vec<T> w = load_partial(weights + s, left);
    if (fertility) w = w / load_partial(fertility + s, left);
    store_partial(sum + s, load_partial(sum + s, left) + w, left);
  }
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
