// Additive attention: packing of keys, forward (scores, softmax, context) and backward (recomputing). Nothing of size
// B * T * S * A is stored: forward keeps the scores of a tile of queries, backward two columns of S and two of T.
#include "attention_kernels.h"

#include "attention_backward.h"
#include "attention_context.h"
#include "attention_scores.h"

namespace seqattn::SEQATTN_ISA {
namespace {

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
  const int64_t chunks = ceil_div(args.D, args.context_chunk);
  for (int64_t item = begin; item < end; ++item) {
    const Tile at = tile_of(args, item / chunks);
    const int64_t d0 = item % chunks * args.context_chunk;
    const int64_t d1 = d0 + args.context_chunk < args.D ? d0 + args.context_chunk : args.D;
    context_tile(args, at.b, at.t0, at.rows, args.rows + (at.b * args.T_ + at.t0) * args.row, args.row, d0, d1,
                 space.list);
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
