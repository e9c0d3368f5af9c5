// The whole forward loop of a recurrent layer in one kernel: W_hh stays in a cluster, h travels through distributed
// shared memory. See persistent.cuh for the layout.
//
// A step: wait until all of h is there; multiply; add up the four parts of each sum (warps of a group, through shared
// memory); the cell, one unit and column a lane; gather 16 bytes of new h in every lane by shuffles; send them to all
// blocks, where they count at the barrier of the next step; then write results and fetch the next step's x gates while
// they travel. h, its barrier and the parts are double buffered: no block can be more than one step ahead, since a step
// needs h of every group of every block.
#pragma once

#include "persistent.cuh"

namespace seqattn::gpu {

enum class Exchange { kAsync, kGather, kBulk, kBarrier };

template <class Cell_, class T_, int kPadded, int kCluster_, int kColumnTiles_, Exchange kExchange_ = Exchange::kAsync>
struct ClusterForward {
  using Cell = Cell_;
  using T = T_;
  static constexpr Exchange kExchange = kExchange_;
  static constexpr ClusterShape kShape{Cell::kGates, Cell::kSlots, sizeof(T), kPadded, kCluster_, kColumnTiles_};
  static constexpr int kCluster = kCluster_, kColumnTiles = kColumnTiles_, kColumns = 8 * kColumnTiles;
  static constexpr int kGroups = kShape.groups(), kUnits = kShape.units();
  static constexpr int kWarps = kShape.warps(), kThreads = kShape.threads();
  static constexpr int kPairs = kShape.forward_pairs(), kHeld = kShape.forward_held();
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots;
  static constexpr int kPiece = Operand<T>::kPiece, kPieces = kPadded / kPiece;

  // Shared memory, in bytes.
  static constexpr int kBarriers = 0;
  static constexpr int kState = ClusterShape::kBarrierBytes, kStateSize = kShape.state_bytes();
  static constexpr int kParts = kState + 2 * kStateSize, kPartsSize = kShape.split_bytes();
  static constexpr int kWeights = kParts + 2 * kPartsSize;
  static constexpr int kStage = kWeights + kShape.forward_weight_bytes();
  static constexpr int kStageSize =
      kExchange == Exchange::kGather || kExchange == Exchange::kBulk ? 2 * kColumnTiles * kUnits / kPiece * 128 : 0;
  static constexpr int kSharedBytes = kStage + kStageSize;

