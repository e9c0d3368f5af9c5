// Attention over time for each feature. Forward takes a few columns at a time through all rows of a batch element, so
// that what the linear layer gives never leaves the caches.
#include "attention_feature_kernels.h"

#include "attention_linear.h"
#include "simd.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// Calls f.template operator()<NV>() for the vectors of a panel.
template <class F>
SEQATTN_INLINE void with_vectors(int vectors, F&& f) {
  if (vectors == 1) return f.template operator()<1>();
  if (vectors == 2) return f.template operator()<2>();
  if (vectors == 3) return f.template operator()<3>();
  if constexpr (kMaxPanel > 3) return f.template operator()<4>();
}

template <class T>
struct Rows {
  const uint8_t* mask;
  int64_t length;
  Rows(const FeatureArgs<T>& args, int64_t b) : mask(args.mask(b)), length(args.linear.length(b)) {}
  SEQATTN_INLINE bool attended(int64_t s) const { return s < length && (!mask || mask[s]); }
};

// Columns [d, d + left) of NV vectors; `panel` is their part of the linear layer.
template <class T, int NV>
void forward_columns(const FeatureArgs<T>& args, int64_t b, int64_t d, const T* panel, T* scratch) {
  constexpr int W = kLanes<T>;
  const Rows<T> rows(args, b);
  const int64_t S = args.linear.S, D = args.linear.K, at = b * S * D + d, left = D - d;
  Vec<T> sum[NV] = {}, context[NV] = {}, bias[NV] = {};
  if (args.linear.bias) {
    for (int j = 0; j < NV; ++j) bias[j] = load_partial(args.linear.bias + d + j * W, left - j * W);
  }
  for (int64_t first = 0; first < rows.length; first += kLinearRows) {
    const int64_t n = rows.length - first < kLinearRows ? rows.length - first : kLinearRows;
    multiply_panel(scratch, int64_t(NV * W), args.linear.input + (b * S + first) * D, D, panel, D, n, NV, false);
    for (int64_t i = 0; i < n; ++i) {
      if (!rows.attended(first + i)) continue;
      const int64_t row = at + (first + i) * D;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        // tanh lies in [-1, 1]: its exponential needs no largest one taken off, and no digits of a small tanh.
        const Vec<T> x = load(scratch + (i * NV + j) * W) + bias[j];
        const Vec<T> t = T(1) - T(2) / (T(1) + exp<T>(x + x)), e = exp<T>(t);
        sum[j] += e;
        store_partial(args.weights + row + j * W, e, left - j * W);
        if (args.tangents) store_partial(args.tangents + row + j * W, t, left - j * W);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) sum[j] = T(1) / sum[j];
  for (int64_t s = 0; s < S; ++s) {
    const int64_t row = at + s * D;
    if (!rows.attended(s)) {
      for (int j = 0; j < NV; ++j) {
        store_partial(args.weights + row + j * W, Vec<T>{}, left - j * W);
        if (args.tangents) store_partial(args.tangents + row + j * W, Vec<T>{}, left - j * W);
        if (!args.reduce) store_partial(args.result + row + j * W, Vec<T>{}, left - j * W);
      }
      continue;
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const Vec<T> w = load_partial(args.weights + row + j * W, left - j * W) * sum[j];
      const Vec<T> r = w * load_partial(args.linear.input + row + j * W, left - j * W);
      store_partial(args.weights + row + j * W, w, left - j * W);
      if (args.reduce) {
        context[j] += r;
      } else {
        store_partial(args.result + row + j * W, r, left - j * W);
      }
    }
  }
  if (!args.reduce) return;
  for (int j = 0; j < NV; ++j) store_partial(args.result + b * D + d + j * W, context[j], left - j * W);
}

template <class T>
void forward(const FeatureArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const Panels<T> panels = forward_panels(args.linear);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / panels.count(), p = item % panels.count();
    with_vectors(panels.vectors(p),
                 [&]<int NV>() { forward_columns<T, NV>(args, b, p * panels.kWidth, panels.at(p), scratch); });
  }
}

