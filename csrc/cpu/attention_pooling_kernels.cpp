// Self-attentive pooling. What the linear layer gives is used up a block of rows at a time; backward keeps its tanh.
#include "attention_pooling_kernels.h"

#include "attention_context.h"
#include "attention_linear.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class T>
void scores(const PoolingArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  constexpr int W = kLanes<T>;
  const LinearArgs<T>& linear = args.linear;
  const int64_t R = args.attention.T_, N = linear.N, ld = linear.width();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / linear.blocks(), first = item % linear.blocks() * kLinearRows;
    const int64_t block = linear.S - first < kLinearRows ? linear.S - first : kLinearRows;
    const int64_t left = linear.length(b) - first, n = left < 0 ? 0 : left < block ? left : block;
    for (int64_t i = n * N; args.tangents && i < block * N; i += W) {
      store_partial(args.tangents + (b * linear.S + first) * N + i, Vec<T>{}, block * N - i);
    }
    if (!n) continue;
    multiply_rows(forward_panels(linear), linear.input + (b * linear.S + first) * linear.K, linear.K, n, scratch, ld);
    for (int64_t i = 0; i < n; ++i) {
      T* row = scratch + i * ld;
      T* tangents = args.tangents ? args.tangents + (b * linear.S + first + i) * N : nullptr;
      T* out = args.attention.rows + b * R * args.attention.row + first + i;
      Vec<T> sum{};
      for (int64_t a = 0; a < N; a += W) {
        Vec<T> x = load(row + a);
        if (linear.bias) x += load_partial(linear.bias + a, N - a);
        const Vec<T> t = tanh<T>(x);
        sum += t * load_partial(args.v + a, N - a);
        if (R > 1) store(row + a, t);
        if (tangents) store_partial(tangents + a, t, N - a);
      }
      if (R) out[0] = sum_all<T>(sum)[0];
      for (int64_t r = 1; r < R; ++r) {
        sum = Vec<T>{};
        for (int64_t a = 0; a < N; a += W) sum += load(row + a) * load_partial(args.v + r * N + a, N - a);
        out[r * args.attention.row] = sum_all<T>(sum)[0];
      }
    }
  }
}

template <class T>
void softmax(const PoolingArgs<T>& args, int64_t begin, int64_t end) {
  const AttentionArgs<T>& attention = args.attention;
  for (int64_t item = begin; item < end; ++item) {
    softmax_row(attention, item / attention.T_, item % attention.T_, attention.rows + item * attention.row);
  }
}

template <class T>
void context(const PoolingArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const AttentionArgs<T>& attention = args.attention;
  const int64_t chunks = ceil_div(attention.D, attention.context_chunk);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / chunks, d = item % chunks * attention.context_chunk, stop = d + attention.context_chunk;
    context_tile(attention, b, 0, attention.T_, attention.rows + b * attention.T_ * attention.row, attention.row, d,
                 stop < attention.D ? stop : attention.D, reinterpret_cast<int32_t*>(scratch));
  }
}

// d_scores = w * (d_w - sum(w * d_w)) over the attended keys, 0 elsewhere; and the gradient of values of their own.
template <class T>
void weight_gradients(const PoolingArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  const AttentionArgs<T>& attention = args.attention;
  const int64_t R = attention.T_, S = attention.S, D = attention.D;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t length = attention.length(b);
    const bool masked = attention.mask_bool || attention.mask_add;
    for (int64_t r = 0; r < R; ++r) {
      const int64_t at = (b * R + r) * S;
      const T *w = attention.weights + at, *d_context = args.d_context ? args.d_context + (b * R + r) * D : nullptr;
      T* ds = args.d_scores + at;
      for (int64_t s = 0; s < S; ++s) {
        ds[s] = 0;
        if (s >= length || (masked && !attends(attention, b, r, s))) continue;
        Vec<T> sum{};
        const T* value = attention.values + (b * S + s) * D;
        for (int64_t d = 0; d_context && d < D; d += W) {
          sum += load_partial(d_context + d, D - d) * load_partial(value + d, D - d);
        }
        ds[s] = sum_all<T>(sum)[0] + (args.d_weights ? args.d_weights[at + s] : T(0));
      }
      Vec<T> sums{};
      for (int64_t s = 0; s < S; s += W) sums += load_partial(w + s, S - s) * load_partial(ds + s, S - s);
      const Vec<T> mean = sum_all<T>(sums);
      for (int64_t s = 0; s < S; s += W) {
        const Vec<T> weight = load_partial(w + s, S - s), d = weight * (load_partial(ds + s, S - s) - mean);
        store_partial(ds + s, weight == Vec<T>{} ? Vec<T>{} : d, S - s);
      }
    }
    if (!args.d_values) continue;
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t d = 0; d < D; d += W) {
        Vec<T> sum{};
        for (int64_t r = 0; args.d_context && r < R; ++r) {
          const T w = attention.weights[(b * R + r) * S + s];
          if (w == 0) continue;  // then a gradient of the context that is NaN is none of this value's
          sum += w * load_partial(args.d_context + (b * R + r) * D + d, D - d);
        }
        store_partial(args.d_values + (b * S + s) * D + d, sum, D - d);
      }
    }
  }
}

