// What the persistent recurrence kernels share: how units, weights and batch columns are laid over blocks.
//
// A team of blocks, a cluster or a part of a cooperative grid, keeps one direction's W_hh in registers and shared
// memory for the whole sequence and serves up to 8 * kColumnTiles sequences, the columns. Hidden units are padded to
// kPadded. A block owns 16 * kGroups of them with all their gates; a warp multiplies the gates of 16 units (one m16
// tile for each gate, so that a lane finds all gates of a unit in its own accumulators) with a quarter of the previous
// h.
//
// The k index of a product may be permuted as long as weights and h agree. 16 bytes of h, a piece, are kPiece units of
// one column; a lane's B fragments of two mma (a pair of k tiles) are one piece, and its A fragments of a pair are 16
// bytes of a row of W_hh. Column c of the eight of a piece stands in slot
// (4 * (c % 2) + c / 2) ^ (piece % 4): a warp reads pieces without bank conflicts and writes 64 contiguous bytes.
#pragma once

#include <type_traits>

#include "../cells/registry.h"
#include "persistent_shapes.h"
#include "platform.cuh"
#include "recurrence.h"

namespace seqattn::gpu {

using Words4 = Vec<uint32_t, 4>;

template <class Cell>
constexpr CellSize cell_size() {
  return {Cell::kGates, Cell::kSlots, kept(Cell::kSaved, Cell::kHasCell), Cell::kHasCell};
}

// What forward and backward kernels of one cell, element type and team have in common.
template <class Cell_, class T_, int kPadded_, int kBlocks_, int kColumnTiles_, bool kGrid_>
struct PersistentShape {
  using Cell = Cell_;
  using T = T_;
  static constexpr TeamShape kShape{cell_size<Cell>(), sizeof(T), kPadded_, kBlocks_, kColumnTiles_, kGrid_};
  static constexpr bool kGrid = kGrid_;
  static constexpr int kPadded = kPadded_, kBlocks = kBlocks_, kColumnTiles = kColumnTiles_;
  static constexpr int kGroups = kShape.groups(), kUnits = kShape.units();
  static constexpr int kWarps = kShape.warps(), kThreads = kShape.threads();
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kPiece = kShape.piece();
  static constexpr int kBarriers = 0;  // of shared memory, in bytes
};

// T with the mma of its type.
template <class T>
struct Operand {
  using Math = std::conditional_t<std::is_same_v<T, bfloat16>, BriefMath, FastMath>;
  static constexpr int kPiece = 16 / sizeof(T);
  static SEQATTN_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(d, a, b);
  }
  static SEQATTN_DEVICE float round(float x) {
    // A bfloat16 is the upper half of a float; the conversion of one number alone would be a slow instruction.
    return std::is_same_v<T, bfloat16> ? bits_float(pack<T>(0.f, x)) : to_float(from_float<T>(x));
  }
  static SEQATTN_DEVICE uint32_t weight_bits(uint32_t x) { return x; }
};
template <>
struct Operand<float> {
  using Math = FastMath;
  static constexpr int kPiece = 4;
  static SEQATTN_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8(d, a, b);
  }
  static SEQATTN_DEVICE float round(float x) { return x; }
  static SEQATTN_DEVICE uint32_t weight_bits(uint32_t x) { return to_tf32(bits_float(x)); }
};

// Copies 16 bytes of a row that ends `left` bytes from here to shared memory, with zeros past its end: behind the
// thread's back where it can, else element by element. Ends with cp_async_commit() and cp_async_wait().
template <class Element>
SEQATTN_DEVICE void copy_piece(Shared<unsigned char> to, const void* from, int left, bool aligned) {
  if (aligned && (left >= 16 || left <= 0)) {
    cp_async<16>(shared_cast<Words4>(to), static_cast<const Words4*>(from), left > 0);
  } else {
    constexpr int kSize = sizeof(Element);
    SEQATTN_UNROLL
    for (int i = 0; i < 16 / kSize; ++i) {
      Element element{};
      if (i * kSize < left) element = load(static_cast<const Element*>(from) + i);
      store(shared_cast<Element>(to) + i, element);
    }
  }
}

// A fragments of the two mma of a pair of k tiles.
struct WeightPair {
  uint32_t a[2][4];
};

