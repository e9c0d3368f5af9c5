// Definitions of persistent_launch.h, for the files that compile the kernels.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>
#include <utility>

#include "persistent_backward.cuh"
#include "persistent_forward.cuh"
#include "persistent_launch.h"
#include "resident.cuh"

namespace seqattn::gpu {
namespace persistent {

inline constexpr const char* kStarted = "";
inline constexpr const char* kTooMany = "more sequences than the kernel has columns";
inline constexpr const char* kUnknown = "no kernel was compiled for the size planned";

template <class Shape, class Args, class Kernel>
const char* start_clusters(const Args& args, Stream stream, Kernel kernel, Launch l) {
  static Resident held_by_device;
  l.grid = l.cluster = Shape::kBlocks;
  const int held = held_by_device.clusters(kernel, l);
  if (held == 0) return "the device has no room for a cluster of the size planned";
  const TeamBatch batch = team_batch(Shape::kShape, args.rows.batch, std::max(1, held / args.directions));
  if (batch.tiles > Shape::kColumnTiles) return kTooMany;
  l.grid = static_cast<int>(batch.teams) * Shape::kBlocks;
  launch(kernel, l, stream, args, Layout{0, batch.columns, nullptr, nullptr});
  return kStarted;
}

// All blocks of a grid are resident at once; a batch that is more than their columns takes several launches.
template <class Shape, class Args, class Kernel>
const char* start_grids(const Plan& plan, const Args& args, void* workspace, Stream stream, Kernel kernel, Launch l) {
  const int tiles = (plan.batch_columns + 7) / 8;
  if (tiles != Shape::kColumnTiles) return kTooMany;
  l.cooperative = true;
  l.grid = plan.clusters * Shape::kBlocks;
  const int64_t each = static_cast<int64_t>(plan.clusters) * plan.batch_columns;
  const int64_t rounds = (args.rows.batch + each - 1) / each;
  const GridWorkspace space(args.directions * plan.clusters, tiles, rounds);
  for (int64_t round = 0; round < rounds; ++round) {
    const Layout layout{static_cast<int>(round * each), plan.batch_columns / tiles,
                        static_cast<uint32_t*>(workspace) + round * space.counters,
                        reinterpret_cast<Words4*>(static_cast<char*>(workspace) + space.counter_bytes)};
    launch(kernel, l, stream, args, layout);
  }
  return kStarted;
}

template <class Shape, class Args, class Kernel>
const char* start(const Plan& plan, const Args& args, void* workspace, Stream stream, Kernel kernel) {
  Launch l;
  l.block = Shape::kThreads;
  l.shared_bytes = Shape::kSharedBytes;
  l.grid_y = args.directions;
  if constexpr (Shape::kGrid) {
    return start_grids<Shape>(plan, args, workspace, stream, kernel, l);
  } else {
    return start_clusters<Shape>(args, stream, kernel, l);
  }
}

// Starts the first kernel that has enough tiles of columns. `kernel(std::type_identity<Shape>)` is the kernel of a
// Shape = Kind<Cell, T, padded, blocks, tiles, grid>.
template <template <class, class, int, int, int, bool> class Kind, class Cell, class T, int kPadded, int kBlocks,
          bool kGrid, int kTiles, class Args, class Choice>
const char* start_any(const Plan& plan, const Args& args, void* workspace, Stream stream, Choice kernel) {
  constexpr TeamShape shape{cell_size<Cell>(), sizeof(T), kPadded, kBlocks, kTiles, kGrid};
  if constexpr (kTiles > kMaxColumnTiles || !shape.fits()) {
    return kTiles > 1 ? kTooMany : kUnknown;
  } else {
    using Shape = Kind<Cell, T, kPadded, kBlocks, kTiles, kGrid>;
    const char* result = start<Shape>(plan, args, workspace, stream, kernel(std::type_identity<Shape>{}));
    if (result != kTooMany) return result;
    return start_any<Kind, Cell, T, kPadded, kBlocks, kGrid, kTiles + 1>(plan, args, workspace, stream, kernel);
  }
}

template <template <class, class, int, int, int, bool> class Kind, class Cell, class T, class Args, class Choice>
const char* choose(const Plan& plan, const Args& args, void* workspace, Stream stream, Choice kernel) {
  const int padded = plan.rows_per_block * plan.cluster;
  const char* result = kUnknown;
  const auto attempt = [&]<bool kGrid, size_t i>(std::bool_constant<kGrid>, std::integral_constant<size_t, i>) {
    constexpr TeamSize size = kGrid ? kGridSizes[i] : kClusterSizes[i];
    if ((plan.kernel == Kernel::kCooperative) == kGrid && padded == size.padded && plan.cluster == size.blocks) {
      result = start_any<Kind, Cell, T, size.padded, size.blocks, kGrid, 1>(plan, args, workspace, stream, kernel);
    }
  };
  const auto attempt_all = [&]<bool kGrid, size_t... i>(std::bool_constant<kGrid> grid, std::index_sequence<i...>) {
    (attempt(grid, std::integral_constant<size_t, i>{}), ...);
  };
  attempt_all(std::false_type{}, std::make_index_sequence<std::size(kClusterSizes)>{});
  attempt_all(std::true_type{}, std::make_index_sequence<std::size(kGridSizes)>{});
  return result == kStarted ? nullptr : result;
}

}  // namespace persistent

template <class Cell, class T>
const char* PersistentKernels<Cell, T>::forward(const Plan& plan, const Forward& args, void* workspace, Stream stream) {
  return persistent::choose<PersistentForward, Cell, T>(
      plan, args, workspace, stream,
      []<class Shape>(std::type_identity<Shape>) { return &persistent_forward_kernel<Shape>; });
}

template <class Cell, class T>
const char* PersistentKernels<Cell, T>::backward(const Plan& plan, const Backward& args, void* workspace,
                                                 Stream stream) {
  return persistent::choose<PersistentBackward, Cell, T>(
      plan, args, workspace, stream,
      []<class Shape>(std::type_identity<Shape>) { return &persistent_backward_kernel<Shape>; });
}

}  // namespace seqattn::gpu
