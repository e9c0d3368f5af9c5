// The whole backward loop of a recurrent layer in one kernel, with W_hh transposed resident in a team of blocks: a
// cluster, or a part of a grid, where parts travel through global memory.
//
// A block owns the units it owns in forward (persistent.cuh). It turns the gradient of their h into gradients of their
// gates, and multiplies these with its rows of W_hh: a part of the gradient of every unit's previous h, which it sends
// to the blocks that own those units; the sum of all blocks' parts is taken by the owner. So a step exchanges 4 bytes
// for each unit, column and block, where gathering the gates' gradients would take kGates times the bytes of h.
//
// A step: wait for the parts; add them up, one unit and column a lane; the cell; gate gradients to shared memory as
// pieces; a block barrier; multiply; send; then write the gate gradients and fetch the next step's values while the
// parts travel. Parts, their barrier and the pieces are double buffered: who has sent a step's parts has read those
// before, and who has passed the block barrier has read the pieces before. Tiles of columns take turns, each with
// buffers and barriers of its own, so that one's parts travel while another's are computed.
#pragma once

#include "persistent.cuh"
#include "persistent_values.cuh"

namespace seqattn::gpu {

template <class Cell, class T, int kPadded, int kBlocks, int kColumnTiles, bool kGrid>
struct PersistentBackward : PersistentShape<Cell, T, kPadded, kBlocks, kColumnTiles, kGrid> {
  using Common = PersistentShape<Cell, T, kPadded, kBlocks, kColumnTiles, kGrid>;
  using Common::kGates, Common::kPiece, Common::kShape, Common::kSlots;
  static constexpr int kPairs = kShape.backward_pairs(), kHeld = kShape.backward_held();
  static constexpr int kRowTiles = kShape.row_tiles(), kPlane = kShape.plane(), kPieces = kShape.gate_pieces();

  // Shared memory, in bytes: barriers; a cluster's parts [2][tile][block][group]; pieces [2][tile]; values
  // [2][tile][warp][piece][2 columns]; weights.
  static constexpr int kParts = TeamShape::kBarrierBytes, kPartsSize = kShape.part_bytes();
  static constexpr int kSharedBytes = kShape.backward_shared_bytes();
  static constexpr int kWeights = kSharedBytes - kShape.backward_weight_bytes();
  static constexpr int kValues = kWeights - 2 * kShape.value_bytes(), kValuePieces = kShape.value_pieces();
  static constexpr int kGatePiecesSize = kShape.gate_bytes(), kGatePieces = kValues - 2 * kGatePiecesSize;
  static_assert(kGatePieces >= kParts + (kGrid ? 0 : 2 * kPartsSize));
  // Global memory of a team: parts [2][tile][block][from block][group].
  static constexpr int kTileFloats = kPartsSize / 4 / kColumnTiles;
  static constexpr int kExchangeWords = 2 * kColumnTiles * kBlocks * kTileFloats / 4;

