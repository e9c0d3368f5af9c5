// Small dense products out of registers: C[m][n] (+)= A[m][k] B[k][n], where B is packed in panels of a few vectors.
//
// A panel of n vectors over K rows is [K][n][lanes]: the inner loop loads one row of it, broadcasts one value of each
// row of A and multiplies. Sums over k run in the same order whatever the number of threads.
#pragma once

#include <cstdint>
#include <utility>

#include "operand.h"

namespace seqattn::SEQATTN_ISA {

// Vectors of a panel at most, and rows of A for a panel of n vectors: accumulators, a row of B and a broadcast value
// fit the registers.
inline constexpr int kMaxPanel = kRegisters == 32 ? 4 : 3;
constexpr int max_rows(int n) {
  constexpr int wide[] = {0, 12, 12, 8, 6}, narrow[] = {0, 8, 6, 4, 2};
  return kRegisters == 32 ? wide[n] : narrow[n];
}

template <class A>
using SumOf = typename Operand<A>::Sum;

inline constexpr int64_t kCacheLine = 64;

namespace detail {

// acc[m][n] += a[m][k] b[k][n] for one k.
template <class A, int M, int N>
SEQATTN_INLINE void accumulate(Vec<SumOf<A>> (&acc)[M][N], const A* a, int64_t lda, const A* b, int64_t ldb,
                               int64_t k) {
#pragma GCC unroll 2
  for (int step = 0; step < Operand<A>::kSteps; ++step) {
    decltype(Operand<A>::row(b, 0)) row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = Operand<A>::row(b + k * ldb + n * kLanes<A>, step);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const auto value = Operand<A>::value(a[m * lda + k], step);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) Operand<A>::multiply_add(acc[m][n], value, row[n]);
    }
  }
}

// Few accumulators leave the multipliers waiting for each other: U sets of them, summed at the end.
template <class A, int M, int N, int U>
SEQATTN_INLINE void accumulate_split(Vec<SumOf<A>> (&acc)[M][N], const A* a, int64_t lda, const A* b, int64_t ldb,
                                     int64_t K) {
  Vec<SumOf<A>> part[U][M][N] = {};
  int64_t k = 0;
  for (; k + U <= K; k += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) accumulate<A, M, N>(part[u], a, lda, b, ldb, k + u);
  }
  for (; k < K; ++k) accumulate<A, M, N>(acc, a, lda, b, ldb, k);
#pragma GCC unroll 8
  for (int step = 1; step < U; step *= 2) {
#pragma GCC unroll 8
    for (int u = 0; u + step < U; u += 2 * step) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) part[u][m][n] += part[u + step][m][n];
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] += part[0][m][n];
  }
}

// With Fetch, a cache line of what is multiplied later is fetched into the second-level cache for each k.
template <class A, int M, int N, bool Fetch>
void tile(SumOf<A>* c, int64_t ldc, const A* a, int64_t lda, const A* b, int64_t ldb, int64_t K, bool add,
          const char* later) {
  constexpr int W = kLanes<A>;
  Vec<SumOf<A>> acc[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = Vec<SumOf<A>>{};
  }
  constexpr int U = M * N >= 8 ? 1 : M * N >= 4 ? 2 : M * N >= 2 ? 4 : 8;
  if constexpr (U == 1) {
    for (int64_t k = 0; k < K; ++k) {
      if constexpr (Fetch) __builtin_prefetch(later + k * kCacheLine, 0, 2);
      accumulate<A, M, N>(acc, a, lda, b, ldb, k);
    }
  } else {
    accumulate_split<A, M, N, U>(acc, a, lda, b, ldb, K);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      SumOf<A>* out = c + m * ldc + n * W;
      store(out, add ? load(out) + acc[m][n] : acc[m][n]);
    }
  }
}

template <class A>
using TileFunction = void (*)(SumOf<A>*, int64_t, const A*, int64_t, const A*, int64_t, int64_t, bool, const char*);

