// Definitions of cluster_launch.h, for the files that compile the kernels.
#pragma once

#include <atomic>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cluster_launch.h"
#include "persistent_backward.cuh"
#include "persistent_forward.cuh"

namespace seqattn::gpu {
namespace cluster {

inline constexpr const char* kStarted = "";
inline constexpr const char* kTooMany = "more sequences than the kernel has columns";
inline constexpr const char* kUnknown = "no kernel was compiled for the size planned";

// Clusters of the kernel that the current device holds at once; asked once, since it takes longer than a launch.
template <class Kernel>
int resident(Kernel kernel, const Launch& launch, std::atomic<int>* known, int devices) {
  const int device = current_device();
  if (device >= devices) return resident_clusters(kernel, launch);
  int count = known[device].load(std::memory_order_relaxed);
  if (count == 0) {
    count = resident_clusters(kernel, launch) + 1;
    known[device].store(count, std::memory_order_relaxed);
  }
  return count - 1;
}

template <class Shape, class Args, class Kernel>
const char* start(const Args& args, Stream stream, Kernel kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  Launch l;
  l.grid = l.cluster = Shape::kCluster;
  l.block = Shape::kThreads;
  l.shared_bytes = Shape::kSharedBytes;
  const int held = resident(kernel, l, known, kDevices);
  if (held == 0) return "the device has no room for a cluster of the size planned";
  const ClusterBatch batch =
      cluster_batch(Shape::kShape, args.rows.batch, held > args.directions ? held / args.directions : 1);
  if (batch.columns > Shape::kColumns) return kTooMany;
  l.grid = static_cast<int>(batch.clusters) * Shape::kCluster;
  l.grid_y = args.directions;
  launch(kernel, l, stream, args, batch.columns);
  return kStarted;
}

// `kernel(std::type_identity<Shape>)` is the kernel of a Shape = Kind<Cell, T, padded, cluster, column tiles>.
template <template <class, class, int, int, int> class Kind, class Cell, class T, int kPadded, int kCluster, class Args,
          class Kernel>
const char* start_any(const Args& args, Stream stream, Kernel kernel) {
  constexpr auto fits = [](int tiles) {
    return ClusterShape{Cell::kGates, Cell::kSlots, sizeof(T), kPadded, kCluster, tiles}.fits();
  };
  if constexpr (!fits(1)) {
    return kUnknown;
  } else {
    using Narrow = Kind<Cell, T, kPadded, kCluster, 1>;
    const char* result = start<Narrow>(args, stream, kernel(std::type_identity<Narrow>{}));
    if constexpr (fits(kMaxColumnTiles)) {
      using Wide = Kind<Cell, T, kPadded, kCluster, kMaxColumnTiles>;
      if (result == kTooMany) result = start<Wide>(args, stream, kernel(std::type_identity<Wide>{}));
    }
    return result;
  }
}

template <template <class, class, int, int, int> class Kind, class Cell, class T, class Args, class Kernel>
const char* choose(const Plan& plan, const Args& args, Stream stream, Kernel kernel) {
  const int padded = plan.rows_per_block * plan.cluster;
  const char* result = kUnknown;
  const auto attempt = [&]<size_t i>(std::integral_constant<size_t, i>) {
    constexpr ClusterSize size = kClusterSizes[i];
    if (padded == size.padded && plan.cluster == size.cluster) {
      result = start_any<Kind, Cell, T, size.padded, size.cluster>(args, stream, kernel);
    }
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    (attempt(std::integral_constant<size_t, i>{}), ...);
  }(std::make_index_sequence<std::size(kClusterSizes)>{});
  return result == kStarted ? nullptr : result;
}

template <class Cell, class T, int kPadded, int kCluster, int kTiles>
using ForwardKind = ClusterForward<Cell, T, kPadded, kCluster, kTiles>;

}  // namespace cluster

template <class Cell, class T>
const char* ClusterKernels<Cell, T>::forward(const Plan& plan, const Forward& args, Stream stream) {
  return cluster::choose<cluster::ForwardKind, Cell, T>(
      plan, args, stream, []<class Shape>(std::type_identity<Shape>) { return &cluster_forward<Shape>; });
}

template <class Cell, class T>
const char* ClusterKernels<Cell, T>::backward(const Plan& plan, const Backward& args, Stream stream) {
  return cluster::choose<ClusterBackward, Cell, T>(
      plan, args, stream, []<class Shape>(std::type_identity<Shape>) { return &cluster_backward<Shape>; });
}

}  // namespace seqattn::gpu
