// The whole forward loop of a recurrent layer in one kernel: W_hh stays in a team of blocks. In a cluster h travels
// through distributed shared memory; in a grid, for weights that no cluster holds and for GPUs without clusters,
// through global memory. See persistent.cuh for the layout.
//
// A step: wait until all of h is there; multiply; add up the four parts of each sum (warps of a group, through shared
// memory); the cell, one unit and column a lane; gather 16 bytes of new h in every lane by shuffles; send them to all
// blocks, where they count at the barrier of the next step; then write results and fetch the next but one step's x
// gates while they travel. h, its barrier and the parts are double buffered: no block can be more than one step ahead,
// since a step needs h of every group of every block. Tiles of columns take turns, each with buffers and barriers of
// its own, so that one's h travels while another's is computed.
#pragma once

#include "persistent.cuh"

namespace seqattn::gpu {

template <class Cell, class T, int kPadded, int kBlocks, int kColumnTiles, bool kGrid>
struct PersistentForward : PersistentShape<Cell, T, kPadded, kBlocks, kColumnTiles, kGrid> {
  using Common = PersistentShape<Cell, T, kPadded, kBlocks, kColumnTiles, kGrid>;
  using Common::kGates, Common::kPiece, Common::kShape, Common::kSlots;
  static constexpr int kPairs = kShape.forward_pairs(), kHeld = kShape.forward_held(), kPieces = kPadded / kPiece;

  // Shared memory, in bytes: barriers; state [2 or 1][tile]; parts [2 or 1]; x gates
  // [2][tile][warp][gate][4 columns][8 units]; new h [warp][4 columns][8 units]; bias [slot][unit];
  // weights.
  static constexpr int kState = TeamShape::kBarrierBytes, kStateSize = kShape.state_bytes();
  static constexpr int kParts = kState + kShape.state_buffers() * kStateSize, kPartsSize = kShape.split_bytes();
  static constexpr int kSharedBytes = kShape.forward_shared_bytes();
  static constexpr int kWeights = kSharedBytes - kShape.forward_weight_bytes();
  static constexpr int kBias = kWeights - kShape.bias_bytes(), kNewState = kBias - kShape.h_bytes();
  static constexpr int kX = kNewState - 2 * kShape.x_bytes(), kXSize = kShape.x_bytes();
  static_assert(kX >= kParts + kShape.split_buffers() * kPartsSize);
  // Global memory of a team: h [2][tile].
  static constexpr int kTileWords = kPieces * 8, kExchangeWords = 2 * kColumnTiles * kTileWords;