template <class A, int N, bool Fetch, int... M>
constexpr TileFunction<A> tile_of(int m, std::integer_sequence<int, M...>) {
  // Less than half of the rows of a tile are a product by themselves, behind which nothing can be fetched.
  constexpr TileFunction<A> table[] = {tile<A, M + 1, N, (Fetch && 2 * (M + 1) >= max_rows(N))>...};
  return table[m - 1];
}

}  // namespace detail

// The product of `rows` rows of A (1 to max_rows(panel)) and a panel of `panel` vectors, added to C or written to it.
template <class A, bool Fetch = false>
inline detail::TileFunction<A> tile_function(int rows, int panel) {
  switch (panel) {
    case 1:
      return detail::tile_of<A, 1, Fetch>(rows, std::make_integer_sequence<int, max_rows(1)>());
    case 2:
      return detail::tile_of<A, 2, Fetch>(rows, std::make_integer_sequence<int, max_rows(2)>());
    case 3:
      return detail::tile_of<A, 3, Fetch>(rows, std::make_integer_sequence<int, max_rows(3)>());
    default:
      return detail::tile_of<A, 4, Fetch>(rows, std::make_integer_sequence<int, max_rows(4)>());
  }
}

// Operands summed in one go before they are added to C: one long sum would lose digits.
inline constexpr int64_t kSumBlock = 128;

// C (+)= A B for any number of rows, cut into tiles of nearly equal height. Row k of B is at b + k * ldb. K counts
// operands: half the values of bfloat16.
//
// later: null, or a packed panel as large as B that is multiplied next. Where B serves several tiles, the first ones
// fetch it from further away than the second-level cache.
template <class A>
inline void multiply_strided(SumOf<A>* c, int64_t ldc, const A* a, int64_t lda, const A* b, int64_t ldb, int64_t K,
                             int64_t rows, int panel, bool add, const A* later = nullptr) {
  const int64_t tiles = (rows + max_rows(panel) - 1) / max_rows(panel);
  const int64_t lines = later && tiles > 1 ? K * panel * kVectorBytes / kCacheLine : 0;
  int64_t fetched = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
    const bool fetch = fetched < lines;
    const auto function =
        fetch ? tile_function<A, true>(int(end - begin), panel) : tile_function<A, false>(int(end - begin), panel);
    const char* next = fetch ? reinterpret_cast<const char*>(later) + fetched * kCacheLine : nullptr;
    for (int64_t k = 0; k == 0 || k < K; k += kSumBlock) {
      const int64_t depth = K - k < kSumBlock ? K - k : kSumBlock;
      function(c + begin * ldc, ldc, a + begin * lda + k, lda, b + k * ldb, ldb, depth, add || k > 0,
               next + (fetch ? k * kCacheLine : 0));
    }
    if (fetch) fetched += K;
  }
}

// The same with B a packed panel.
template <class A>
inline void multiply_panel(SumOf<A>* c, int64_t ldc, const A* a, int64_t lda, const A* b, int64_t K, int64_t rows,
                           int panel, bool add, const A* later = nullptr) {
  multiply_strided<A>(c, ldc, a, lda, b, int64_t(panel) * kLanes<A>, K, rows, panel, add, later);
}

namespace detail {
template <class T, int... I>
SEQATTN_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2 ? kLanes<T> : 0))...);
}
template <class T, int... I>
SEQATTN_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kLanes<T> / 2 + I / 2 + (I % 2 ? kLanes<T> : 0))...);
}

// r[i][j] -> r[j][i] : log2(lanes) rounds of interleaving the upper half of the rows with the lower.
template <class T>
SEQATTN_INLINE void transpose_registers(Vec<T> (&r)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, W>();
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Vec<T> next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave_low<T>(r[i], r[i + W / 2], lanes);
      next[2 * i + 1] = interleave_high<T>(r[i], r[i + W / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = next[i];
  }
}
}  // namespace detail

