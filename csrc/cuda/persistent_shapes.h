// How the persistent kernels cut a layer: sizes that kernels are compiled with and plans are made from. Plain C++
// without a CUDA header.
#pragma once

#include <cstdint>

namespace seqattn::gpu {

inline constexpr int kGroupUnits = 16;  // units of a warp's tile
inline constexpr int kSplit = 4;        // warps that share a tile

// Blocks that share one direction's weights: a cluster, or a part of a cooperative grid (a team).
struct TeamSize {
  int padded;  // hidden units a team can hold
  int blocks;
};
inline constexpr TeamSize kClusterSizes[] = {{128, 8}, {256, 16}, {384, 8}, {512, 16}, {768, 16}, {1024, 16}};
inline constexpr TeamSize kGridSizes[] = {{256, 8}, {512, 16}, {768, 24}, {768, 48}, {1024, 32}, {1024, 64}};
inline constexpr int kMaxColumnTiles = 2;

// What of a cell decides sizes; `kept` is kept() of recurrence.h.
struct CellSize {
  int gates, slots, kept;
  bool has_cell;
};

// A kernel of a cell with elements of `bytes`, 8 * tiles sequences a team.
struct TeamShape {
  CellSize cell;
  int bytes, padded, blocks, tiles;
  bool grid;  // exchanges through global memory

  constexpr int units() const { return padded / blocks; }  // of a block
  constexpr int groups() const { return units() / kGroupUnits; }
  constexpr int warps() const { return kSplit * groups(); }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int piece() const { return 16 / bytes; }
  // Registers a thread can spare for weights, of 255 (up to 8 warps), 168 (12 warps) or 128 (16 warps). Forward.
  constexpr int spare_registers() const {
    const int spare = groups() == 1 && tiles == 1 ? 160
                      : groups() == 1             ? 128
                      : groups() == 2             ? 128
                      : groups() == 3             ? 96
                                                  : 64;
    return groups() > 2 && tiles > 1 ? spare - 32 : spare;
  }
  constexpr int least(int a, int b) const { return a < b ? a : b; }

  // Forward: a warp has a tile of each gate; the four of a group share the sum over k.
  constexpr int forward_pairs() const { return padded / (kSplit * 4 * piece()); }
  constexpr int forward_held() const { return least(forward_pairs(), spare_registers() / (8 * cell.gates)); }
  constexpr int state_bytes() const { return tiles * padded / piece() * 128; }
  // A grid's state is double buffered in global memory, and its block barriers leave the sums' parts one user at a
  // time.
  constexpr int state_buffers() const { return grid ? 1 : 2; }
  constexpr int split_bytes() const { return warps() * kSplit * cell.gates * 128; }
  constexpr int split_buffers() const { return grid ? 1 : 2; }
  constexpr int forward_weight_bytes() const {
    return warps() * (forward_pairs() - forward_held()) * cell.gates * 1024;
  }
  // x gates of a warp's 8 units and 4 columns, of two steps; and a warp's new h.
  constexpr int x_bytes() const { return tiles * warps() * cell.gates * 32 * bytes; }
  constexpr int h_bytes() const { return warps() * 32 * bytes; }
  constexpr int bias_bytes() const { return cell.slots * units() * 4; }
  constexpr int forward_shared_bytes() const {
    const int used =
        state_buffers() * state_bytes() + split_buffers() * split_bytes() + 2 * x_bytes() + h_bytes() + bias_bytes();
    return kBarrierBytes + (used > stage_bytes(cell.gates) ? used : stage_bytes(cell.gates)) + forward_weight_bytes();
  }

