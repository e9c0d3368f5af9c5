// Scores of additive attention: a tile of queries against packed keys. For attention_kernels.cpp alone.
#pragma once

#include "attention_keys.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// The queries of one tile, ready for the score forms, rows of packed_rows(A) elements, zero past A.
template <class T>
struct TileQueries {
  T *plain, *exponentials, *tangents;  // q, e^2q; tanh q where all are small
  bool small;
  int64_t stride;
  const T *v, *v_groups;  // of their head
  T scale;
};

template <class T>
TileQueries<T> prepare_queries(const AttentionArgs<T>& args, int64_t b, int64_t t0, int64_t rows, T* scratch) {
  constexpr int W = kLanes<T>;
  const int64_t width = packed_rows(args.A);
  const int64_t head = args.head(b);
  TileQueries<T> tile{
      scratch, scratch + kTileRows * width,   scratch + 2 * kTileRows * width,        false,
      width,   args.v + head * args.v_stride, args.v_groups + head * 2 * (width - 1), args.scales[head]};
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

enum class Form { small, merged, single, plain };

// Scores of N queries against K blocks of 16 keys: out[i][16 * K], rows `ld` apart.
template <class T, Form form, int N, int K>
SEQATTN_INLINE void score_rows(const AttentionArgs<T>& args, const TileQueries<T>& tile, int64_t first, const T* block,
                               T* out, int64_t ld) {
  using M = Math<T>;
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
          const T* group = form == Form::small ? tile.v + a : tile.v_groups + 2 * a;
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
              part[i][j] = part[i][j] + tile.v[a] * term;
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
        store(out + i * ld + j * kKeyBlock + lane, form == Form::merged ? acc[i][j] * (T(-2) * tile.scale) : acc[i][j]);
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

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
