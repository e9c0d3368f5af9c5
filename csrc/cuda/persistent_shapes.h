// How the persistent cluster kernels cut a layer: sizes that kernels are compiled with and plans are made from. Plain
// C++ without a CUDA header.
#pragma once

#include <cstdint>

namespace seqattn::gpu {

inline constexpr int kGroupUnits = 16;  // units of a warp's tile
inline constexpr int kSplit = 4;        // warps that share a tile

struct ClusterSize {
  int padded;   // hidden units a cluster can hold
  int cluster;  // its blocks
};
inline constexpr ClusterSize kClusterSizes[] = {{128, 8}, {256, 8}, {384, 8}, {512, 16}, {768, 16}, {1024, 16}};
inline constexpr int kMaxColumnTiles = 2;

// A cluster kernel of a cell with `gates` and `slots`, elements of `bytes`, 8 * tiles sequences a cluster.
struct ClusterShape {
  int gates, slots, bytes, padded, cluster, tiles;

  constexpr int units() const { return padded / cluster; }  // of a block
  constexpr int groups() const { return units() / kGroupUnits; }
  constexpr int warps() const { return kSplit * groups(); }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int piece() const { return 16 / bytes; }
  // Registers a thread can spare for weights, of 255 (up to 8 warps), 168 (12 warps) or 128 (16 warps).
  constexpr int spare_registers() const {
    const int spare = groups() <= 2 ? 128 : groups() == 3 ? 96 : 64;
    return groups() > 2 && tiles > 1 ? spare - 32 : spare;
  }
  constexpr int least(int a, int b) const { return a < b ? a : b; }

  // Forward: a warp has a tile of each gate; the four of a group share the sum over k.
  constexpr int forward_pairs() const { return padded / (kSplit * 4 * piece()); }
  constexpr int forward_held() const { return least(forward_pairs(), spare_registers() / (8 * gates)); }
  constexpr int state_bytes() const { return tiles * padded / piece() * 128; }
  constexpr int split_bytes() const { return tiles * warps() * kSplit * gates * 128; }
  constexpr int forward_weight_bytes() const { return warps() * (forward_pairs() - forward_held()) * gates * 1024; }
  constexpr int forward_shared_bytes() const {
    return kBarrierBytes + 2 * state_bytes() + 2 * split_bytes() + forward_weight_bytes();
  }

  // Backward: a warp has row_tiles() tiles of W_hh transposed, and all of k.
  constexpr int row_tiles() const { return cluster / kSplit; }
  constexpr int plane() const { return units() / piece(); }  // pieces of a slot
  constexpr int backward_pairs() const { return (gates * plane() + 3) / 4; }
  constexpr int backward_held() const { return least(backward_pairs(), spare_registers() / (8 * row_tiles())); }
  constexpr int gate_pieces() const {
    return slots * plane() > 4 * backward_pairs() ? slots * plane() : 4 * backward_pairs();
  }
  constexpr int part_bytes() const { return cluster * groups() * tiles * 512; }
  constexpr int gate_bytes() const { return tiles * gate_pieces() * 128; }
  constexpr int backward_weight_bytes() const {
    return warps() * (backward_pairs() - backward_held()) * row_tiles() * 1024;
  }
  constexpr int backward_shared_bytes() const {
    return kBarrierBytes + 2 * part_bytes() + 2 * gate_bytes() + backward_weight_bytes();
  }

  static constexpr int kBarrierBytes = 128;
  static constexpr int kSharedLimit = 227 * 1024;  // of a block on every device with clusters
  // Whether a block's shared memory holds what forward and backward need.
  constexpr bool fits(int shared_limit = kSharedLimit) const {
    return forward_shared_bytes() <= shared_limit && backward_shared_bytes() <= shared_limit;
  }
};

// How a batch is shared out among the clusters a device holds at once for one direction: evenly, with as few sequences
// a cluster as that allows (their exchange is what a step waits for), in as few rounds as the widest kernel needs.
struct ClusterBatch {
  int tiles, columns;
  int64_t clusters;
};
constexpr ClusterBatch cluster_batch(ClusterShape shape, int64_t batch, int64_t resident) {
  shape.tiles = kMaxColumnTiles;
  const int64_t widest = shape.fits() ? 8 * kMaxColumnTiles : 8;
  const int64_t rounds = (batch + resident * widest - 1) / (resident * widest);
  const int64_t columns = rounds ? (batch + resident * rounds - 1) / (resident * rounds) : 1;
  return {columns > 8 ? kMaxColumnTiles : 1, static_cast<int>(columns), (batch + columns - 1) / columns};
}

}  // namespace seqattn::gpu
