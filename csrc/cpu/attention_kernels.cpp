// Additive attention: packing of keys, forward (scores, softmax, context) and backward (recomputing). Nothing of size
// B * T * S * A is stored: forward keeps the scores of a tile of queries, backward two columns of S and two of T.
#include "attention_kernels.h"

#include "scores/registry.h"
#include "simd.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class T>
struct ScoreMath : Math<T> {
  // min(x, bound); a NaN in x goes through.
  static SEQATTN_INLINE Vec<T> at_most(Vec<T> x, Vec<T> bound) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      return (Vec<T>)_mm512_min_ps((__m512)bound, (__m512)x);
    } else {
      return (Vec<T>)_mm512_min_pd((__m512d)bound, (__m512d)x);
    }
#else
    return SEQATTN_ISA::at_most(x, bound);
#endif
  }
};

template <class T>
SEQATTN_INLINE Vec<T> abs(Vec<T> x) {
  return x < Vec<T>{} ? -x : x;
}

// max(most, |x|), NaN from the first NaN on.
template <class T>
SEQATTN_INLINE Vec<T> larger(Vec<T> most, Vec<T> x) {
  const Vec<T> size = abs<T>(x);
  return (most > size) | (most != most) ? most : size;
}

// Whether no lane is past the bound, or NaN.
template <class T>
SEQATTN_INLINE bool all_at_most(Vec<T> x, T bound) {
  bool all = true;
  for (int i = 0; i < kLanes<T>; ++i) all &= x[i] <= bound;
  return all;
}

// Sum of the lanes, by halves: as few roundings on the way of each lane as there can be.
template <class T>
SEQATTN_INLINE T sum_by_halves(Vec<T> v) {
  for (int n = kLanes<T> / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) v[i] += v[i + n];
  }
  return v[0];
}

template <class T>
inline constexpr T kInfinity = T(__builtin_inf());

// The lower (upper) halves of a and b, interleaved.
template <class T, int N, int... I>
struct MakeLanes : MakeLanes<T, N - 1, N - 1, I...> {};
template <class T, int... I>
struct MakeLanes<T, 0, I...> {
  static SEQATTN_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
    return __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + I / 2)...);
  }
  static SEQATTN_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
    return __builtin_shufflevector(a, b, (I % 2 * kLanes<T> + kLanes<T> / 2 + I / 2)...);
  }
};

// Transposes kLanes vectors of kLanes elements: each stage is a perfect shuffle of all of them.
template <class T>
SEQATTN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  using Pick = MakeLanes<T, W>;
#pragma GCC unroll 8
  for (int stage = 1; stage < W; stage *= 2) {
    Vec<T> next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = Pick::interleave_low(rows[i], rows[i + W / 2]);
      next[2 * i + 1] = Pick::interleave_high(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// What a packed block holds: tanh k, e^2k or k, by its largest |k|.
enum class Keys { small, exponential, plain };

template <class T>
SEQATTN_INLINE Keys form_of(T kmax) {
  return kmax <= T(Additive::kSmall) ? Keys::small : kmax <= Additive::kLargestKey<T> ? Keys::exponential : Keys::plain;
}

// Packs keys [16, A] (the last `16 - count` missing: taken as 0) into one block.
template <class T>
void pack_block(const T* keys, int64_t count, int64_t A, T* block) {
  constexpr int W = kLanes<T>;
  Vec<T> largest{};
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t a = 0; a < A; a += W) {
      const Vec<T> size = abs<T>(load_partial(keys + s * A + a, A - a));
      largest = size > largest ? size : largest;
    }
  }
  const T kmax = max_lanes<T>(largest);
  const Keys form = form_of(kmax);
  const int64_t rows = packed_rows(A) - 1;
  for (int64_t a = 0; a < A; a += W) {
    const int64_t columns = rows - a < W ? rows - a : W;
    for (int64_t first = 0; first < kKeyBlock; first += W) {
      Vec<T> tile[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int64_t s = first + i;
        const Vec<T> k = s < count ? load_partial(keys + s * A + a, A - a) : Vec<T>{};
        tile[i] = form == Keys::exponential ? exp<T>(k + k) : form == Keys::small ? tanh<T>(k) : k;
      }
      transpose<T>(tile);
      for (int64_t i = 0; i < columns; ++i) store(block + (a + i) * kKeyBlock + first, tile[i]);
    }
  }
  for (int64_t i = 0; i < kKeyBlock; i += W) store(block + rows * kKeyBlock + i, broadcast(kmax));
}