// 16 bytes of row `row` of a [rows, row_size] matrix from element `k` on; zeros where `row` or `k` is past its end.
template <class T>
SEQATTN_DEVICE Words4 load_piece(const T* matrix, int64_t row, int64_t rows, int64_t k, int64_t row_size,
                                 bool vectors) {
  constexpr int kPiece = Operand<T>::kPiece;
  Words4 words{};
  if (row < rows && k < row_size) {
    const T* from = matrix + row * row_size + k;
    if (vectors) {
      words = *reinterpret_cast<const Words4*>(from);
    } else if constexpr (sizeof(T) == 4) {
      SEQATTN_UNROLL
      for (int i = 0; i < kPiece; ++i) words[i] = k + i < row_size ? float_bits(to_float(from[i])) : 0;
    } else {
      SEQATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float low = to_float(from[2 * i < row_size - k ? 2 * i : 0]);
        const float high = to_float(from[2 * i + 1 < row_size - k ? 2 * i + 1 : 0]);
        words[i] = pack<T>(k + 2 * i < row_size ? low : 0.f, k + 2 * i + 1 < row_size ? high : 0.f);
      }
    }
  }
  return words;
}

// kPiece values down a column, `row` apart; zeros past `units`.
template <class T>
SEQATTN_DEVICE Words4 load_piece_transposed(const T* from, int units, int row) {
  constexpr int kPiece = Operand<T>::kPiece;
  float values[kPiece];
  SEQATTN_UNROLL
  for (int i = 0; i < kPiece; ++i) values[i] = i < units ? to_float(from[i * row]) : 0.f;
  Words4 words;
  SEQATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = float_bits(values[i]);
    } else {
      words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return words;
}

// Fragments of rows `row` and `row + 8`, columns k .. k + kPiece - 1 of this lane.
template <class T>
SEQATTN_DEVICE WeightPair weight_pair(const Words4& upper, const Words4& lower) {
  WeightPair pair;
  SEQATTN_UNROLL
  for (int i = 0; i < 2; ++i) {
    pair.a[i][0] = Operand<T>::weight_bits(upper[2 * i]);
    pair.a[i][1] = Operand<T>::weight_bits(lower[2 * i]);
    pair.a[i][2] = Operand<T>::weight_bits(upper[2 * i + 1]);
    pair.a[i][3] = Operand<T>::weight_bits(lower[2 * i + 1]);
  }
  return pair;
}

// Takes this warp's weights, pair(p, tile) of kPairs pairs and kTiles m16 tiles, to where they stay: the first kHeld
// pairs in registers, the others in `shared`. The loads are a loop of few instructions that passes through `stage`
// (TeamShape::stage_bytes()); unrolled into registers, they alone would need more than there are.
template <int kPairs, int kHeld, int kTiles, class Pair>
SEQATTN_DEVICE void hold_weights(uint32_t (&held)[kHeld ? kHeld : 1][kTiles][2][4], Shared<Words4> shared,
                                 Shared<Words4> stage, Pair pair) {
  constexpr int kStage = kTiles < TeamShape::kStageTiles ? kTiles : TeamShape::kStageTiles;
  const int lane = lane_index(), warp = warp_index();
  const Shared<Words4> own = stage + warp * (kStage * 64) + lane;
  const auto put = [&](const WeightPair& fragments, Shared<Words4> to) {
    SEQATTN_UNROLL
    for (int i = 0; i < 2; ++i) {
      Words4 words;
      SEQATTN_UNROLL
      for (int r = 0; r < 4; ++r) words[r] = fragments.a[i][r];
      store(to + i * 32, words);
    }
  };
  SEQATTN_UNROLL
  for (int p = 0; p < kHeld; ++p) {
    SEQATTN_UNROLL
    for (int from = 0; from < kTiles; from += kStage) {
      SEQATTN_UNROLL_BY(1)
      for (int tile = from; tile < from + kStage && tile < kTiles; ++tile) put(pair(p, tile), own + (tile - from) * 64);
      SEQATTN_UNROLL
      for (int tile = from; tile < from + kStage && tile < kTiles; ++tile) {
        SEQATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const Words4 words = load(own + ((tile - from) * 2 + i) * 32);
          SEQATTN_UNROLL
          for (int r = 0; r < 4; ++r) held[p][tile][i][r] = words[r];
        }
      }
    }
  }
  SEQATTN_UNROLL_BY(1)
  for (int p = kHeld; p < kPairs; ++p) {
    SEQATTN_UNROLL_BY(1)
    for (int tile = 0; tile < kTiles; ++tile) {
      put(pair(p, tile), shared + ((warp * (kPairs - kHeld) + p - kHeld) * kTiles + tile) * 64 + lane);
    }
  }
}

// Numbers that the inner loop needs in registers. The compiler would fetch kernel parameters again at each use, at some
// 50 cycles each; what came through shared memory it has to keep. By all threads; `through` has room for kCount
// numbers.
template <int kCount>
SEQATTN_DEVICE void hold(Shared<int> through, int (&numbers)[kCount]) {
  if (thread_index() == 0) {
    SEQATTN_UNROLL
    for (int i = 0; i < kCount; ++i) store(through + i, numbers[i]);
  }
  block_sync();
  SEQATTN_UNROLL
  for (int i = 0; i < kCount; ++i) numbers[i] = load(through + i);
}

