// The whole backward loop of a recurrent layer in one kernel, with W_hh transposed resident in a cluster.
//
// A block owns the units it owns in forward (persistent.cuh). It turns the gradient of their h into gradients of their
// gates, and multiplies these with its rows of W_hh: a part of the gradient of every unit's previous h, which it sends
// to the blocks that own those units; the sum of all blocks' parts is taken by the owner. So a step exchanges 4 bytes
// for each unit, column and block, where gathering the gates' gradients would take kGates times the bytes of h.
//
// A step: wait for the parts; add them up, one unit and column a lane; the cell; gate gradients to shared memory as
// pieces; a block barrier; multiply; send; then write the gate gradients and fetch the next step's values while the
// parts travel. Parts, their barrier and the pieces are double buffered: who has sent a step's parts has read those
// before, and who has passed the block barrier has read the pieces before.
#pragma once

#include "persistent.cuh"

namespace seqattn::gpu {

template <class Cell_, class T_, int kPadded, int kCluster_, int kColumnTiles_>
struct ClusterBackward {
  using Cell = Cell_;
  using T = T_;
  static constexpr ClusterShape kShape{Cell::kGates, Cell::kSlots, sizeof(T), kPadded, kCluster_, kColumnTiles_};
  static constexpr int kCluster = kCluster_, kColumnTiles = kColumnTiles_, kColumns = 8 * kColumnTiles;
  static constexpr int kGroups = kShape.groups(), kUnits = kShape.units();
  static constexpr int kWarps = kShape.warps(), kThreads = kShape.threads();
  static constexpr int kPairs = kShape.backward_pairs(), kHeld = kShape.backward_held();
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kPiece = Operand<T>::kPiece;
  static constexpr int kRowTiles = kShape.row_tiles(), kPlane = kShape.plane(), kPieces = kShape.gate_pieces();

  // Shared memory, in bytes.
  static constexpr int kBarriers = 0;
  static constexpr int kParts = ClusterShape::kBarrierBytes, kPartsSize = kShape.part_bytes();
  static constexpr int kGatePieces = kParts + 2 * kPartsSize, kGatePiecesSize = kShape.gate_bytes();
  static constexpr int kWeights = kGatePieces + 2 * kGatePiecesSize;
  static constexpr int kSharedBytes = kShape.backward_shared_bytes();

  // Where a slot's gradients stand among the pieces: those that meet W_hh first.
  static constexpr int plane(int slot) { return slot >= kSlots - kGates ? slot - (kSlots - kGates) : kGates + slot; }
  static constexpr int slot(int plane) { return plane < kGates ? plane + (kSlots - kGates) : plane - kGates; }
  // Accumulators are as many independent chains.
  static constexpr int kChains = kRowTiles == 1 ? 2 : 1;
};

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

template <class Shape>
SEQATTN_KERNEL(Shape::kThreads, 1)
cluster_backward(SEQATTN_KERNEL_PARAM Backward args, int columns) {
  using Cell = typename Shape::Cell;
  using T = typename Shape::T;
  using Op = Operand<T>;
  constexpr int kTiles = Shape::kColumnTiles, kGates = Shape::kGates, kSlots = Shape::kSlots, kPiece = Shape::kPiece;
  constexpr int kPairs = Shape::kPairs, kHeld = Shape::kHeld, kCluster = Shape::kCluster, kGroups = Shape::kGroups;
  constexpr int kRowTiles = Shape::kRowTiles, kChains = Shape::kChains, kPlane = Shape::kPlane;
  constexpr int kKept = kept(Cell::kSaved, Cell::kHasCell);

  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  const int warp = warp_index(), group = warp / kSplit, split = warp % kSplit;
  const int rank = cluster_rank(), direction = block_index_y();
  const int steps = static_cast<int>(args.rows.steps);
  const int batch = static_cast<int>(args.rows.batch), hidden = static_cast<int>(args.hidden);
  const int first = block_index() / kCluster * columns;  // sequence of column 0
  const int present = batch - first < columns ? batch - first : columns;
  const bool reverse = direction == 1;

  const Shared<unsigned char> shared = dynamic_shared<unsigned char>();
  const Shared<Barrier> barriers = shared_cast<Barrier>(shared + Shape::kBarriers);
  const Shared<float> parts = shared_cast<float>(shared + Shape::kParts);
  const Shared<unsigned char> pieces = shared + Shape::kGatePieces;
  const Shared<Words4> weights = shared_cast<Words4>(shared + Shape::kWeights);

  // W_hh transposed: rows m of kRowTiles tiles, columns the gates of this block's units.
  uint32_t held[kHeld ? kHeld : 1][kRowTiles][2][4];
  const T* w_hh = static_cast<const T*>(args.w_hh[direction]);
  hold_weights<kPairs, kHeld, kRowTiles>(
      held, weights, shared_cast<Words4>(shared + Shape::kParts), [&](int p, int tile) {
        const int piece = p * 4 + q, gate = piece / kPlane;
        const int m = (warp * kRowTiles + tile) * kGroupUnits + g;
        const int unit = rank * Shape::kUnits + piece % kPlane * kPiece, units = gate < kGates ? hidden - unit : 0;
        const T* w = w_hh + (Cell::h_gate(kSlots - kGates + gate) * hidden + unit) * static_cast<int64_t>(hidden) + m;
        return weight_pair<T>(load_piece_transposed(w, m < hidden ? units : 0, hidden),
                              load_piece_transposed(w + 8, m + 8 < hidden ? units : 0, hidden));
      });
  for (int i = thread_index(); i < 2 * Shape::kGatePiecesSize / 16; i += Shape::kThreads) {
    store(shared_cast<Words4>(pieces) + i, Words4{});
  }

  // Columns travel in pairs.
  int pairs_present = 0;
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    const int rest = present - tile * 8;
    pairs_present += rest >= 8 ? 4 : rest > 0 ? (rest + 1) / 2 : 0;
  }
  const int expected = kCluster * kGroups * 128 * pairs_present;
  if (thread_index() == 0) {
    barrier_init(barriers, 1);
    barrier_init(barriers + 1, 1);
    barrier_fence_init();
    if (steps > 0) barrier_arrive_expect(barriers, expected);
    if (steps > 1) barrier_arrive_expect(barriers + 1, expected);
  }
  cluster_sync();