template <class T>
void pack(const AttentionArgs<T>& args, T* packed, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / args.blocks(), s = item % args.blocks() * kKeyBlock;
    const int64_t count = args.S - s < kKeyBlock ? args.S - s : kKeyBlock;
    pack_block(args.keys + (b * args.S + s) * args.A, count, args.A, packed + item * packed_block(args.A));
  }
}

// The queries of one tile, ready for the score forms, rows of packed_rows(A) elements, zero past A.
template <class T>
struct TileQueries {
  T *plain, *exponentials, *tangents;  // q, e^2q; tanh q where all are small
  bool small;
  int64_t stride;
};

template <class T>
TileQueries<T> prepare_queries(const AttentionArgs<T>& args, int64_t b, int64_t t0, int64_t rows, T* scratch) {
  constexpr int W = kLanes<T>;
  const int64_t width = packed_rows(args.A);
  TileQueries<T> tile{scratch, scratch + kTileRows * width, scratch + 2 * kTileRows * width, false, width};
  Vec<T> largest{};
  for (int64_t i = 0; i < rows; ++i) {
    const T* q = args.query + (b * args.T_ + t0 + i) * args.A;
    for (int64_t a = 0; a < width; a += W) {
      const Vec<T> x = a < args.A ? load_partial(q + a, args.A - a) : Vec<T>{};
      largest = larger<T>(largest, x);
      store_partial(tile.plain + i * width + a, x, width - a);
      store_partial(tile.exponentials + i * width + a, exp<T>(x + x), width - a);
    }
  }
  tile.small = all_at_most<T>(largest, T(Additive::kSmall));
  if (tile.small) {
    for (int64_t n = 0; n < rows * width; n += W) {
      store_partial(tile.tangents + n, tanh<T>(load_partial(tile.plain + n, rows * width - n)), rows * width - n);
    }
  }
  return tile;
}

// One query makes a single pass over keys and values, at the speed of the outer caches: ask for what comes next early
// enough that neither the end of a page nor the work between two passes leaves them idle.
template <class T, int lines>
SEQATTN_INLINE void prefetch_ahead(const T* p) {
  constexpr int kAhead = 2048;
#pragma GCC unroll 16
  for (int i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + i * 64);
}

enum class Form { small, merged, single, plain };