  // Backward: a warp has row_tiles() tiles of W_hh transposed, and all of k.
  constexpr int row_tiles() const { return blocks / kSplit; }
  constexpr int plane() const { return units() / piece(); }  // pieces of a slot
  constexpr int backward_pairs() const { return (cell.gates * plane() + 3) / 4; }
  constexpr int backward_held() const {
    const int spare = groups() > 2 ? spare_registers() : grid && tiles > 1 && bytes == 4 ? 96 : 128;
    return least(backward_pairs(), spare / (8 * row_tiles()));
  }
  constexpr int gate_pieces() const {
    return cell.slots * plane() > 4 * backward_pairs() ? cell.slots * plane() : 4 * backward_pairs();
  }
  constexpr int part_bytes() const { return blocks * groups() * tiles * 512; }
  constexpr int gate_bytes() const { return tiles * gate_pieces() * 128; }
  constexpr int backward_weight_bytes() const {
    return warps() * (backward_pairs() - backward_held()) * row_tiles() * 1024;
  }
  // Values forward left for a warp's 16 units and 2 columns, of two steps, in pieces: those kept, h before (only a cell
  // without cell state asks for it), the cell state before, the gradient of the output.
  constexpr int kept_pieces() const { return cell.kept * bytes; }
  constexpr int h_pieces() const { return cell.has_cell || cell.kept == 1 ? 0 : bytes; }
  constexpr int cell_pieces() const { return cell.has_cell ? 4 : 0; }
  constexpr int value_pieces() const { return kept_pieces() + h_pieces() + cell_pieces() + bytes; }
  constexpr int value_bytes() const { return tiles * warps() * 2 * value_pieces() * 16; }
  constexpr int backward_shared_bytes() const {
    const int used = (grid ? 0 : 2 * part_bytes()) + 2 * gate_bytes() + 2 * value_bytes();
    return kBarrierBytes + (used > stage_bytes(row_tiles()) ? used : stage_bytes(row_tiles())) +
           backward_weight_bytes();
  }

  // What weights of a warp's `count` tiles pass through when a block starts, kStageTiles at a time.
  static constexpr int kStageTiles = 4;
  constexpr int stage_bytes(int count) const { return warps() * least(count, kStageTiles) * 1024; }

  // Global memory through which a grid's team exchanges.
  constexpr int64_t forward_exchange_bytes() const { return 2 * static_cast<int64_t>(state_bytes()); }
  constexpr int64_t backward_exchange_bytes() const { return 2 * static_cast<int64_t>(blocks) * part_bytes(); }

  static constexpr int kBarrierBytes = 128, kNumbers = 64;  // barriers, and from there on numbers
  static constexpr int kSharedLimit = 227 * 1024;           // of a block on the largest device
  // Whether a block's shared memory holds what forward and backward need.
  constexpr bool fits(int shared_limit = kSharedLimit) const {
    return forward_shared_bytes() <= shared_limit && backward_shared_bytes() <= shared_limit;
  }
};

// Workspace of a grid kernel: counters of each round, then what its teams exchange through.
struct GridWorkspace {
  int64_t counters;  // of a round
  int64_t counter_bytes;
  constexpr GridWorkspace(int64_t teams, int64_t tiles, int64_t rounds)
      : counters(teams * tiles), counter_bytes((rounds * counters * 4 + 255) / 256 * 256) {}
};

// How a batch is shared out among the teams a device holds at once for one direction: evenly, with as few sequences a
// team as that allows (their exchange is what a step waits for), in as few rounds as the widest kernel needs.
struct TeamBatch {
  int tiles, columns;  // columns of a tile
  int64_t teams;
};
constexpr TeamBatch team_batch(TeamShape shape, int64_t batch, int64_t resident,
                               int shared_limit = TeamShape::kSharedLimit) {
  shape.tiles = kMaxColumnTiles;
  const int64_t widest = shape.fits(shared_limit) ? 8 * kMaxColumnTiles : 8;
  const int64_t rounds = (batch + resident * widest - 1) / (resident * widest);
  const int64_t each = rounds ? (batch + resident * rounds - 1) / (resident * rounds) : 1;
  const int64_t tiles = (each + 7) / 8, columns = (each + tiles - 1) / tiles;
  return {static_cast<int>(tiles), static_cast<int>(columns), (batch + tiles * columns - 1) / (tiles * columns)};
}

}  // namespace seqattn::gpu
