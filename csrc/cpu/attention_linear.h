// A linear layer over blocks of rows, x W^T, and the sums of its gradients. For kernels of attention that go on with a
// block while it is in the caches.
#pragma once

#include "attention_linear_args.h"
#include "gemm.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// A matrix of K rows as panels of kMaxPanel vectors of its columns, the last with as many as are left.
template <class T>
struct Panels {
  static constexpr int64_t kWidth = int64_t(kMaxPanel) * kLanes<T>;
  T* data;
  int64_t K, columns;

  int64_t count() const { return ceil_div(columns, kWidth); }
  T* at(int64_t p) const { return data + p * kWidth * K; }
  // Vectors of panel p; the last one may reach past the columns.
  int vectors(int64_t p) const {
    const int64_t left = ceil_div(columns - p * kWidth, kLanes<T>);
    return int(left < kMaxPanel ? left : kMaxPanel);
  }
};

template <class T>
Panels<T> forward_panels(const LinearArgs<T>& args) {
  return {args.packed, args.K, args.N};
}
template <class T>
Panels<T> backward_panels(const LinearArgs<T>& args) {
  return {args.packed_back, args.N, args.K};
}

// Items are panels of W^T, zero past its columns.
template <class T>
void pack(const LinearArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  const Panels<T> panels = forward_panels(args);
  for (int64_t p = begin; p < end; ++p) {
    const int n = panels.vectors(p);
    for (int v = 0; v < n; ++v) {
      const int64_t column = p * panels.kWidth + v * W, left = args.N - column;
      transpose_strip(panels.at(p) + v * W, int64_t(n * W), args.weight + column * args.K, args.K, left < W ? left : W,
                      args.K);
    }
  }
}

// Items are panels of W.
template <class T>
void pack_back(const LinearArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>;
  const Panels<T> panels = backward_panels(args);
  for (int64_t p = begin; p < end; ++p) {
    const int n = panels.vectors(p);
    T* out = panels.at(p);
    for (int64_t k = 0; k < args.N; ++k, out += n * W) {
      const T* row = args.weight + k * args.K + p * panels.kWidth;
      for (int v = 0; v < n; ++v) store(out + v * W, load_partial(row + v * W, args.K - p * panels.kWidth - v * W));
    }
  }
}

// out[row][0..columns, to a whole vector) = x[row] times the matrix in the panels.
template <class T>
SEQATTN_INLINE void multiply_rows(const Panels<T>& panels, const T* x, int64_t ldx, int64_t rows, T* out, int64_t ldo) {
  for (int64_t p = 0; p < panels.count(); ++p) {
    multiply_panel(out + p * panels.kWidth, ldo, x, ldx, panels.at(p), panels.K, rows, panels.vectors(p), false);
  }
}

// c[m][NV vectors] += sum over rows of a[row][m] b[row][..] for M consecutive m. Of the last vector of b, `left` values
// are there where NV is 1.
template <class T, int M, int NV>
SEQATTN_INLINE void outer_tile(T* c, int64_t ldc, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t rows,
                               int64_t left) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[M][NV] = {};
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> y[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) y[j] = NV > 1 ? load(b + r * ldb + j * W) : load_partial(b + r * ldb, left);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<T> x = broadcast(a[r * lda + m]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[m][j] += x * y[j];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(c + m * ldc + j * W, load(c + m * ldc + j * W) + acc[m][j]);
  }
}

template <class T, int NV>
void outer_columns(T* c, int64_t ldc, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t rows, int64_t M,
                   int64_t left) {
  constexpr int kRows = max_rows(4) < 4 ? 2 : 4;
  constexpr int kTall = NV == 1 ? kRows : max_rows(kMaxPanel);
  int64_t m = 0;
  for (; m + kTall <= M; m += kTall) outer_tile<T, kTall, NV>(c + m * ldc, ldc, a + m, lda, b, ldb, rows, left);
  for (; m + 2 <= M; m += 2) outer_tile<T, 2, NV>(c + m * ldc, ldc, a + m, lda, b, ldb, rows, left);
  if (m < M) outer_tile<T, 1, NV>(c + m * ldc, ldc, a + m, lda, b, ldb, rows, left);
}