// Scores of N queries against K blocks of 16 keys: out[i][16 * K], rows `ld` apart.
template <class T, Form form, int N, int K>
SEQATTN_INLINE void score_rows(const AttentionArgs<T>& args, const TileQueries<T>& tile, int64_t first, const T* block,
                               T* out, int64_t ld) {
  using M = ScoreMath<T>;
  constexpr int W = kLanes<T>;
  constexpr int64_t kSum = 32;
  const int64_t rows = packed_rows(args.A) - 1, size = packed_block(args.A);
  const T* q0 = (form == Form::small   ? tile.tangents
                 : form == Form::plain ? tile.plain
                                       : tile.exponentials) +
                first * tile.stride;
  for (int64_t lane = 0; lane < kKeyBlock; lane += W) {
    Vec<T> acc[N][K];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < K; ++j) acc[i][j] = Vec<T>{};
    }
    // Sums of kSum columns are added up: fewer roundings meet a large partial sum.
    for (int64_t a0 = 0; a0 < rows; a0 += kSum) {
      const int64_t a1 = a0 + kSum < rows ? a0 + kSum : rows;
      Vec<T> part[N][K];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < K; ++j) part[i][j] = Vec<T>{};
      }
      if constexpr (form == Form::merged || form == Form::small) {
        const Vec<T> bound = broadcast(Additive::kMergedBound<T>);
        for (int64_t a = a0; a < a1; a += Additive::kMerged) {
          const T* group = form == Form::small ? args.v + a : args.v_groups + 2 * a;
          const Vec<T> v[4] = {broadcast(group[0]), broadcast(group[1]), broadcast(group[2]), broadcast(group[3])};
          const Vec<T> half = form == Form::small ? Vec<T>{} : broadcast(group[4]);
#pragma GCC unroll 2
          for (int j = 0; j < K; ++j) {
            const T* keys = block + j * size + a * kKeyBlock + lane;
            if constexpr (N == 1) prefetch_ahead<T, 4>(keys);
            const Vec<T> k[4] = {load(keys), load(keys + kKeyBlock), load(keys + 2 * kKeyBlock),
                                 load(keys + 3 * kKeyBlock)};
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
              const T* at = q0 + i * tile.stride + a;
              const Vec<T> q[4] = {broadcast(at[0]), broadcast(at[1]), broadcast(at[2]), broadcast(at[3])};
              if constexpr (form == Form::small) {
                part[i][j] += Additive::forward_small_merged(q, k, v);
              } else {
                part[i][j] += Additive::forward_merged<M>(q, k, v, half, bound);
              }
            }
          }
        }
      } else {
        for (int64_t a = a0; a < (a1 < args.A ? a1 : args.A); ++a) {
#pragma GCC unroll 2
          for (int j = 0; j < K; ++j) {
            const Vec<T> k = load(block + j * size + a * kKeyBlock + lane);
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
              const Vec<T> q = broadcast(q0[i * tile.stride + a]);
              const Vec<T> term = form == Form::single ? Additive::forward_exp(q, k) : Additive::forward<M>(q, k);
              part[i][j] = part[i][j] + args.v[a] * term;
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < K; ++j) acc[i][j] += part[i][j];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < K; ++j) {
        store(out + i * ld + j * kKeyBlock + lane, form == Form::merged ? acc[i][j] * (T(-2) * args.scale) : acc[i][j]);
      }
    }
  }
}

// Scores of a tile's queries against `blocks` blocks of keys.
template <class T, Form form>
void score_tile(const AttentionArgs<T>& args, const TileQueries<T>& tile, int64_t rows, const T* block, int64_t blocks,
                T* out, int64_t ld) {
  for (int64_t j = 0; j < blocks; ++j) {
    const T* at = block + j * packed_block(args.A);
    T* o = out + j * kKeyBlock;
    if (rows == 1 && j + 2 <= blocks) {
      score_rows<T, form, 1, 2>(args, tile, 0, at, o, ld);
      ++j;
      continue;
    }
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) score_rows<T, form, 4, 1>(args, tile, i, at, o + i * ld, ld);
    if (i + 2 <= rows) {
      score_rows<T, form, 2, 1>(args, tile, i, at, o + i * ld, ld);
      i += 2;
    }
    if (i < rows) score_rows<T, form, 1, 1>(args, tile, i, at, o + i * ld, ld);
  }
}