  // Where a slot's gradients stand among the pieces: those that meet W_hh first.
  static constexpr int plane(int slot) { return slot >= kSlots - kGates ? slot - (kSlots - kGates) : kGates + slot; }
  static constexpr int slot(int plane) { return plane < kGates ? plane + (kSlots - kGates) : plane - kGates; }
  // Accumulators are as many independent chains.
  static constexpr int kChains = kRowTiles == 1 ? 2 : 1;
};

// What a lane keeps of its unit and its column of a tile from step to step.
struct BackwardLane {
  bool present, live;  // a sequence is there; and the unit exists
  int length;
  float dh, dc, c_new;
};

template <class Shape>
SEQATTN_KERNEL(Shape::kThreads, 1)
persistent_backward_kernel(SEQATTN_KERNEL_PARAM Backward args, SEQATTN_KERNEL_PARAM Layout layout) {
  using Cell = typename Shape::Cell;
  using T = typename Shape::T;
  using Op = Operand<T>;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  constexpr int kTiles = Shape::kColumnTiles, kGates = Shape::kGates, kSlots = Shape::kSlots, kPiece = Shape::kPiece;
  constexpr int kPairs = Shape::kPairs, kHeld = Shape::kHeld, kBlocks = Shape::kBlocks, kGroups = Shape::kGroups;
  constexpr int kRowTiles = Shape::kRowTiles, kChains = Shape::kChains, kPlane = Shape::kPlane;
  constexpr int kKept = kept(Cell::kSaved, Cell::kHasCell), kBytes = sizeof(T);
  constexpr bool kGrid = Shape::kGrid;
  constexpr bool kRoomy = Shape::kGroups <= 2 && kBytes == 2 && !kGrid;  // registers for more than the least

  const auto [lane, g, q, warp, group, split, rank, team, direction] = standing<Shape>();
  const Shared<unsigned char> shared = dynamic_shared<unsigned char>();
  const Sequences sequences = Sequences::of<Shape, kRoomy>(args, layout, team, shared);
  const int steps = sequences.steps, batch = sequences.batch, hidden = sequences.hidden, columns = sequences.columns,
            first = sequences.first;
  // Time runs against forward's.
  const int back = direction == 1 ? 1 : -1, start = direction == 1 ? 0 : steps - 1;

  const Shared<Barrier> barriers = shared_cast<Barrier>(shared + Shape::kBarriers);
  const Shared<float> parts = shared_cast<float>(shared + Shape::kParts);
  const Shared<unsigned char> pieces = shared + Shape::kGatePieces;
  const Shared<Words4> weights = shared_cast<Words4>(shared + Shape::kWeights);
  constexpr int kPartsFloats = Shape::kPartsSize / 4, kTileFloats = Shape::kTileFloats;
  const int meeting = (direction * (grid_size() / kBlocks) + team) * kTiles;  // of the counters
  float* exchange =
      reinterpret_cast<float*>(layout.exchange + static_cast<int64_t>(meeting / kTiles) * Shape::kExchangeWords);
  constexpr int kTileBytes = Shape::kGatePiecesSize / kTiles;

  // Bytes of parts that come for the sequences of a tile: columns travel in pairs.
  const auto expected = [&](int tile) { return kBlocks * kGroups * 128 * ((sequences.present(tile) + 1) / 2); };

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
  block_sync();  // what weights passed through becomes parts, pieces and values
  for (int i = thread_index(); i < 2 * Shape::kGatePiecesSize / 16; i += Shape::kThreads) {
    store(shared_cast<Words4>(pieces) + i, Words4{});
  }

  // Barrier of an iteration's parts: 2 * tile + its parity.
  if (!kGrid && thread_index() == 0) {
    for (int i = 0; i < 2 * kTiles; ++i) barrier_init(barriers + i, 1);
    barrier_fence_init();
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (steps > i % 2 && sequences.present(i / 2) > 0) barrier_arrive_expect(barriers + i, expected(i / 2));
    }
  }
  if constexpr (kGrid) {
    block_sync();
  } else {
    cluster_sync();
  }

  // This lane's unit and column: those of float 32 * split + lane of a part.
  const int local_unit = group * kGroupUnits + lane / 4 + 8 * (lane / 2 % 2);
  const int unit = rank * Shape::kUnits + local_unit;
  const int column = 2 * split + lane % 2;
  const int ld_cell = static_cast<int>(args.ld_cell) * kBytes;
  const bool has_d_output = args.d_output != nullptr, has_d_cells = Cell::kHasCell && args.d_cell_rows != nullptr;
  const int direction_row = direction * static_cast<int>(args.rows.rows);

  const auto sequence_of = [&](int tile) {
    return (kGroups > 2 || kBytes == 4 ? keep(first) : first) + tile * columns + column;
  };