  // This lane's unit and, in each tile, its column: those of float 32 * split + lane of a part.
  const int local_unit = group * kGroupUnits + lane / 4 + 8 * (lane / 2 % 2);
  const int unit = rank * Shape::kUnits + local_unit;
  const int column = 2 * split + lane % 2;
  const int64_t direction_row = static_cast<int64_t>(direction) * args.rows.rows * hidden;
  const int ld_output = static_cast<int>(args.ld_output * sizeof(T)),
            ld_cell = static_cast<int>(args.ld_cell * sizeof(T));
  const int out_step = static_cast<int>(args.rows.out_step), out_batch = static_cast<int>(args.rows.out_batch);
  const Vec<T, kKept>* saved_rows = static_cast<const Vec<T, kKept>*>(args.saved) + direction_row + unit;
  const T* h_prev_rows = static_cast<const T*>(args.h_prev) + direction_row + unit;
  const float* cell_rows = static_cast<const float*>(args.cells) + direction_row + unit;
  const bool has_d_output = args.d_output != nullptr, has_d_cells = Cell::kHasCell && args.d_cell_rows != nullptr;
  const T* d_output = static_cast<const T*>(args.d_output) + direction * hidden + unit;
  const T* d_cells = static_cast<const T*>(args.d_cell_rows) + direction * hidden + unit;
  const int64_t* offsets = args.rows.offsets;
  const auto step_of = [&](int e) { return reverse ? e : steps - 1 - e; };