// Scores of a tile's queries against key blocks [j0, j1) of batch element b, into out[row][16 * block].
template <class T>
void score_blocks(const AttentionArgs<T>& args, const TileQueries<T>& tile, int64_t b, int64_t rows, int64_t j0,
                  int64_t j1, T* out, int64_t ld, T* block_scratch) {
  const int64_t size = packed_block(args.A);
  const auto form = [&](const T* block) { return form_of(block[size - kKeyBlock]); };
  for (int64_t j = j0; j < j1;) {
    const T* block = args.packed ? args.packed + (b * args.blocks() + j) * size : block_scratch;
    const int64_t s = j * kKeyBlock;
    if (!args.packed) {
      const int64_t count = args.S - s < kKeyBlock ? args.S - s : kKeyBlock;
      pack_block(args.keys + (b * args.S + s) * args.A, count, args.A, block_scratch);
    }
    const Keys keys = form(block);
    int64_t n = 1;
    if (keys == Keys::small && !tile.small) {
      for (int64_t i = 0; i < size - kKeyBlock; i += kLanes<T>) {
        store(block_scratch + i, Additive::exp_of_small(load(block + i)));
      }
      block = block_scratch;
    } else {
      // As many blocks as share a form.
      while (args.packed && j + n < j1 && form(block + n * size) == keys) ++n;
    }
    j += n;
    if (keys == Keys::plain) {
      score_tile<T, Form::plain>(args, tile, rows, block, n, out + s, ld);
    } else if (keys == Keys::small && tile.small) {
      score_tile<T, Form::small>(args, tile, rows, block, n, out + s, ld);
    } else if (args.v_finite) {
      score_tile<T, Form::merged>(args, tile, rows, block, n, out + s, ld);
    } else {
      score_tile<T, Form::single>(args, tile, rows, block, n, out + s, ld);
    }
  }
}

// Masked softmax of one row, in place, of round_up(length, 16) scores; zeros where nothing is attended to.
template <class T>
void softmax_row(const AttentionArgs<T>& args, int64_t b, int64_t t, T* row) {
  constexpr int W = kLanes<T>;
  const int64_t length = args.length(b), padded = round_up(length, kKeyBlock);
  bool any = length > 0;
  if (args.mask_bool) {
    const uint8_t* mask = args.mask_bool + b * args.mask_b + t * args.mask_t;
    unsigned seen = 0;
    for (int64_t s = 0; s < length; ++s) {
      seen |= mask[s];
      row[s] = mask[s] ? row[s] : -kInfinity<T>;
    }
    any = seen != 0;
  } else if (args.mask_add) {
    const T* mask = args.mask_add + b * args.mask_b + t * args.mask_t;
    any = false;
    for (int64_t s = 0; s < length; ++s) {
      const bool attend = mask[s] != -kInfinity<T>;
      any |= attend;
      row[s] = attend ? row[s] + mask[s] : -kInfinity<T>;
    }
  }
  for (int64_t s = length; s < padded; ++s) row[s] = -kInfinity<T>;
  T* weights = args.weights ? args.weights + (b * args.T_ + t) * args.S : nullptr;
  if (!any) {
    for (int64_t s = 0; s < padded; ++s) row[s] = 0;
  } else {
    Vec<T> largest = broadcast(-kInfinity<T>);
    for (int64_t s = 0; s < padded; s += W) {
      const Vec<T> x = load(row + s);
      largest = x > largest ? x : largest;
    }
    const Vec<T> top = broadcast(max_lanes<T>(largest));
    Vec<T> sum{};
    for (int64_t s = 0; s < padded; s += W) {
      const Vec<T> e = exp<T>(load(row + s) - top);
      sum += e;
      store(row + s, e);
    }
    const Vec<T> total = broadcast(sum_by_halves<T>(sum));
    for (int64_t s = 0; s < padded; s += W) store(row + s, load(row + s) / total);
  }
  if (weights) {
    int64_t s = 0;
    for (; s < length; s += W) store_partial(weights + s, load(row + s), length - s);
    for (s = length; s < args.S; ++s) weights[s] = 0;
  }
}