  // Accumulators are as many independent chains.
  static constexpr int kChains = kGates == 1 ? 2 : 1;
};

// Gathers the 16 bytes of a piece, in lane order along 4 * kPiece lanes apart by 4, into each of them.
template <class T>
SEQATTN_DEVICE Words4 gather_piece(float h, int lane) {
  Words4 piece;
  if constexpr (sizeof(T) == 2) {
    const bool odd = lane & 4;
    const float other = shuffle_xor(h, 4);
    const uint32_t word = odd ? pack<T>(other, h) : pack<T>(h, other);
    const uint32_t word2 = shuffle_xor(word, 8);
    const uint32_t low = lane & 8 ? word2 : word, high = lane & 8 ? word : word2;
    const uint32_t low2 = shuffle_xor(low, 16), high2 = shuffle_xor(high, 16);
    const bool second = lane & 16;
    piece[0] = second ? low2 : low;
    piece[1] = second ? high2 : high;
    piece[2] = second ? low : low2;
    piece[3] = second ? high : high2;
  } else {
    const uint32_t word = to_tf32(h), word2 = shuffle_xor(word, 4);
    const uint32_t low = lane & 4 ? word2 : word, high = lane & 4 ? word : word2;
    const uint32_t low2 = shuffle_xor(low, 8), high2 = shuffle_xor(high, 8);
    const bool second = lane & 8;
    piece[0] = second ? low2 : low;
    piece[1] = second ? high2 : high;
    piece[2] = second ? low : low2;
    piece[3] = second ? high : high2;
  }
  return piece;
}

template <class Shape>
SEQATTN_KERNEL(Shape::kThreads, 1)
cluster_forward(SEQATTN_KERNEL_PARAM Forward args, int columns) {
  using Cell = typename Shape::Cell;
  using T = typename Shape::T;
  using Op = Operand<T>;
  constexpr int kTiles = Shape::kColumnTiles, kGates = Shape::kGates, kSlots = Shape::kSlots, kPiece = Shape::kPiece;
  constexpr int kPairs = Shape::kPairs, kHeld = Shape::kHeld, kPieces = Shape::kPieces, kCluster = Shape::kCluster;
  constexpr int kChains = Shape::kChains, kKept = kept(Cell::kSaved, Cell::kHasCell);
  constexpr Exchange kExchange = Shape::kExchange;

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
  const Shared<Words4> state = shared_cast<Words4>(shared + Shape::kState);
  const Shared<float> parts = shared_cast<float>(shared + Shape::kParts);
  const Shared<Words4> weights = shared_cast<Words4>(shared + Shape::kWeights);
  constexpr int kStateWords = Shape::kStateSize / 16, kPartsFloats = Shape::kPartsSize / 4;

  // W_hh: rows g and g + 8 of the group, a quarter of the columns.
  uint32_t held[kHeld ? kHeld : 1][kGates][2][4];
  const T* w_hh = static_cast<const T*>(args.w_hh[direction]);
  const int group_unit = rank * Shape::kUnits + group * kGroupUnits;
  const bool vectors = hidden % kPiece == 0 && reinterpret_cast<uintptr_t>(w_hh) % 16 == 0;
  hold_weights<kPairs, kHeld, kGates>(held, weights, shared_cast<Words4>(shared + Shape::kParts), [&](int p, int gate) {
    const int k = ((split * kPairs + p) * 4 + q) * kPiece;
    const T* w = w_hh + static_cast<int64_t>(Cell::h_gate(kSlots - kGates + gate)) * hidden * hidden;
    return weight_pair<T>(load_piece(w, group_unit + g, hidden, k, hidden, vectors),
                          load_piece(w, group_unit + g + 8, hidden, k, hidden, vectors));
  });
  // h of all units at the first step; zeros where no sequence is.
  const T* h0 = static_cast<const T*>(args.h0);
  for (int i = thread_index(); i < kTiles * kPieces * 8; i += Shape::kThreads) {
    const int tile = i / (kPieces * 8), piece = i / 8 % kPieces, column = i % 8;
    const int b = first + tile * 8 + column;
    Words4 words{};
    if (h0 != nullptr && tile * 8 + column < present) {
      words =
          load_piece(h0 + static_cast<int64_t>(direction) * batch * hidden, b, batch, piece * kPiece, hidden, false);
      SEQATTN_UNROLL
      for (int w = 0; w < 4; ++w) words[w] = Op::weight_bits(words[w]);
    }
    const int place = tile * kPieces * 8 + piece_place(piece, column);
    store(state + place, words);
    store(state + kStateWords + place, Words4{});
  }

  const int expected = kExchange == Exchange::kBulk ? Shape::kStateSize : kPieces * 16 * present;
  if (thread_index() == 0 && kExchange != Exchange::kBarrier) {
    barrier_init(barriers, 1);
    barrier_init(barriers + 1, 1);
    barrier_fence_init();
    if (steps > 1) barrier_arrive_expect(barriers + 1, expected);
    if (steps > 2) barrier_arrive_expect(barriers, expected);
  }
  cluster_sync();

  // This lane's unit and, in each tile, its column.
  const int unit = group_unit + g + 8 * (split / 2);
  const int column = 2 * q + split % 2;
  const int own_piece = group_unit / kPiece + (8 * (split / 2) + g) / kPiece;
  bool present_column[kTiles], live[kTiles];
  int sequence[kTiles], length[kTiles], row[kTiles], next_row[kTiles];
  float h[kTiles], c[kTiles], bias[kSlots];
  T x_next[kTiles][kGates];  // converted only where used, so that no step waits for them
  const int gate_row = kGates * hidden * static_cast<int>(sizeof(T));  // bytes
  const T* x_gates = static_cast<const T*>(args.x_gates) + direction * args.rows.rows * kGates * hidden + unit;
  const auto step_of = [&](int s) { return reverse ? steps - 1 - s : s; };
  SEQATTN_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    bias[slot] = args.bias != nullptr && unit < hidden
                     ? static_cast<const float*>(args.bias)[(direction * kSlots + slot) * hidden + unit]
                     : 0.f;
  }
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    present_column[tile] = tile * 8 + column < present;
    live[tile] = present_column[tile] && unit < hidden;
    sequence[tile] = first + tile * 8 + column;
    length[tile] = !live[tile]                    ? 0
                   : args.rows.lengths != nullptr ? static_cast<int>(args.rows.lengths[sequence[tile]])
                                                  : steps;
    const int64_t at = (static_cast<int64_t>(direction) * batch + sequence[tile]) * hidden + unit;
    h[tile] = live[tile] && h0 != nullptr ? to_float(h0[at]) : 0.f;
    c[tile] = Cell::kHasCell && live[tile] && args.c0 != nullptr ? to_float(static_cast<const T*>(args.c0)[at]) : 0.f;
  }
  const int64_t* offsets = args.rows.offsets;
  // Row of this lane's sequence at step s; -1 where it takes no part.
  const auto row_of = [&](int s, int tile) {
    const int t = step_of(s);
    if (s >= steps || t >= length[tile]) return -1;
    return (offsets != nullptr ? static_cast<int>(offsets[t]) : t * batch) + sequence[tile];
  };
  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    row[tile] = row_of(0, tile);
    next_row[tile] = row_of(1, tile);
    SEQATTN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      x_next[tile][gate] = from_float<T>(0.f);
      if (row[tile] >= 0) x_next[tile][gate] = load(row_at(x_gates, row[tile], gate_row) + gate * hidden);
    }
  }

  const int64_t direction_row = static_cast<int64_t>(direction) * args.rows.rows * hidden;
  const int ld_output = static_cast<int>(args.ld_output * sizeof(T)),
            ld_cell = static_cast<int>(args.ld_cell * sizeof(T));
  const int out_step = static_cast<int>(args.rows.out_step), out_batch = static_cast<int>(args.rows.out_batch);
  T* output = static_cast<T*>(args.output_rows) + direction * hidden + unit;
  T* cell_rows = args.cell_rows == nullptr ? nullptr : static_cast<T*>(args.cell_rows) + direction * hidden + unit;
  T* h_prev = static_cast<T*>(args.h_prev) + direction_row + unit;
  float* cells = static_cast<float*>(args.cells) + direction_row + unit;
  Vec<T, kKept>* saved_rows = static_cast<Vec<T, kKept>*>(args.saved) + direction_row + unit;
  const int part_lane = lane * (kGates == 4 ? 4 : 1);

  // The blocks this lane sends to: every kPiece-th.
  constexpr int kPeers = (kCluster + kPiece - 1) / kPiece;
  Remote<unsigned char> peers[kPeers];
  SEQATTN_UNROLL
  for (int i = 0; i < kPeers; ++i) {
    const int peer = g % kPiece + i * kPiece;
    peers[i] = map_shared(shared, peer < kCluster ? peer : rank);
  }

  for (int s = 0; s < steps; ++s) {
    const int parity = s & 1;
    const int t = step_of(s);
    T x[kTiles][kGates];
    int coming_row[kTiles];
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      coming_row[tile] = row_of(s + 2, tile);
      SEQATTN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        x[tile][gate] = x_next[tile][gate];
        if (next_row[tile] >= 0) {
          x_next[tile][gate] = load_readonly(row_at(x_gates, next_row[tile], gate_row) + gate * hidden);
        }
      }
    }

    if (s > 0) {
      if constexpr (kExchange == Exchange::kBarrier) {
        cluster_wait();
      } else {
        barrier_wait(barriers + parity, static_cast<uint32_t>((s - 1) >> 1) & 1);
        if (thread_index() == 0 && s + 2 < steps) barrier_arrive_expect(barriers + parity, expected);
      }
    }

    float sum[kTiles][kChains][kGates][4];
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SEQATTN_UNROLL
      for (int chain = 0; chain < kChains; ++chain) {
        SEQATTN_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          SEQATTN_UNROLL
          for (int r = 0; r < 4; ++r) sum[tile][chain][gate][r] = 0;
        }
      }
    }
    const Shared<Words4> previous =
        state + parity * kStateWords + (split * kPairs * 4 + q) * 8 + ((4 * (g % 2) + g / 2) ^ q);
    SEQATTN_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      Words4 b[kTiles];
      SEQATTN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) b[tile] = load(previous + tile * kPieces * 8 + p * 32);
      SEQATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
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
          SEQATTN_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint32_t pair[2] = {b[tile][2 * i], b[tile][2 * i + 1]};
            Op::multiply(sum[tile][i % kChains][gate], a, pair);
          }
        }
      }
    }
    if constexpr (kChains == 2) {
      SEQATTN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        SEQATTN_UNROLL
        for (int r = 0; r < 4; ++r) sum[tile][0][0][r] += sum[tile][1][0][r];
      }
    }

    // Accumulator r of all four warps goes to warp r of the group.
    const Shared<float> part = parts + parity * kPartsFloats + group * (kSplit * kSplit * kGates * 32) + part_lane;
    const auto part_of = [&](int tile, int to, int from) {
      return part + ((tile * Shape::kGroups * kSplit + to) * kSplit + from) * (kGates * 32);
    };
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SEQATTN_UNROLL
      for (int r = 0; r < kSplit; ++r) {
        if (r != split) {
          const Shared<float> to = part_of(tile, r, split);
          if constexpr (kGates == 4) {
            Vec<float, 4> v;
            SEQATTN_UNROLL
            for (int gate = 0; gate < 4; ++gate) v[gate] = sum[tile][0][gate][r];
            store(shared_cast<Vec<float, 4>>(to), v);
          } else {
            SEQATTN_UNROLL
            for (int gate = 0; gate < kGates; ++gate) store(to + gate * 32, sum[tile][0][gate][r]);
          }
        }
      }
    }
    named_barrier_sync(1 + group, 32 * kSplit);

    const Shared<unsigned char> stage = shared + Shape::kStage + parity * (Shape::kStageSize / 2);
    float pre[kTiles][kSlots], saved[kTiles][Cell::kSaved ? Cell::kSaved : 1], h_before[kTiles];
    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SEQATTN_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        pre[tile][slot] = bias[slot];
        if (slot < kGates) pre[tile][slot] += to_float(x[tile][Cell::x_gate(slot)]);
        if (slot >= kSlots - kGates) {
          const int gate = slot - (kSlots - kGates);
          const float (&own)[4] = sum[tile][0][gate];
          pre[tile][slot] += split < 2 ? (split == 0 ? own[0] : own[1]) : (split == 2 ? own[2] : own[3]);
        }
      }
      SEQATTN_UNROLL
      for (int from = 1; from < kSplit; ++from) {
        const Shared<float> at = part_of(tile, split, split ^ from);
        if constexpr (kGates == 4) {
          const Vec<float, 4> v = load(shared_cast<Vec<float, 4>>(at));
          SEQATTN_UNROLL
          for (int gate = 0; gate < 4; ++gate) pre[tile][kSlots - kGates + gate] += v[gate];
        } else {
          SEQATTN_UNROLL
          for (int gate = 0; gate < kGates; ++gate) pre[tile][kSlots - kGates + gate] += load(at + gate * 32);
        }
      }

      h_before[tile] = h[tile];
      float h_new, c_new;
      Cell::template forward<FastMath>(pre[tile], h[tile], c[tile], &h_new, &c_new, saved[tile]);
      if (row[tile] >= 0) {
        h[tile] = Op::round(h_new);
        if constexpr (Cell::kHasCell) c[tile] = c_new;
      }

      if (s + 1 < steps) {
        const Words4 piece = gather_piece<T>(h[tile], lane);
        const int place = tile * kPieces * 8 + piece_place(own_piece, column);
        const int64_t at = Shape::kState + (1 - parity) * Shape::kStateSize + place * 16;
        if constexpr (kExchange == Exchange::kAsync || kExchange == Exchange::kBarrier) {
          if (present_column[tile]) {
            SEQATTN_UNROLL
            for (int i = 0; i < kPeers; ++i) {
              if (kCluster % kPiece == 0 || g % kPiece + i * kPiece < kCluster) {
                const Remote<Words4> to = remote_cast<Words4>(peers[i] + at);
                if constexpr (kExchange == Exchange::kAsync) {
                  store_async(to, piece,
                              remote_cast<Barrier>(peers[i] + (Shape::kBarriers + (1 - parity) * sizeof(Barrier))));
                } else {
                  store_remote(to, piece);
                }
              }
            }
          }
        } else if (g % kPiece == 0) {
          const int local = place - tile * kPieces * 8 - rank * (Shape::kUnits / kPiece) * 8;
          store(shared_cast<Words4>(stage) + tile * (Shape::kUnits / kPiece * 8) + local, piece);
        }
      }
    }
    if (s + 1 < steps) {
      constexpr int kOwn = Shape::kUnits / kPiece * 8;  // 16-byte words of a block and tile
      const int64_t to = Shape::kState + (1 - parity) * Shape::kStateSize + rank * kOwn * 16;
      const int64_t barrier = Shape::kBarriers + (1 - parity) * sizeof(Barrier);
      if constexpr (kExchange == Exchange::kGather) {
        block_sync();
        for (int peer = warp; peer < kCluster; peer += Shape::kWarps) {
          const Remote<unsigned char> base = map_shared(shared, peer);
          SEQATTN_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) {
            for (int i = lane; i < kOwn; i += 32) {
              const int piece = i / 8, slot = (i % 8) ^ (piece % 4), col = (slot % 4) * 2 + slot / 4;
              if (tile * 8 + col < present) {
                store_async(remote_cast<Words4>(base + (to + (tile * kPieces * 8 + i) * 16)),
                            load(shared_cast<Words4>(stage) + tile * kOwn + i), remote_cast<Barrier>(base + barrier));
              }
            }
          }
        }
      } else if constexpr (kExchange == Exchange::kBulk) {
        fence_async();
        block_sync();
        if (warp == 0 && lane < kCluster) {
          const Remote<unsigned char> base = map_shared(shared, lane);
          SEQATTN_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) {
            bulk_copy_to_peer(base + (to + tile * kPieces * 128), stage + tile * kOwn * 16, kOwn * 16,
                              remote_cast<Barrier>(base + barrier));
          }
        }
      } else if constexpr (kExchange == Exchange::kBarrier) {
        cluster_arrive();
      }
    }

    SEQATTN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const bool valid = row[tile] >= 0;
      if (live[tile] && (valid || offsets == nullptr)) {
        const int own = offsets != nullptr ? row[tile] : t * batch + sequence[tile];
        const int out = offsets != nullptr ? row[tile] : t * out_step + sequence[tile] * out_batch;
        store(row_at(output, out, ld_output), from_float<T>(valid ? h[tile] : 0.f));
        if constexpr (Cell::kHasCell) {
          if (cell_rows != nullptr) store(row_at(cell_rows, out, ld_cell), from_float<T>(valid ? c[tile] : 0.f));
        }
        if (args.saved != nullptr) {
          store(row_at(h_prev, own, hidden * static_cast<int>(sizeof(T))), from_float<T>(h_before[tile]));
          if (valid) {
            if constexpr (Cell::kHasCell) store(row_at(cells, own, hidden * 4), c[tile]);
            Vec<T, kKept> values;
            SEQATTN_UNROLL
            for (int i = 0; i < kKept; ++i) values[i] = from_float<T>(Cell::kSaved ? saved[tile][i] : h[tile]);
            store(row_at(saved_rows, own, hidden * static_cast<int>(sizeof(values))), values);
          }
        }
      }
      row[tile] = next_row[tile];
      next_row[tile] = coming_row[tile];
    }
  }

  SEQATTN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    if (live[tile]) {
      const int64_t at = (static_cast<int64_t>(direction) * batch + sequence[tile]) * hidden + unit;
      static_cast<T*>(args.hn)[at] = from_float<T>(h[tile]);
      if constexpr (Cell::kHasCell) static_cast<T*>(args.cn)[at] = from_float<T>(c[tile]);
    }
  }
  cluster_sync();
}

}  // namespace seqattn::gpu