  constexpr TeamShape kTeam = Shape::kShape;
  constexpr int kValuePieces = Shape::kValuePieces, kFetches = (2 * kValuePieces + 31) / 32;
  ValuePiece fetched[kFetches];
  SEQATTN_UNROLL
  for (int i = 0; i < kFetches; ++i) fetched[i] = value_piece<Shape>(args, sequences, group, column, i);
  BackwardLane lanes[kTiles];
  constexpr int kWarpValues = 2 * kValuePieces * 16, kTurnValues = Shape::kWarps * kWarpValues;
  const Shared<unsigned char> values = shared + (Shape::kValues + warp * kWarpValues);
  const auto fetch = [&](int turn, int t) {
    SEQATTN_UNROLL
    for (int i = 0; i < kFetches; ++i) {
      const ValuePiece& own = fetched[i];
      const int its_t = own.traits & 1 ? t + back : t, tile = turn % kTiles;
      if (own.traits >= 4 && runs(its_t, lanes[tile].length)) {
        const int64_t step = sequences.packed ? static_cast<int>(sequences.offsets[its_t]) : its_t;
        copy_piece<Bits>(values + turn * kTurnValues + (lane + 32 * i) * 16,
                         own.from + step * own.step + static_cast<int64_t>(tile * columns) * own.sequence,
                         own.traits / 4 - 1, own.traits & 2);
      }
    }
    cp_async_commit();
  };
  // This lane's value of `bytes` in the pieces from `first` on: of 16 units for each of two columns.
  const auto value_at = [&](int turn, int first, int bytes) {
    const int offset = (local_unit - group * kGroupUnits) * bytes;
    return values + turn * kTurnValues + ((first + offset / 16) * 2 + lane % 2) * 16 + offset % 16;
  };
  // A state of [directions][batch][hidden], or zero.
  const auto initial = [&](const void* p, int tile) {
    if (p == nullptr || !lanes[tile].live) return 0.f;
    return to_float(
        static_cast<const T*>(p)[(static_cast<int64_t>(direction) * batch + sequence_of(tile)) * hidden + unit]);
  };
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    BackwardLane& own = lanes[tile];
    own.present = column < sequences.present(tile);
    own.live = own.present && unit < hidden;
    own.length = own.present ? sequences.length(sequence_of(tile)) : 0;
    own.dh = initial(args.d_hn, tile);
    own.dc = Cell::kHasCell ? initial(args.d_cn, tile) : 0.f;
    own.c_new = 0;
    if (Cell::kHasCell && own.live && runs(start, own.length)) {
      own.c_new = load(static_cast<const float*>(args.cells) +
                       (static_cast<int64_t>(sequences.row(start, sequence_of(tile)) + direction_row) * hidden + unit));
    }
  }
  SEQATTN_UNROLL
  for (int turn = 0; turn < 2 * kTiles; ++turn) fetch(turn, start + turn / kTiles * back);

  // Pieces this thread writes to memory: consecutive threads take consecutive pieces of a column.
  constexpr int kWritten = kSlots * kPlane * 8, kWrites = (kWritten + Shape::kThreads - 1) / Shape::kThreads;
  const bool vectors = hidden % kPiece == 0 && reinterpret_cast<uintptr_t>(args.d_gates) % 16 == 0;
  const int gates_row = kSlots * hidden * kBytes;

  // The owners of this warp's rows: kept where registers allow.
  constexpr bool kKeepOwners = !kGrid && kGroups <= 2;
  Remote<unsigned char> owners[kKeepOwners ? kRowTiles : 1];
  if constexpr (kKeepOwners) {
    SEQATTN_UNROLL
    for (int m = 0; m < kRowTiles; ++m) owners[m] = map_shared(shared, (warp * kRowTiles + m) / kGroups);
  }
  // A grid's: this lane's place in the parts of the first of its warp's owners, from which others are constants away.
  static_assert(!kGrid || kRowTiles % kGroups == 0);
  Vec<float, 4>* give = reinterpret_cast<Vec<float, 4>*>(exchange) + warp * kRowTiles / kGroups * (kTileFloats / 4) +
                        (rank * kGroups * 32 + q * 8 + g);
  const int part_place = group * 128 + split * 32 + lane;
  const int operand_place = q * 8 + ((4 * (g % 2) + g / 2) ^ q);

  // Of a grid's parts four times as many are on their way at once: of many blocks' fewer, whose weights leave less
  // room.
  [[maybe_unused]] constexpr int kRounds = kBlocks > 32 || (kBlocks == 32 && kTiles > 1) ? 4 : 8;
  const auto add_parts = [&](int e, int parity, int tile) {  // of iteration e, to dh
    if constexpr (kGrid) {
      grid_wait(layout.counters + meeting + tile, static_cast<uint32_t>(e + 1) * kBlocks);
    } else {
      const Shared<Barrier> barrier = barriers + (2 * tile + parity);
      barrier_wait(barrier, static_cast<uint32_t>(e) / 2 % 2);
      if (thread_index() == 0 && e + 2 < steps) barrier_arrive_expect(barrier, expected(tile));
    }
    if (2 * split < sequences.present(tile)) {
      float sums[4] = {lanes[tile].dh, 0, 0, 0};
      if constexpr (kGrid) {
        const float* from =
            exchange + (static_cast<int64_t>(parity * kTiles + tile) * kBlocks + rank) * kTileFloats + part_place;
        SEQATTN_UNROLL_BY(kRounds)
        for (int block = 0; block < kBlocks; block += 4) {
          SEQATTN_UNROLL
          for (int i = 0; i < 4; ++i) sums[i] += load_coherent(from + (block + i) * (kGroups * 128));
        }
      } else {
        const Shared<float> from = parts + (parity * kPartsFloats + tile * kTileFloats + part_place);
        SEQATTN_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
          const float part = load(from + block * (kGroups * 128));
          sums[block % 4] += part;
        }
      }
      lanes[tile].dh = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  };

  // Even and odd steps written out, unless registers are short.
  constexpr int kWrittenOut = Shape::kGroups <= 2 || kTiles > 1 ? 2 * kTiles : 1;
  for (int even = 0; even < steps; even += 2) {
    SEQATTN_UNROLL_BY(kWrittenOut)
    for (int turn = 0; turn < 2 * kTiles; ++turn) {
      const int parity = turn / kTiles, tile = turn % kTiles, e = even + parity, t = start + e * back;
      if (e >= steps || (tile > 0 && sequences.present(tile) <= 0)) {
        cp_async_commit();  // one group for each turn
        continue;
      }
      BackwardLane& own = lanes[tile];
      if (e > 0) add_parts(e - 1, 1 - parity, tile);

      cp_async_wait<2 * kTiles - 1>();
      warp_sync();
      const Shared<unsigned char> now = pieces + (parity * Shape::kGatePiecesSize + tile * kTileBytes);
      if (2 * split < sequences.present(tile)) {
        float d_pre[kSlots];
        SEQATTN_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) d_pre[slot] = 0;
        float c_before = 0;
        if (Cell::kHasCell && runs(t + back, own.length)) {
          c_before = load(shared_cast<float>(value_at(turn, kTeam.kept_pieces() + kTeam.h_pieces(), 4)));
        } else if (Cell::kHasCell && own.live && args.c0 != nullptr) {
          c_before = initial(args.c0, tile);
        }
        if (runs(t, own.length)) {
          float saved[Cell::kSaved ? Cell::kSaved : 1], dh_before, dc_before = 0, h_before = 0;
          const Vec<T, kKept> kept_values = load(shared_cast<Vec<T, kKept>>(value_at(turn, 0, kKept * kBytes)));
          SEQATTN_UNROLL
          for (int i = 0; i < kKept && i < Cell::kSaved; ++i) saved[i] = to_float(kept_values[i]);
          if constexpr (kTeam.h_pieces() > 0) {
            h_before = to_float(load(shared_cast<T>(value_at(turn, kTeam.kept_pieces(), kBytes))));
          }
          if constexpr (Cell::kHasCell) saved[kKept] = own.c_new;
          float dh_new = own.dh, dc_new = own.dc;
          if (has_d_output) {
            dh_new += to_float(load(shared_cast<T>(value_at(turn, kValuePieces - kBytes, kBytes))));
          }
          if (has_d_cells && own.live) {  // rare: not worth room to fetch it early
            const int out = sequences.out_row(t, sequence_of(tile));
            dc_new += to_float(
                load(row_at(static_cast<const T*>(args.d_cell_rows) + (direction * hidden + unit), out, ld_cell)));
          }
          Cell::template backward<typename Op::Math>(saved, h_before, c_before, to_float(kept_values[0]), dh_new,
                                                     dc_new, d_pre, &dh_before, &dc_before);
          own.dh = dh_before;
          if constexpr (Cell::kHasCell) own.dc = dc_before;
        }
        own.c_new = c_before;
        SEQATTN_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) {
          const int piece = Shape::plane(slot) * kPlane + local_unit / kPiece;
          store(shared_cast<T>(now + piece_place(piece, column) * 16) + local_unit % kPiece,
                from_float<T>(d_pre[slot]));
        }
      }
      block_sync();

      // A few tiles of rows at a time, so that their sums find registers.
      const Shared<Words4> operand = shared_cast<Words4>(now) + operand_place;
      constexpr int kAtOnce = kRowTiles < 4 ? kRowTiles : 4;
      SEQATTN_UNROLL
      for (int from = 0; from < kRowTiles; from += kAtOnce) {
        float sum[kChains][kAtOnce][4];
        SEQATTN_UNROLL
        for (int chain = 0; chain < kChains; ++chain) {
          SEQATTN_UNROLL
          for (int m = 0; m < kAtOnce; ++m) {
            SEQATTN_UNROLL
            for (int r = 0; r < 4; ++r) sum[chain][m][r] = 0;
          }
        }
        SEQATTN_UNROLL
        for (int p = 0; p < kPairs; ++p) {
          Words4 b = load(operand + p * 32);
          SEQATTN_UNROLL
          for (int w = 0; w < 4; ++w) b[w] = Op::weight_bits(b[w]);
          SEQATTN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const uint32_t half[2] = {b[2 * i], b[2 * i + 1]};
            SEQATTN_UNROLL
            for (int m = 0; m < kAtOnce && from + m < kRowTiles; ++m) {
              uint32_t a[4];
              if (p < kHeld) {
                SEQATTN_UNROLL
                for (int r = 0; r < 4; ++r) a[r] = held[p < kHeld ? p : 0][from + m][i][r];
              } else {
                const int place = ((warp * (kPairs - kHeld) + p - kHeld) * kRowTiles + from + m) * 2 + i;
                const Words4 words = load(weights + place * 32 + lane);
                SEQATTN_UNROLL
                for (int r = 0; r < 4; ++r) a[r] = words[r];
              }
              Op::multiply(sum[i % kChains][m], a, half);
            }
          }
        }
        if (2 * q < sequences.present(tile)) {
          SEQATTN_UNROLL
          for (int m = 0; m < kAtOnce && from + m < kRowTiles; ++m) {
            Vec<float, 4> part;
            SEQATTN_UNROLL
            for (int r = 0; r < 4; ++r) part[r] = sum[0][m][r] + (kChains == 2 ? sum[kChains - 1][m][r] : 0.f);
            const int row_tile = warp * kRowTiles + from + m;
            const int place = (rank * kGroups + row_tile % kGroups) * 32 + q * 8 + g;
            if constexpr (kGrid) {
              const int tile_of_owner = (parity * kTiles + tile) * kBlocks + (from + m) / kGroups;
              store_coherent(give + (tile_of_owner * (kTileFloats / 4) + (from + m) % kGroups * 32), part);
            } else {
              const int to = Shape::kParts + parity * Shape::kPartsSize + tile * kTileFloats * 4 + place * 16;
              const int counted = Shape::kBarriers + (2 * tile + parity) * static_cast<int>(sizeof(Barrier));
              Remote<unsigned char> owner;
              if constexpr (kKeepOwners) {
                owner = owners[from + m];
              } else {
                owner = map_shared(shared, row_tile / kGroups + keep(0));
              }
              store_async(remote_cast<Vec<float, 4>>(owner + to), part, remote_cast<Barrier>(owner + counted));
            }
          }
        }
      }
      if constexpr (kGrid) grid_arrive(layout.counters + meeting + tile);

      SEQATTN_UNROLL
      for (int i = 0; i < kWrites; ++i) {
        const int index = thread_index() + i * Shape::kThreads;
        const int piece = index % (kSlots * kPlane), at_column = index / (kSlots * kPlane);
        const int b = first + tile * columns + at_column, from_unit = rank * Shape::kUnits + piece % kPlane * kPiece;
        if (at_column < sequences.present(tile) && from_unit < hidden &&
            (!sequences.packed || t < args.rows.lengths[b])) {
          const int to_row = sequences.row(t, b);
          T* to = row_at(static_cast<T*>(args.d_gates), to_row + direction_row, gates_row) +
                  (Shape::slot(piece / kPlane) * hidden + from_unit);
          const Shared<unsigned char> from = now + piece_place(piece, at_column) * 16;
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
      fetch(turn, t + 2 * back);
    }
  }

  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile > 0 && sequences.present(tile) <= 0) continue;
    if (steps > 0) add_parts(steps - 1, (steps - 1) % 2, tile);
    const BackwardLane& own = lanes[tile];
    if (own.live) {
      // Computed anew, not carried through the loop.
      const int again = keep(lane),
                its_unit = (keep(rank) * kGroups + keep(group)) * kGroupUnits + again / 4 + 8 * (again / 2 % 2);
      const int64_t at = (static_cast<int64_t>(keep(direction)) * batch + sequence_of(tile)) * hidden + its_unit;
      if (args.d_h0 != nullptr) static_cast<T*>(args.d_h0)[at] = from_float<T>(own.dh);
      if (Cell::kHasCell && args.d_c0 != nullptr) static_cast<T*>(args.d_c0)[at] = from_float<T>(own.dc);
    }
  }
  if constexpr (!kGrid) cluster_sync();
}

}  // namespace seqattn::gpu