// context[i][0..width) = sum over the listed keys of weights[i][s] * values[s], for N rows. Without a list: keys
// [0, count).
template <class T, int N, int NV, bool listed>
SEQATTN_INLINE void context_vectors(const T* weights, int64_t ld, const T* values, int64_t D, const int32_t* list,
                                    int64_t count, T* out, int64_t width) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[N][NV];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec<T>{};
  }
  for (int64_t n = 0; n < count; ++n) {
    const int64_t s = listed ? list[n] : n;
    if constexpr (N == 1 && NV > 1) prefetch_ahead<T, NV * kVectorBytes / 64>(values + s * D);
    Vec<T> y[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      y[j] = NV == 1 ? load_partial(values + s * D, width) : load(values + s * D + j * W);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> w = broadcast(weights[i * ld + s]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] = acc[i][j] + w * y[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store_partial(out + i * D + j * W, acc[i][j], NV == 1 ? width : W);
  }
}

template <class T, int N, bool listed>
void context_rows(const T* weights, int64_t ld, const T* values, int64_t D, const int32_t* list, int64_t count, T* out,
                  int64_t width) {
  constexpr int W = kLanes<T>;
  // Enough accumulators to hide the latency of a multiply-add, no more than there are registers.
  constexpr int kWide = kRegisters == 32 ? (N == 1 ? 16 : 4) : (N == 1 ? 8 : 2);
  int64_t d = 0;
  for (; d + kWide * W <= width; d += kWide * W) {
    context_vectors<T, N, kWide, listed>(weights, ld, values + d, D, list, count, out + d, W);
  }
  if constexpr (N == 1) {
    for (; d + 4 * W <= width; d += 4 * W) {
      context_vectors<T, N, 4, listed>(weights, ld, values + d, D, list, count, out + d, W);
    }
  }
  for (; d < width; d += W) {
    context_vectors<T, N, 1, listed>(weights, ld, values + d, D, list, count, out + d, width - d < W ? width - d : W);
  }
}

template <class T>
SEQATTN_INLINE bool attends(const AttentionArgs<T>& args, int64_t b, int64_t t, int64_t s) {
  const int64_t at = b * args.mask_b + t * args.mask_t + s;
  return args.mask_bool ? args.mask_bool[at] != 0 : args.mask_add[at] != -kInfinity<T>;
}

// Lists the keys that some of `rows` queries from t0 attend to; a value that none of them does may be anything.
template <class T>
int64_t list_keys(const AttentionArgs<T>& args, int64_t b, int64_t t0, int64_t rows, int32_t* list) {
  const int64_t length = args.length(b), distinct = args.mask_t ? rows : 1;
  int64_t count = 0;
  for (int64_t s = 0; s < length; ++s) {
    bool any = false;
    for (int64_t i = 0; i < distinct && !any; ++i) any = attends(args, b, t0 + i, s);
    list[count] = int32_t(s);
    count += any;
  }
  return count;
}

// Columns [d0, d1) of the context of a tile's queries from their weights.
template <class T>
void context_tile(const AttentionArgs<T>& args, int64_t b, int64_t t0, int64_t rows, const T* weights, int64_t ld,
                  int64_t d0, int64_t d1, int32_t* list) {
  const T* values = args.values + b * args.S * args.D + d0;
  T* out = args.context + (b * args.T_ + t0) * args.D + d0;
  const bool masked = args.mask_bool || args.mask_add;
  const int64_t length = args.length(b), width = d1 - d0, D = args.D;
  if (!masked) {
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6) {
      context_rows<T, 6, false>(weights + i * ld, ld, values, D, nullptr, length, out + i * D, width);
    }
    for (; i + 2 <= rows; i += 2) {
      context_rows<T, 2, false>(weights + i * ld, ld, values, D, nullptr, length, out + i * D, width);
    }
    if (i < rows) context_rows<T, 1, false>(weights + i * ld, ld, values, D, nullptr, length, out + i * D, width);
    return;
  }
  const int64_t count = list_keys(args, b, t0, rows, list);
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) {
    context_rows<T, 6, true>(weights + i * ld, ld, values, D, list, count, out + i * D, width);
  }
  for (; i < rows; ++i) context_rows<T, 1, true>(weights + i * ld, ld, values, D, list, count, out + i * D, width);
  if (!args.mask_t) return;
  // A query must not see what only its neighbours in the tile attend to: 0 * NaN. Rare, so by a second look.
  for (i = 0; i < rows; ++i) {
    bool finite = true;
    for (int64_t d = 0; d < width; ++d) finite &= out[i * D + d] - out[i * D + d] == 0;
    if (finite) continue;
    const int64_t own = list_keys(args, b, t0 + i, 1, list);
    context_rows<T, 1, true>(weights + i * ld, ld, values, D, list, own, out + i * D, width);
  }
}