// c[m][n] += sum over rows of a[row][m] b[row][n], m < M, n < N; rows of c hold N rounded up to a vector.
template <class T>
void add_outer(T* c, int64_t ldc, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t rows, int64_t M,
               int64_t N) {
  constexpr int W = kLanes<T>;
  int64_t n = 0;
  for (; n + kMaxPanel * W <= N; n += kMaxPanel * W) {
    outer_columns<T, kMaxPanel>(c + n, ldc, a, lda, b + n, ldb, rows, M, W);
  }
  for (; n < N; n += W) outer_columns<T, 1>(c + n, ldc, a, lda, b + n, ldb, rows, M, N - n);
}

// Rows of x, zero where the gradient is: 0 * NaN is NaN.
template <class T>
void copy_without_holes(const T* gradient, int64_t ld, int64_t N, const T* x, int64_t K, int64_t rows, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    bool any = false;
    for (int64_t a = 0; a < N; ++a) any |= gradient[i * ld + a] != 0;
    for (int64_t k = 0; k < K; k += kLanes<T>) {
      store_partial(out + i * K + k, any ? load_partial(x + i * K + k, K - k) : Vec<T>{}, K - k);
    }
  }
}

// What a thread needs for `linear_gradients`: a block of gradients of x W^T, of x, and a copy of x.
template <class T>
struct LinearScratch {
  T *d_inner, *d_rows, *clean;
  LinearScratch(const LinearArgs<T>& args, T* scratch)
      : d_inner(scratch),
        d_rows(d_inner + kLinearRows * args.width()),
        clean(d_rows + kLinearRows * args.input_width()) {}
};

// Items are groups of blocks. For each block of n rows of batch element b from s on, of which the first `used` are
// looked at,
//   inner(b, s, used, d_inner) writes the gradient of x W^T + bias, rows of args.width() elements, zero past N;
//   finish(b, s, n, used, d_rows) takes that gradient times W, rows of args.input_width() elements, if d_input is
//   wanted.
// Both may sum more into what follows the bias in the part of the group, which start(there) tells. Where `holes`, rows
// of x whose gradient is zero may hold anything.
template <class T, class Start, class Inner, class Finish>
SEQATTN_INLINE void linear_gradients(const LinearArgs<T>& args, int64_t begin, int64_t end, T* scratch, bool holes,
                                     Start&& start, Inner&& inner, Finish&& finish) {
  constexpr int W = kLanes<T>;
  const LinearScratch<T> space(args, scratch);
  const int64_t items = args.B * args.blocks(), ld = args.width(), ldk = args.input_width(), K = args.K;
  for (int64_t group = begin; group < end; ++group) {
    T* part = args.parts + group * args.part;
    for (int64_t i = 0; i < args.part; i += W) store_partial(part + i, Vec<T>{}, args.part - i);
    T *d_weight = part, *d_bias = part + args.N * ldk;
    start(d_bias + ld);
    for (int64_t item = items * group / args.groups; item < items * (group + 1) / args.groups; ++item) {
      const int64_t b = item / args.blocks(), s = item % args.blocks() * kLinearRows;
      const int64_t n = args.S - s < kLinearRows ? args.S - s : kLinearRows, left = args.length(b) - s;
      const int64_t used = left < 0 ? 0 : left < n ? left : n;
      const T* x = args.input + (b * args.S + s) * K;
      if (used) {
        inner(b, s, used, space.d_inner);
        for (int64_t a = 0; args.d_bias && a < ld; a += W) {
          Vec<T> sum{};
          for (int64_t i = 0; i < used; ++i) sum += load(space.d_inner + i * ld + a);
          store(d_bias + a, load(d_bias + a) + sum);
        }
        if (holes) copy_without_holes(space.d_inner, ld, args.N, x, K, used, space.clean);
        add_outer(d_weight, ldk, space.d_inner, ld, holes ? space.clean : x, K, used, args.N, K);
      }
      if (!args.d_input) continue;
      if (used) multiply_rows(backward_panels(args), space.d_inner, ld, used, space.d_rows, ldk);
      finish(b, s, n, used, space.d_rows);
    }
  }
}

// out[0..n) = the sum over groups, in order, of what stands at `offset` in their parts.
template <class T>
void sum_of_parts(const LinearArgs<T>& args, int64_t offset, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t g = 0; g < args.groups; ++g) sum += load(args.parts + g * args.part + offset + i);
    store_partial(out + i, sum, n - i);
  }
}

// Items are rows of the gradient of the weight; the last, N, is that of the bias.
template <class T>
void sum_parts(const LinearArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (n < args.N) {
      sum_of_parts(args, n * args.input_width(), args.K, args.d_weight + n * args.K);
    } else if (args.d_bias) {
      sum_of_parts(args, n * args.input_width(), args.N, args.d_bias);
    }
  }
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