  // Accumulators are as many independent chains.
  static constexpr int kChains = kGates == 1 ? 2 : 1;
};

// What a lane keeps of its unit and its column of a tile from step to step.
struct ForwardLane {
  bool present, live;  // a sequence is there; and the unit exists
  int sequence, length;
  float h, c;
};

template <class Shape>
SEQATTN_KERNEL(Shape::kThreads, 1)
persistent_forward_kernel(SEQATTN_KERNEL_PARAM Forward args, SEQATTN_KERNEL_PARAM Layout layout) {
  using Cell = typename Shape::Cell;
  using T = typename Shape::T;
  using Op = Operand<T>;
  constexpr int kTiles = Shape::kColumnTiles, kGates = Shape::kGates, kSlots = Shape::kSlots, kPiece = Shape::kPiece;
  constexpr int kPairs = Shape::kPairs, kHeld = Shape::kHeld, kPieces = Shape::kPieces, kBlocks = Shape::kBlocks;
  constexpr int kChains = Shape::kChains, kKept = kept(Cell::kSaved, Cell::kHasCell);
  constexpr int kBytes = sizeof(T);
  constexpr bool kGrid = Shape::kGrid;
  constexpr bool kRoomy = Shape::kGroups <= 2 && !kGrid;  // registers for more than the least
  using Bits = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;

  const auto [lane, g, q, warp, group, split, rank, team, direction] = standing<Shape>();
  const Shared<unsigned char> shared = dynamic_shared<unsigned char>();
  const Sequences sequences = Sequences::of<Shape, kRoomy>(args, layout, team, shared);
  const int steps = sequences.steps, batch = sequences.batch, hidden = sequences.hidden, columns = sequences.columns,
            first = sequences.first;
  const int forth = direction == 1 ? -1 : 1, start = direction == 1 ? steps - 1 : 0;

  const Shared<Barrier> barriers = shared_cast<Barrier>(shared + Shape::kBarriers);
  const Shared<Words4> state = shared_cast<Words4>(shared + Shape::kState);
  const Shared<float> parts = shared_cast<float>(shared + Shape::kParts);
  const Shared<Words4> weights = shared_cast<Words4>(shared + Shape::kWeights);
  // From one parity's buffer to the other's.
  constexpr int kStateWords = kGrid ? 0 : Shape::kStateSize / 16, kPartsFloats = kGrid ? 0 : Shape::kPartsSize / 4;
  const int meeting = (direction * (grid_size() / kBlocks) + team) * kTiles;  // of the counters
  Words4* exchange = layout.exchange + static_cast<int64_t>(meeting / kTiles) * Shape::kExchangeWords;

  // W_hh: rows g and g + 8 of the group, a quarter of the columns.
  uint32_t held[kHeld ? kHeld : 1][kGates][2][4];
  const T* w_hh = static_cast<const T*>(args.w_hh[direction]);
  const int group_unit = rank * Shape::kUnits + group * kGroupUnits;
  const bool vectors = hidden % kPiece == 0 && reinterpret_cast<uintptr_t>(w_hh) % 16 == 0;
  hold_weights<kPairs, kHeld, kGates>(held, weights, shared_cast<Words4>(shared + Shape::kState), [&](int p, int gate) {
    const int k = ((split * kPairs + p) * 4 + q) * kPiece;
    const T* w = w_hh + static_cast<int64_t>(Cell::h_gate(kSlots - kGates + gate)) * hidden * hidden;
    return weight_pair<T>(load_piece(w, group_unit + g, hidden, k, hidden, vectors),
                          load_piece(w, group_unit + g + 8, hidden, k, hidden, vectors));
  });

  block_sync();  // what weights passed through becomes state

  // h of all units at the first step; zeros where no sequence is.
  const T* h0 = static_cast<const T*>(args.h0);
  for (int i = thread_index(); i < kTiles * kPieces * 8; i += Shape::kThreads) {
    const int tile = i / (kPieces * 8), piece = i / 8 % kPieces, column = i % 8;
    Words4 words{};
    if (h0 != nullptr && column < sequences.present(tile)) {
      words = load_piece(h0 + static_cast<int64_t>(direction) * batch * hidden, first + tile * columns + column, batch,
                         piece * kPiece, hidden, false);
      SEQATTN_UNROLL
      for (int w = 0; w < 4; ++w) words[w] = Op::weight_bits(words[w]);
    }
    const int place = tile * kPieces * 8 + piece_place(piece, column);
    store(state + place, words);
    if constexpr (!kGrid) store(state + kStateWords + place, Words4{});
  }

  // Barrier of a step's h: 2 * tile + its parity.
  if (!kGrid && thread_index() == 0) {
    for (int i = 0; i < 2 * kTiles; ++i) barrier_init(barriers + i, 1);
    barrier_fence_init();
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (steps > 2 - i % 2 && sequences.present(i / 2) > 0) {
        barrier_arrive_expect(barriers + i, kPieces * 16 * sequences.present(i / 2));
      }
    }
  }
  if constexpr (kGrid) {
    block_sync();
  } else {
    cluster_sync();
  }