template <class T>
void gradients(const PoolingArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  constexpr int W = kLanes<T>;
  const LinearArgs<T>& linear = args.linear;
  const AttentionArgs<T>& attention = args.attention;
  const int64_t R = attention.T_, S = linear.S, N = linear.N, K = linear.K, ld = linear.width();
  T* d_v = nullptr;
  linear_gradients(
      linear, begin, end, scratch, attention.mask_bool || attention.mask_add, [&](T* sums) { d_v = sums; },
      [&](int64_t b, int64_t first, int64_t n, T* d_inner) {
        const T* ds = args.d_scores + b * R * S + first;
        for (int64_t a = 0; a < ld; a += W) {
          const int64_t left = N > a ? N - a : 0;
          for (int64_t i = 0; i < n; ++i) store(d_inner + i * ld + a, Vec<T>{});
          for (int64_t r = 0; r < R; ++r) {
            const Vec<T> v = load_partial(args.v + r * N + a, left);
            Vec<T> sum{};
            for (int64_t i = 0; i < n; ++i) {
              const T d = ds[r * S + i];
              if (d == 0) continue;  // there the tanh may be NaN
              const Vec<T> t = load_partial(args.tangents + (b * S + first + i) * N + a, left);
              T* out = d_inner + i * ld + a;
              sum += d * t;
              store(out, load(out) + d * v * ((T(1) - t) * (T(1) + t)));
            }
            store(d_v + r * ld + a, load(d_v + r * ld + a) + sum);
          }
        }
      },
      [&](int64_t b, int64_t first, int64_t n, int64_t used, const T* d_rows) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = (b * S + first + i) * K;
          for (int64_t k = 0; k < K; k += W) {
            Vec<T> g = i < used ? load(d_rows + i * linear.input_width() + k) : Vec<T>{};
            for (int64_t r = 0; args.same && args.d_context && i < used && r < R; ++r) {
              const T w = attention.weights[(b * R + r) * S + first + i];
              if (w == 0) continue;
              g += w * load_partial(args.d_context + (b * R + r) * K + k, K - k);
            }
            store_partial(linear.d_input + at + k, g, K - k);
          }
        }
      });
}

template <class T>
void sum_gradients(const PoolingArgs<T>& args, int64_t begin, int64_t end) {
  const LinearArgs<T>& linear = args.linear;
  sum_parts(linear, begin, end <= linear.N + 1 ? end : linear.N + 1);
  if (end <= linear.N + 1) return;
  const int64_t d_v = linear.N * linear.input_width() + linear.width();
  for (int64_t r = 0; r < args.attention.T_; ++r) {
    sum_of_parts(linear, d_v + r * linear.width(), linear.N, args.d_v + r * linear.N);
  }
}

template <class T, void (*kernel)(const LinearArgs<T>&, int64_t, int64_t)>
void on_linear(const PoolingArgs<T>& args, int64_t begin, int64_t end) {
  kernel(args.linear, begin, end);
}

template <class T>
constexpr PoolingKernels<T> table() {
  return {int(Panels<T>::kWidth),
          on_linear<T, pack<T>>,
          on_linear<T, pack_back<T>>,
          scores<T>,
          softmax<T>,
          context<T>,
          weight_gradients<T>,
          gradients<T>,
          sum_gradients<T>};
}

}  // namespace

extern const PoolingKernels<float> pooling_kernels_f32 = table<float>();
extern const PoolingKernels<double> pooling_kernels_f64 = table<double>();

}  // namespace seqattn::SEQATTN_ISA