// Row `row` of rows that are `bytes` apart: one multiply-add, where 64-bit products would take five.
template <class T>
SEQATTN_DEVICE T* row_at(T* base, int row, int bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + static_cast<int64_t>(row) * bytes);
}

// How a launch shares out its work, and where the blocks of a grid meet.
struct Layout {
  int first, columns;  // sequence of the first team's first column; columns of a tile
  uint32_t* counters;  // grid: [directions][teams][tiles], zero
  Words4* exchange;    // grid: [directions][teams][Shape::kExchangeWords]
};

// Where a thread stands: its lane, row g and quarter q of an mma tile; its warp, `split` of the group that multiplies
// for the same units; its block's rank in the team; the team; the direction.
struct Standing {
  int lane, g, q, warp, group, split, rank, team, direction;
};
template <class Shape>
SEQATTN_DEVICE Standing standing() {
  const int lane = lane_index(), warp = warp_index(), block = block_index();
  return {lane,
          lane / 4,
          lane % 4,
          warp,
          warp / kSplit,
          warp % kSplit,
          block % Shape::kBlocks,
          block / Shape::kBlocks,
          static_cast<int>(block_index_y())};
}

// The sequences of a team and where their rows are. `roomy`: there are registers to keep all of it in.
struct Sequences {
  int steps, batch, hidden, out_step, out_batch, ld_output;  // ld_output in bytes
  int columns, first;                                        // of a tile; sequence of column 0
  const int64_t *offsets, *lengths;
  bool packed;

  template <class Shape, bool kRoomy, class Args>
  SEQATTN_DEVICE static Sequences of(const Args& args, const Layout& layout, int team, Shared<unsigned char> shared) {
    const auto address = reinterpret_cast<uintptr_t>(args.rows.offsets);
    int numbers[] = {static_cast<int>(args.rows.steps),
                     static_cast<int>(args.rows.batch),
                     static_cast<int>(args.hidden),
                     static_cast<int>(args.rows.out_step),
                     static_cast<int>(args.ld_output) * static_cast<int>(sizeof(typename Shape::T)),
                     static_cast<int>(address & 0xffffffff),
                     static_cast<int>(address >> 32)};
    if constexpr (kRoomy) hold(shared_cast<int>(shared + TeamShape::kNumbers), numbers);
    Sequences found;
    found.steps = numbers[0], found.batch = numbers[1], found.hidden = numbers[2], found.out_step = numbers[3];
    found.ld_output = numbers[4];
    found.offsets = reinterpret_cast<const int64_t*>(static_cast<uintptr_t>(static_cast<uint32_t>(numbers[6])) << 32 |
                                                     static_cast<uint32_t>(numbers[5]));
    found.packed = found.offsets != nullptr;
    found.lengths = args.rows.lengths;
    found.out_batch = static_cast<int>(args.rows.out_batch);
    found.columns = layout.columns;
    found.first = layout.first + team * (layout.columns * Shape::kColumnTiles);
    return found;
  }

  // Sequences of a tile; none where it is 0 or less.
  SEQATTN_DEVICE int present(int tile) const {
    const int rest = batch - (first + tile * columns);
    return rest < columns ? rest : columns;
  }
  // Steps of a sequence, whatever its length is said to be.
  SEQATTN_DEVICE int length(int sequence) const {
    const int given = lengths != nullptr ? static_cast<int>(lengths[sequence]) : steps;
    const int most = given < steps ? given : steps;
    return most < 0 ? 0 : most;
  }
  // Step t of a sequence, in rows of the internal arrays and of the caller's.
  SEQATTN_DEVICE int row(int t, int sequence) const {
    return (packed ? static_cast<int>(offsets[t]) : t * batch) + sequence;
  }
  SEQATTN_DEVICE int out_row(int t, int sequence) const {
    return packed ? static_cast<int>(offsets[t]) + sequence : t * out_step + sequence * out_batch;
  }
};

// Whether a sequence has step t.
SEQATTN_DEVICE bool runs(int t, int length) { return static_cast<unsigned>(t) < static_cast<unsigned>(length); }

// Where column `column` (0 to 7) of piece `piece` stands among the pieces, in units of 16 bytes.
SEQATTN_DEVICE int piece_place(int piece, int column) {
  return piece * 8 + ((4 * (column % 2) + column / 2) ^ (piece % 4));
}

}  // namespace seqattn::gpu