// The gradient of the weights at element `at` of [B, S, D], column d of batch element b; `left` columns are there.
template <class T>
SEQATTN_INLINE Vec<T> weight_gradient(const FeatureArgs<T>& args, int64_t b, int64_t d, int64_t at, int64_t left,
                                      Vec<T>* d_result) {
  Vec<T> dw{};
  *d_result = Vec<T>{};
  if (args.d_result) {
    *d_result = load_partial(args.d_result + (args.reduce ? b * args.linear.K + d : at), left);
    dw = *d_result * load_partial(args.linear.input + at, left);
  }
  if (args.d_weights) dw += load_partial(args.d_weights + at, left);
  return dw;
}

template <class T>
void weighted_sums(const FeatureArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  const Panels<T> panels = forward_panels(args.linear);
  const int64_t S = args.linear.S, D = args.linear.K;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / panels.count(), p = item % panels.count(), d = p * panels.kWidth;
    const Rows<T> rows(args, b);
    with_vectors(panels.vectors(p), [&]<int NV>() {
      Vec<T> sum[NV] = {}, dr;
      for (int64_t s = 0; s < rows.length; ++s) {
        if (!rows.attended(s)) continue;
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          const int64_t column = d + j * W, at = (b * S + s) * D + column, left = D - column;
          sum[j] += load_partial(args.weights + at, left) * weight_gradient(args, b, column, at, left, &dr);
        }
      }
      for (int j = 0; j < NV; ++j) store_partial(args.sums + b * D + d + j * W, sum[j], D - d - j * W);
    });
  }
}

template <class T>
void gradients(const FeatureArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  constexpr int W = kLanes<T>;
  const LinearArgs<T>& linear = args.linear;
  const int64_t S = linear.S, D = linear.K, ld = linear.width();
  linear_gradients(
      linear, begin, end, scratch, args.mask_bool != nullptr, [](T*) {},
      [&](int64_t b, int64_t first, int64_t n, T* d_inner) {
        const Rows<T> rows(args, b);
        for (int64_t i = 0; i < n; ++i) {
          const bool attended = rows.attended(first + i);
          for (int64_t d = 0; d < ld; d += W) {
            Vec<T> g{}, dr;
            if (attended && d < D) {
              const int64_t at = (b * S + first + i) * D + d, left = D - d;
              const Vec<T> t = load_partial(args.tangents + at, left);
              const Vec<T> dw = weight_gradient(args, b, d, at, left, &dr);
              g = load_partial(args.weights + at, left) * (dw - load_partial(args.sums + b * D + d, left)) *
                  ((T(1) - t) * (T(1) + t));
            }
            store_partial(d_inner + i * ld + d, g, ld - d);
          }
        }
      },
      [&](int64_t b, int64_t first, int64_t n, int64_t used, const T* d_rows) {
        const Rows<T> rows(args, b);
        for (int64_t i = 0; i < n; ++i) {
          const bool attended = i < used && rows.attended(first + i);
          for (int64_t d = 0; d < D; d += W) {
            const int64_t at = (b * S + first + i) * D + d, left = D - d;
            Vec<T> g{};
            if (attended) {
              g = load(d_rows + i * ld + d);
              if (args.d_result) {
                g += load_partial(args.d_result + (args.reduce ? b * D + d : at), left) *
                     load_partial(args.weights + at, left);
              }
            }
            store_partial(linear.d_input + at, g, left);
          }
        }
      });
}

template <class T, void (*kernel)(const LinearArgs<T>&, int64_t, int64_t)>
void on_linear(const FeatureArgs<T>& args, int64_t begin, int64_t end) {
  kernel(args.linear, begin, end);
}

template <class T>
constexpr FeatureKernels<T> table() {
  return {int(Panels<T>::kWidth), on_linear<T, pack<T>>, on_linear<T, pack_back<T>>, forward<T>,
          weighted_sums<T>,       gradients<T>,          on_linear<T, sum_parts<T>>};
}

}  // namespace

extern const FeatureKernels<float> feature_kernels_f32 = table<float>();
extern const FeatureKernels<double> feature_kernels_f64 = table<double>();

}  // namespace seqattn::SEQATTN_ISA