// One of the products summed by dot_block: a[m][K] with w[u][K], both with k contiguous.
template <class T>
struct DotProduct {
  const T* a;
  int64_t lda;
  const T* w;
  int64_t K;
};

inline constexpr int kDotRows = kRegisters == 32 ? 4 : 2;

namespace detail {
template <class T, int M, int N>
SEQATTN_INLINE void dot_tile(Vec<T> (&acc)[M][N], const DotProduct<T>& p, const T* w) {
  constexpr int W = kLanes<T>;
  int64_t k = 0;
  for (; k + W <= p.K; k += W) {
    Vec<T> row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load(w + n * p.K + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec<T> value = load(p.a + m * p.lda + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] += value * row[n];
    }
  }
  if (k == p.K) return;
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const Vec<T> value = load_partial(p.a + m * p.lda + k, p.K - k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] += value * load_partial(w + n * p.K + k, p.K - k);
  }
}

template <class T, int M>
void dot_block(T* out, int64_t ldo, const DotProduct<T>* products, int count, int64_t units) {
  constexpr int W = kLanes<T>, kWish = M == 1 ? 8 : 4, N = W < kWish ? W : kWish;
  Vec<T> sums[M][W] = {};
  int64_t u = 0;
  for (; u + N <= units; u += N) {
    Vec<T> acc[M][N] = {};
    for (int i = 0; i < count; ++i) dot_tile<T, M, N>(acc, products[i], products[i].w + u * products[i].K);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][u + n] = acc[m][n];
    }
  }
  for (; u < units; ++u) {
    Vec<T> acc[M][1] = {};
    for (int i = 0; i < count; ++i) dot_tile<T, M, 1>(acc, products[i], products[i].w + u * products[i].K);
    for (int m = 0; m < M; ++m) sums[m][u] = acc[m][0];
  }
  for (int m = 0; m < M; ++m) {
    transpose_registers<T>(sums[m]);
    Vec<T> total = load(out + m * ldo);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) total += sums[m][i];
    store(out + m * ldo, total);
  }
}
}  // namespace detail

// out[m][u] += the products' sums over k, for `rows` rows m and up to a vector of units u, straight from row-major
// weights: for few rows that is quicker than packing them first.
template <class T>
inline void multiply_dots(T* out, int64_t ldo, const DotProduct<T>* products, int count, int64_t rows, int64_t units) {
  DotProduct<T> at[2];
  for (int64_t m = 0; m < rows; m += kDotRows) {
    for (int i = 0; i < count; ++i) {
      at[i] = products[i];
      at[i].a += m * at[i].lda;
    }
    T* o = out + m * ldo;
    switch (rows - m < kDotRows ? rows - m : kDotRows) {
      case 1:
        detail::dot_block<T, 1>(o, ldo, at, count, units);
        break;
      case 2:
        detail::dot_block<T, 2>(o, ldo, at, count, units);
        break;
      case 3:
        detail::dot_block<T, 3>(o, ldo, at, count, units);
        break;
      default:
        detail::dot_block<T, 4>(o, ldo, at, count, units);
    }
  }
}

// out[j * ldout + i] = in[i * ldin + j] for i < rows <= lanes, j < columns; out rows get zeros for i in [rows, lanes).
template <class T>
inline void transpose_strip(T* out, int64_t ldout, const T* in, int64_t ldin, int64_t rows, int64_t columns) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < columns; j += W) {
    const int64_t width = columns - j < W ? columns - j : W;
    Vec<T> r[W];
    if (rows == W && width == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = load(in + i * ldin + j);
      detail::transpose_registers<T>(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (j + i) * ldout, r[i]);
    } else {
      for (int i = 0; i < W; ++i) r[i] = i < rows ? load_partial(in + i * ldin + j, width) : Vec<T>{};
      detail::transpose_registers<T>(r);
      for (int i = 0; i < width; ++i) store(out + (j + i) * ldout, r[i]);
    }
  }
}

}  // namespace seqattn::SEQATTN_ISA