template <class T>
struct ForwardScratch {
  T *queries, *block, *rows;
  int32_t* list;
  ForwardScratch(const AttentionArgs<T>& args, T* scratch) {
    block = scratch;
    rows = block + packed_block(args.A);
    queries = rows + kTileRows * round_up(args.S, kKeyBlock);
    list = reinterpret_cast<int32_t*>(queries + 3 * kTileRows * packed_rows(args.A));
  }
};

struct Tile {
  int64_t b, t0, rows;
};

template <class T>
SEQATTN_INLINE Tile tile_of(const AttentionArgs<T>& args, int64_t index) {
  const int64_t t0 = index % args.tiles() * kTileRows, left = args.T_ - t0;
  return {index / args.tiles(), t0, left < kTileRows ? left : kTileRows};
}

template <class T>
void forward(const AttentionArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const ForwardScratch<T> space(args, scratch);
  const int64_t ld = round_up(args.S, kKeyBlock);
  for (int64_t item = begin; item < end; ++item) {
    const Tile at = tile_of(args, item);
    const TileQueries<T> tile = prepare_queries(args, at.b, at.t0, at.rows, space.queries);
    score_blocks(args, tile, at.b, at.rows, 0, ceil_div(args.length(at.b), kKeyBlock), space.rows, ld, space.block);
    for (int64_t i = 0; i < at.rows; ++i) softmax_row(args, at.b, at.t0 + i, space.rows + i * ld);
    context_tile(args, at.b, at.t0, at.rows, space.rows, ld, 0, args.D, space.list);
  }
}

template <class T>
void scores(const AttentionArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const ForwardScratch<T> space(args, scratch);
  const int64_t chunks = ceil_div(args.blocks(), args.key_chunk);
  for (int64_t item = begin; item < end; ++item) {
    const Tile at = tile_of(args, item / chunks);
    const int64_t j0 = item % chunks * args.key_chunk, last = ceil_div(args.length(at.b), kKeyBlock);
    const int64_t j1 = j0 + args.key_chunk < last ? j0 + args.key_chunk : last;
    if (j0 >= j1) continue;
    const TileQueries<T> tile = prepare_queries(args, at.b, at.t0, at.rows, space.queries);
    score_blocks(args, tile, at.b, at.rows, j0, j1, args.rows + (at.b * args.T_ + at.t0) * args.row, args.row,
                 space.block);
  }
}

template <class T>
void softmax(const AttentionArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    softmax_row(args, item / args.T_, item % args.T_, args.rows + item * args.row);
  }
}

template <class T>
void context(const AttentionArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
  const ForwardScratch<T> space(args, scratch);
  const int64_t chunks = ceil_div(args.D, kContextChunk);
  for (int64_t item = begin; item < end; ++item) {
    const Tile at = tile_of(args, item / chunks);
    const int64_t d0 = item % chunks * kContextChunk;
    const int64_t d1 = d0 + kContextChunk < args.D ? d0 + kContextChunk : args.D;
    context_tile(args, at.b, at.t0, at.rows, args.rows + (at.b * args.T_ + at.t0) * args.row, args.row, d0, d1,
                 space.list);
  }
}

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
      const Vec<T> sum = broadcast(sum_by_halves<T>(sums));
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
  using M = ScoreMath<T>;
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
    const bool moderate = all_at_most<T>(kmax, Additive::kLargestKey<T>);
    const T* ds = args.d_scores + b * args.T_ * S;
    const Vec<T> v = load_partial(args.v + a, left);
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

template <class T>
constexpr AttentionKernels<T> table() {
  return {kLanes<T>, pack<T>, forward<T>, scores<T>, softmax<T>, context<T>, d_scores<T>, backward<T>};
}

}  // namespace

extern const AttentionKernels<float> attention_kernels_f32 = table<float>();
extern const AttentionKernels<double> attention_kernels_f64 = table<double>();

}  // namespace seqattn::SEQATTN_ISA