  bool live[kTiles];
  int sequence[kTiles], length[kTiles], row[kTiles][3];  // rows of this, the next and the next but one iteration
  float dh[kTiles], dc[kTiles], c_first[kTiles];
  struct Values {
    Vec<T, kKept> saved;
    T h_prev, d_output, d_cells;
    float c_prev;
  } values[kTiles], next[kTiles];
  float c_new[kTiles];
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    live[tile] = tile * 8 + column < present && unit < hidden;
    sequence[tile] = first + tile * 8 + column;
    length[tile] = 0;
    if (live[tile]) length[tile] = args.rows.lengths ? static_cast<int>(args.rows.lengths[sequence[tile]]) : steps;
    const int64_t at = (static_cast<int64_t>(direction) * batch + sequence[tile]) * hidden + unit;
    const auto initial = [&](const void* p) {
      return p != nullptr && live[tile] ? to_float(static_cast<const T*>(p)[at]) : 0.f;
    };
    dh[tile] = initial(args.d_hn);
    dc[tile] = Cell::kHasCell ? initial(args.d_cn) : 0.f;
    c_first[tile] = Cell::kHasCell ? initial(args.c0) : 0.f;
  }
  // Row of this lane's sequence at iteration e; -1 where it takes no part.
  const auto row_of = [&](int e, int tile) {
    if (e >= steps) return -1;
    const int t = step_of(e);
    if (t >= length[tile]) return -1;
    return (offsets != nullptr ? static_cast<int>(offsets[t]) : t * batch) + sequence[tile];
  };
  const auto fetch = [&](int e, int tile, int at, int before) {
    Values v{};
    if (at >= 0) {
      v.saved = load(row_at(saved_rows, at, hidden * static_cast<int>(sizeof(v.saved))));
      v.h_prev = load(row_at(h_prev_rows, at, hidden * static_cast<int>(sizeof(T))));
      const int out = offsets != nullptr ? at : step_of(e) * out_step + sequence[tile] * out_batch;
      if (has_d_output) v.d_output = load(row_at(d_output, out, ld_output));
      if (has_d_cells) v.d_cells = load(row_at(d_cells, out, ld_cell));
    }
    v.c_prev = c_first[tile];
    if (Cell::kHasCell && before >= 0) v.c_prev = load(row_at(cell_rows, before, hidden * 4));
    return v;
  };
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    SEQATTN_UNROLL
    for (int i = 0; i < 3; ++i) row[tile][i] = row_of(i, tile);
    next[tile] = fetch(0, tile, row[tile][0], row[tile][1]);
    c_new[tile] = Cell::kHasCell && row[tile][0] >= 0 ? load(row_at(cell_rows, row[tile][0], hidden * 4)) : 0.f;
  }

  // Pieces this thread writes to memory: consecutive threads take consecutive pieces of a column.
  constexpr int kWritten = kSlots * kPlane * 8 * kTiles, kWrites = (kWritten + Shape::kThreads - 1) / Shape::kThreads;
  T* d_gates = static_cast<T*>(args.d_gates) + direction_row * kSlots;
  const bool vectors = hidden % kPiece == 0 && reinterpret_cast<uintptr_t>(args.d_gates) % 16 == 0;

  // The owners of this warp's rows, and this lane's place in their parts.
  Remote<unsigned char> owners[kRowTiles];
  SEQATTN_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) owners[tile] = map_shared(shared, (warp * kRowTiles + tile) / kGroups);

  const auto add_parts = [&](int e) {  // of iteration e, to dh
    const int parity = e & 1;
    barrier_wait(barriers + parity, static_cast<uint32_t>(e >> 1) & 1);
    if (thread_index() == 0 && e + 2 < steps) barrier_arrive_expect(barriers + parity, expected);
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 8 + 2 * split < present) {
        const Shared<float> from =
            parts + parity * (Shape::kPartsSize / 4) + (group * kTiles + tile) * 128 + split * 32 + lane;
        float sums[4] = {dh[tile], 0, 0, 0};
        SEQATTN_UNROLL
        for (int block = 0; block < kCluster; ++block) {
          const float part = load(from + block * (kGroups * kTiles * 128));
          sums[block % 4] += part;
        }
        dh[tile] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
    }
  };

  for (int e = 0; e < steps; ++e) {
    const int parity = e & 1;
    const int t = step_of(e);
    int coming[kTiles];
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      values[tile] = next[tile];
      next[tile] = fetch(e + 1, tile, row[tile][1], row[tile][2]);
      coming[tile] = row_of(e + 3, tile);
    }
    if (e > 0) add_parts(e - 1);

    const Shared<unsigned char> now = pieces + parity * Shape::kGatePiecesSize;
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const Values& v = values[tile];
      float d_pre[kSlots];
      SEQATTN_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) d_pre[slot] = 0;
      if (row[tile][0] >= 0) {
        float saved[Cell::kSaved ? Cell::kSaved : 1], dh_before, dc_before = 0;
        SEQATTN_UNROLL
        for (int i = 0; i < kKept && i < Cell::kSaved; ++i) saved[i] = to_float(v.saved[i]);
        if constexpr (Cell::kHasCell) saved[kKept] = c_new[tile];
        const float dh_new = dh[tile] + to_float(v.d_output);
        const float dc_new = dc[tile] + to_float(v.d_cells);
        Cell::template backward<FastMath>(saved, to_float(v.h_prev), v.c_prev, to_float(v.saved[0]), dh_new, dc_new,
                                          d_pre, &dh_before, &dc_before);
        dh[tile] = dh_before;
        if constexpr (Cell::kHasCell) dc[tile] = dc_before;
      }
      c_new[tile] = v.c_prev;
      if (tile * 8 + 2 * split < present) {
        SEQATTN_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) {
          const int piece = Shape::plane(slot) * kPlane + local_unit / kPiece;
          store(
              shared_cast<T>(now + (tile * Shape::kPieces * 8 + piece_place(piece, column)) * 16) + local_unit % kPiece,
              from_float<T>(d_pre[slot]));
        }
      }
    }
    block_sync();

    float sum[kTiles][kChains][kRowTiles][4];
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SEQATTN_UNROLL
      for (int chain = 0; chain < kChains; ++chain) {
        SEQATTN_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          SEQATTN_UNROLL
          for (int r = 0; r < 4; ++r) sum[tile][chain][m][r] = 0;
        }
      }
    }
    const Shared<Words4> operand = shared_cast<Words4>(now) + q * 8 + ((4 * (g % 2) + g / 2) ^ q);
    SEQATTN_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      Words4 b[kTiles];
      SEQATTN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        b[tile] = load(operand + tile * Shape::kPieces * 8 + p * 32);
        SEQATTN_UNROLL
        for (int w = 0; w < 4; ++w) b[tile][w] = Op::weight_bits(b[tile][w]);
      }
      SEQATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        SEQATTN_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t a[4];
          if (p < kHeld) {
            SEQATTN_UNROLL
            for (int r = 0; r < 4; ++r) a[r] = held[p < kHeld ? p : 0][m][i][r];
          } else {
            const Words4 words =
                load(weights + (((warp * (kPairs - kHeld) + p - kHeld) * kRowTiles + m) * 2 + i) * 32 + lane);
            SEQATTN_UNROLL
            for (int r = 0; r < 4; ++r) a[r] = words[r];
          }
          SEQATTN_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint32_t pair[2] = {b[tile][2 * i], b[tile][2 * i + 1]};
            Op::multiply(sum[tile][i % kChains][m], a, pair);
          }
        }
      }
    }
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 8 + 2 * q < present) {
        SEQATTN_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          Vec<float, 4> part;
          SEQATTN_UNROLL
          for (int r = 0; r < 4; ++r)
            part[r] = sum[tile][0][m][r] + (kChains == 2 ? sum[tile][kChains - 1][m][r] : 0.f);
          const int group_there = (warp * kRowTiles + m) % kGroups;
          const int64_t at = Shape::kParts + parity * Shape::kPartsSize +
                             ((rank * kGroups + group_there) * kTiles + tile) * 512 + (q * 8 + g) * 16;
          store_async(remote_cast<Vec<float, 4>>(owners[m] + at), part,
                      remote_cast<Barrier>(owners[m] + (Shape::kBarriers + parity * sizeof(Barrier))));
        }
      }
    }

    SEQATTN_UNROLL
    for (int i = 0; i < kWrites; ++i) {
      const int index = thread_index() + i * Shape::kThreads;
      const int piece = index % (kSlots * kPlane), at_column = index / (kSlots * kPlane);
      if (at_column < present) {
        const int b = first + at_column;
        const bool exists = offsets == nullptr || t < args.rows.lengths[b];
        const int from_unit = rank * Shape::kUnits + piece % kPlane * kPiece;
        if (exists && from_unit < hidden) {
          const int to_row = (offsets != nullptr ? static_cast<int>(offsets[t]) : t * batch) + b;
          T* to = row_at(d_gates, to_row, kSlots * hidden * static_cast<int>(sizeof(T))) +
                  (Shape::slot(piece / kPlane) * hidden + from_unit);
          const Shared<unsigned char> from =
              now + (at_column / 8 * Shape::kPieces * 8 + piece_place(piece, at_column % 8)) * 16;
          if (vectors) {
            store(reinterpret_cast<Words4*>(to), load(shared_cast<Words4>(from)));
          } else {
            SEQATTN_UNROLL
            for (int k = 0; k < kPiece; ++k) {
              if (from_unit + k < hidden) store(to + k, load(shared_cast<T>(from) + k));
            }
          }
        }
      }
    }
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      row[tile][0] = row[tile][1];
      row[tile][1] = row[tile][2];
      row[tile][2] = coming[tile];
    }
  }

  if (steps > 0) add_parts(steps - 1);
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    if (live[tile]) {
      const int64_t at = (static_cast<int64_t>(direction) * batch + sequence[tile]) * hidden + unit;
      if (args.d_h0 != nullptr) static_cast<T*>(args.d_h0)[at] = from_float<T>(dh[tile]);
      if (Cell::kHasCell && args.d_c0 != nullptr) static_cast<T*>(args.d_c0)[at] = from_float<T>(dc[tile]);
    }
  }
  cluster_sync();
}

}  // namespace seqattn::gpu