  const int unit = group_unit + g + 8 * (split / 2);
  const int column = 2 * q + split % 2;
  const int gate_row = kGates * hidden * kBytes, state_row = hidden * kBytes;
  // Fetches x gates of step t for this lane's column: each lane a piece of a gate's 8 units.
  constexpr int kUnitPieces = 8 / kPiece;
  const int x_gate = g / kUnitPieces, x_unit = group_unit + 8 * (split / 2) + g % kUnitPieces * kPiece;
  const bool x_aligned = hidden % kPiece == 0 && reinterpret_cast<uintptr_t>(args.x_gates) % 16 == 0;
  const T* x_from = static_cast<const T*>(args.x_gates) +
                    (direction * args.rows.rows * kGates + x_gate) * static_cast<int64_t>(hidden) + x_unit;
  const Shared<unsigned char> x_own = shared + (Shape::kX + warp * (kGates * 32 * kBytes));
  const Shared<unsigned char> x_to = x_own + ((x_gate * 4 + q) * 8 * kBytes + g % kUnitPieces * 16);
  ForwardLane lanes[kTiles];
  const auto fetch_x = [&](int turn, int t) {
    const ForwardLane& own = lanes[turn % kTiles];
    if (x_gate < kGates && runs(t, own.length)) {
      copy_piece<Bits>(x_to + turn * (Shape::kWarps * kGates * 32 * kBytes),
                       row_at(x_from, sequences.row(t, own.sequence), gate_row), (hidden - x_unit) * kBytes, x_aligned);
    }
    cp_async_commit();
  };
  // In registers, or where these are short, in shared memory.
  constexpr bool kKeepBias = Shape::kGroups <= 2;
  float bias[kSlots];
  const Shared<float> bias_there = shared_cast<float>(shared + Shape::kBias) + (unit - rank * Shape::kUnits);
  SEQATTN_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    bias[slot] = args.bias != nullptr && unit < hidden
                     ? static_cast<const float*>(args.bias)[(direction * kSlots + slot) * hidden + unit]
                     : 0.f;
    if (!kKeepBias && q == 0 && split % 2 == 0) store(bias_there + slot * Shape::kUnits, bias[slot]);
  }
  if constexpr (!kKeepBias) block_sync();
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    ForwardLane& own = lanes[tile];
    own.present = column < sequences.present(tile);
    own.live = own.present && unit < hidden;
    own.sequence = first + tile * columns + column;
    own.length = own.present ? sequences.length(own.sequence) : 0;
    const int64_t at = (static_cast<int64_t>(direction) * batch + own.sequence) * hidden + unit;
    own.h = own.live && h0 != nullptr ? to_float(h0[at]) : 0.f;
    own.c = Cell::kHasCell && own.live && args.c0 != nullptr ? to_float(static_cast<const T*>(args.c0)[at]) : 0.f;
  }
  SEQATTN_UNROLL
  for (int turn = 0; turn < 2 * kTiles; ++turn) fetch_x(turn, start + turn / kTiles * forth);

  const int64_t direction_row = static_cast<int64_t>(direction) * args.rows.rows * hidden;
  const int ld_cell = static_cast<int>(args.ld_cell) * kBytes;
  T* output = static_cast<T*>(args.output_rows) + direction * hidden + unit;
  T* cell_rows = args.cell_rows == nullptr ? nullptr : static_cast<T*>(args.cell_rows) + direction * hidden + unit;
  T* h_prev = static_cast<T*>(args.h_prev) + direction_row + unit;
  float* cells = static_cast<float*>(args.cells) + direction_row + unit;
  Vec<T, kKept>* saved_rows = static_cast<Vec<T, kKept>*>(args.saved) + direction_row + unit;
  const bool saving = args.saved != nullptr, giving_cells = args.cell_rows != nullptr;

  // Where this lane finds and puts things.
  constexpr int kPart = kGates * 32;  // floats that one warp leaves for another
  const int operand_place = (split * kPairs * 4 + q) * 8 + ((4 * (g % 2) + g / 2) ^ q);
  const int own_place = piece_place(group_unit / kPiece + (8 * (split / 2) + g) / kPiece, column);
  const int parts_place = group * (kSplit * kSplit * kPart) + lane * (kGates == 4 ? 4 : 1);
  const int give_place = parts_place + split * kPart;
  int take_place[kSplit];
  SEQATTN_UNROLL
  for (int i = 1; i < kSplit; ++i) take_place[i] = parts_place + (split * kSplit + (split ^ i)) * kPart;
  // The blocks of a cluster this lane sends to: every kPiece-th.
  constexpr int kPeers = kGrid ? 1 : (kBlocks + kPiece - 1) / kPiece;
  Remote<unsigned char> peers[kPeers];
  if constexpr (!kGrid) {
    SEQATTN_UNROLL
    for (int i = 0; i < kPeers; ++i) {
      const int peer = g % kPiece + i * kPiece;
      peers[i] = map_shared(shared, peer < kBlocks ? peer : rank);
    }
  }

  const bool taking_turns = kTiles > 1 && sequences.present(kTiles - 1) > 0;
  const Shared<T> new_state = shared_cast<T>(shared + (Shape::kNewState + warp * (32 * kBytes)));
  // Even and odd steps written out, unless registers are short.
  constexpr int kWrittenOut = Shape::kGroups <= 2 || kTiles > 1 ? 2 * kTiles : 1;
  for (int even = 0; even < steps; even += 2) {
    SEQATTN_UNROLL_BY(kWrittenOut)
    for (int turn = 0; turn < 2 * kTiles; ++turn) {
      const int parity = turn / kTiles, tile = turn % kTiles, s = even + parity, t = start + s * forth;
      if (s >= steps || (tile > 0 && sequences.present(tile) <= 0)) {
        cp_async_commit();  // one group for each turn
        continue;
      }
      ForwardLane& own = lanes[tile];
      if (s > 0) {
        if constexpr (kGrid) {
          grid_wait(layout.counters + meeting + tile, static_cast<uint32_t>(s) * kBlocks);
          const Words4* from = exchange + (parity * kTiles + tile) * Shape::kTileWords;
          for (int i = thread_index(); i < Shape::kTileWords; i += Shape::kThreads) {
            cp_async<16>(state + tile * Shape::kTileWords + i, from + i);
          }
          cp_async_commit();
          cp_async_wait();
          block_sync();
        } else {
          const Shared<Barrier> barrier = barriers + (2 * tile + parity);
          barrier_wait(barrier, static_cast<uint32_t>(s - 1) / 2 % 2);
          if (thread_index() == 0 && s + 2 < steps)
            barrier_arrive_expect(barrier, kPieces * 16 * sequences.present(tile));
        }
      }

      float sum[kChains][kGates][4];
      SEQATTN_UNROLL
      for (int chain = 0; chain < kChains; ++chain) {
        SEQATTN_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          SEQATTN_UNROLL
          for (int r = 0; r < 4; ++r) sum[chain][gate][r] = 0;
        }
      }
      const Shared<Words4> operand = state + (parity * kStateWords + tile * kPieces * 8 + operand_place);
      SEQATTN_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        const Words4 b = load(operand + p * 32);
        SEQATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const uint32_t half[2] = {b[2 * i], b[2 * i + 1]};
          SEQATTN_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            uint32_t a[4];
            if (p < kHeld) {
              SEQATTN_UNROLL
              for (int r = 0; r < 4; ++r) a[r] = held[p < kHeld ? p : 0][gate][i][r];
            } else {
              const Words4 words =
                  load(weights + (((warp * (kPairs - kHeld) + p - kHeld) * kGates + gate) * 2 + i) * 32 + lane);
              SEQATTN_UNROLL
              for (int r = 0; r < 4; ++r) a[r] = words[r];
            }
            Op::multiply(sum[i % kChains][gate], a, half);
          }
        }
      }
      if constexpr (kChains == 2) {
        SEQATTN_UNROLL
        for (int r = 0; r < 4; ++r) sum[0][0][r] += sum[1][0][r];
      }

      // Accumulator r of all four warps goes to warp r of the group.
      const int at_parts = (taking_turns ? tile : parity) * kPartsFloats;
      SEQATTN_UNROLL
      for (int r = 0; r < kSplit; ++r) {
        if (r == split) continue;
        const Shared<float> to = parts + (give_place + (at_parts + r * kSplit * kPart));
        if constexpr (kGates == 4) {
          Vec<float, 4> v;
          SEQATTN_UNROLL
          for (int gate = 0; gate < 4; ++gate) v[gate] = sum[0][gate][r];
          store(shared_cast<Vec<float, 4>>(to), v);
        } else {
          SEQATTN_UNROLL
          for (int gate = 0; gate < kGates; ++gate) store(to + gate * 32, sum[0][gate][r]);
        }
      }
      cp_async_wait<2 * kTiles - 1>();
      named_barrier_sync(1 + group, 32 * kSplit);

      const bool valid = runs(t, own.length);
      float pre[kSlots], saved[Cell::kSaved ? Cell::kSaved : 1];
      SEQATTN_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        pre[slot] = kKeepBias ? bias[slot] : load(bias_there + slot * Shape::kUnits);
        if (slot < kGates && valid) {
          const T x = load(shared_cast<T>(x_own + turn * (Shape::kWarps * kGates * 32 * kBytes)) +
                           ((Cell::x_gate(slot) * 4 + q) * 8 + g));
          pre[slot] += to_float(x);
        }
        if (slot >= kSlots - kGates) {
          const float (&mine)[4] = sum[0][slot - (kSlots - kGates)];
          pre[slot] += split < 2 ? (split == 0 ? mine[0] : mine[1]) : (split == 2 ? mine[2] : mine[3]);
        }
      }
      SEQATTN_UNROLL
      for (int other = 1; other < kSplit; ++other) {
        const Shared<float> from = parts + (take_place[other] + at_parts);
        if constexpr (kGates == 4) {
          const Vec<float, 4> v = load(shared_cast<Vec<float, 4>>(from));
          SEQATTN_UNROLL
          for (int gate = 0; gate < 4; ++gate) pre[gate] += v[gate];
        } else {
          SEQATTN_UNROLL
          for (int gate = 0; gate < kGates; ++gate) pre[kSlots - kGates + gate] += load(from + gate * 32);
        }
      }

      const float h_before = own.h;
      float h_new, c_new;
      Cell::template forward<typename Op::Math>(pre, own.h, own.c, &h_new, &c_new, saved);
      if (valid) {
        own.h = Op::round(h_new);
        if constexpr (Cell::kHasCell) own.c = c_new;
      }

      if (s + 1 < steps) {
        if constexpr (kBytes == 4) {
          store(new_state + (q * 8 + g), bits_float(to_tf32(own.h)));
        } else {
          store(new_state + (q * 8 + g), from_float<T>(own.h));
        }
        warp_sync();
        const Words4 piece = load(shared_cast<Words4>(new_state) + (q * kUnitPieces + g / kPiece));
        if constexpr (kGrid) {
          if (g % kPiece == 0) {
            store_coherent(exchange + ((1 - parity) * kTiles + tile) * Shape::kTileWords + own_place, piece);
          }
          grid_arrive(layout.counters + meeting + tile);
        } else if (own.present) {
          const int to = Shape::kState + (1 - parity) * Shape::kStateSize + (tile * kPieces * 8 + own_place) * 16;
          const int counted = Shape::kBarriers + (2 * tile + 1 - parity) * static_cast<int>(sizeof(Barrier));
          SEQATTN_UNROLL
          for (int i = 0; i < kPeers; ++i) {
            if (kBlocks % kPiece == 0 || g % kPiece + i * kPiece < kBlocks) {
              store_async(remote_cast<Words4>(peers[i] + to), piece, remote_cast<Barrier>(peers[i] + counted));
            }
          }
        }
      }

      if (own.live && (valid || !sequences.packed)) {
        const int at = sequences.row(t, own.sequence), out = sequences.out_row(t, own.sequence);
        store(row_at(output, out, sequences.ld_output), from_float<T>(valid ? own.h : 0.f));
        if constexpr (Cell::kHasCell) {
          if (giving_cells) store(row_at(cell_rows, out, ld_cell), from_float<T>(valid ? own.c : 0.f));
        }
        if (saving) {
          store(row_at(h_prev, at, state_row), from_float<T>(h_before));
          if (valid) {
            if constexpr (Cell::kHasCell) store(row_at(cells, at, state_row * (4 / kBytes)), own.c);
            Vec<T, kKept> values;
            SEQATTN_UNROLL
            for (int i = 0; i < kKept; ++i) values[i] = from_float<T>(Cell::kSaved ? saved[i] : own.h);
            store(row_at(saved_rows, at, state_row * kKept), values);
          }
        }
      }
      warp_sync();  // all lanes have read the x gates and the new h
      fetch_x(turn, t + 2 * forth);
    }
  }

  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    const ForwardLane& own = lanes[tile];
    if (own.live) {
      // Computed anew, not carried through the loop.
      const int its_unit =
          (keep(rank) * Shape::kGroups + keep(group)) * kGroupUnits + keep(lane) / 4 + 8 * (keep(split) / 2);
      const int64_t at = (static_cast<int64_t>(keep(direction)) * batch + keep(own.sequence)) * hidden + its_unit;
      static_cast<T*>(args.hn)[at] = from_float<T>(own.h);
      if constexpr (Cell::kHasCell) static_cast<T*>(args.cn)[at] = from_float<T>(own.c);
    }
  }
  if constexpr (!kGrid) cluster_sync();
}

}  // namespace seqattn::gpu
