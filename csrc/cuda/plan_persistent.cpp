// Plans of the persistent kernels (persistent_shapes.h has their sizes).
#include <algorithm>
#include <cstdint>

#include "../cells/registry.h"
#include "persistent_shapes.h"
#include "plan.h"

namespace seqattn::gpu {
namespace {

struct CellSize {
  const char* name;
  int gates, slots;
};
#define SEQATTN_CELL_SIZE(Cell) {Cell::kName, Cell::kGates, Cell::kSlots},
constexpr CellSize kCells[] = {SEQATTN_FOR_EACH_CELL(SEQATTN_CELL_SIZE)};
#undef SEQATTN_CELL_SIZE

Plan refused(std::string why_not) {
  Plan plan;
  plan.why_not = std::move(why_not);
  return plan;
}

}  // namespace

Plan plan_cluster(const PlanRequest& request, const Device& device) {
  if (device.max_cluster < 2) return refused("the device has no thread-block clusters");
  const bool full = request.dtype == DType::kFloat32;
  if (full && !request.allow_tf32) {
    return refused("products of float32 would be rounded to tf32, which isn't allowed");
  }
  const CellSize cell = kCells[request.cell];
  int largest = 0;
  for (const ClusterSize& size : kClusterSizes) {
    ClusterShape shape{cell.gates, cell.slots, full ? 4 : 2, size.padded, size.cluster, 1};
    if (size.cluster > device.max_cluster || !shape.fits(device.smem_per_block)) continue;
    largest = size.padded;
    if (size.padded < request.hidden) continue;
    const ClusterBatch batch =
        cluster_batch(shape, request.batch, std::max(1, device.sm_count / size.cluster / request.directions));
    shape.tiles = batch.tiles;
    Plan plan;
    plan.kernel = Kernel::kCluster;
    plan.cluster = size.cluster;
    plan.clusters = static_cast<int>(batch.clusters);
    plan.rows_per_block = shape.units();
    plan.warps = shape.warps();
    plan.batch_columns = batch.columns;
    plan.smem_bytes = request.backward ? shape.backward_shared_bytes() : shape.forward_shared_bytes();
    plan.weight_registers =
        request.backward ? shape.backward_held() * shape.row_tiles() * 8 : shape.forward_held() * cell.gates * 8;
    return plan;
  }
  return refused("hidden: a cluster of this device holds the weights of at most " + std::to_string(largest) +
                 " units of " + cell.name + ", got " + std::to_string(request.hidden));
}

Plan plan_cooperative(const PlanRequest&, const Device&) { return refused("not written yet"); }

}  // namespace seqattn::gpu
