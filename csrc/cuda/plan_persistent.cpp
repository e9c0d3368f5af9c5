// Plans of the persistent kernels (persistent_shapes.h has their sizes).
#include <algorithm>
#include <cstdint>

#include "../cells/registry.h"
#include "persistent_shapes.h"
#include "plan.h"

namespace seqattn::gpu {
namespace {

struct NamedCell {
  const char* name;
  CellSize size;
};
#define SEQATTN_NAMED_CELL(Cell) \
  {Cell::kName, {Cell::kGates, Cell::kSlots, kept(Cell::kSaved, Cell::kHasCell), Cell::kHasCell}},
constexpr NamedCell kCells[] = {SEQATTN_FOR_EACH_CELL(SEQATTN_NAMED_CELL)};
#undef SEQATTN_NAMED_CELL

Plan refused(std::string why_not) {
  Plan plan;
  plan.why_not = std::move(why_not);
  return plan;
}

// The plan of a team size that fits, `teams` of which are there for each direction at once.
Plan accepted(Kernel kernel, const PlanRequest& request, const Device& device, TeamShape shape, int64_t teams) {
  const TeamBatch batch = team_batch(shape, request.batch, teams, device.smem_per_block);
  shape.tiles = batch.tiles;
  Plan plan;
  plan.kernel = kernel;
  plan.cluster = shape.blocks;
  plan.clusters = static_cast<int>(std::min<int64_t>(batch.teams, teams));
  plan.rows_per_block = shape.units();
  plan.warps = shape.warps();
  plan.batch_columns = batch.tiles * batch.columns;
  plan.smem_bytes = request.backward ? shape.backward_shared_bytes() : shape.forward_shared_bytes();
  plan.weight_registers =
      request.backward ? shape.backward_held() * shape.row_tiles() * 8 : shape.forward_held() * shape.cell.gates * 8;
  if (shape.grid) {
    const int64_t all = static_cast<int64_t>(request.directions) * plan.clusters;
    const int64_t rounds = (batch.teams + plan.clusters - 1) / plan.clusters;
    plan.workspace_bytes = GridWorkspace(all, batch.tiles, rounds).counter_bytes +
                           all * (request.backward ? shape.backward_exchange_bytes() : shape.forward_exchange_bytes());
  }
  return plan;
}

TeamShape shape_of(const PlanRequest& request, const TeamSize& size, bool grid) {
  return {kCells[request.cell].size, request.dtype == DType::kFloat32 ? 4 : 2, size.padded, size.blocks, 1, grid};
}

constexpr const char* kNeedsTf32 = "products of float32 would be rounded to tf32, which isn't allowed";

std::string too_large(const PlanRequest& request, const char* who, int largest) {
  const std::string cell = kCells[request.cell].name;
  if (largest == 0) return std::string(who) + " holds no weights of " + cell;
  return std::string("hidden: ") + who + " holds the weights of at most " + std::to_string(largest) + " units of " +
         cell + ", got " + std::to_string(request.hidden);
}

}  // namespace

Plan plan_cluster(const PlanRequest& request, const Device& device) {
  if (device.max_cluster < 2) return refused("the device has no thread-block clusters");
  // A part of a GPU (MIG) has clusters, and may have too few multiprocessors for one.
  if (device.sm_count < kClusterSizes[0].blocks) {
    return refused("the device has no room for a cluster: it has " + std::to_string(device.sm_count) +
                   " multiprocessors");
  }
  if (request.dtype == DType::kFloat32 && !request.allow_tf32) return refused(kNeedsTf32);
  int largest = 0;
  for (const TeamSize& size : kClusterSizes) {
    const TeamShape shape = shape_of(request, size, false);
    const int room = std::min(device.max_cluster, device.sm_count);
    if (size.blocks > room || !shape.fits(device.smem_per_block)) continue;
    largest = size.padded;
    if (size.padded < request.hidden) continue;
    const int teams = std::max(1, device.sm_count / size.blocks / request.directions);
    return accepted(Kernel::kCluster, request, device, shape, teams);
  }
  return refused(too_large(request, "a cluster of this device", largest));
}

Plan plan_cooperative(const PlanRequest& request, const Device& device) {
  if (device.sm < 80) return refused("needs compute capability 8.0");
  if (request.dtype == DType::kFloat32 && !request.allow_tf32) return refused(kNeedsTf32);
  int largest = 0;
  for (const TeamSize& size : kGridSizes) {
    const TeamShape shape = shape_of(request, size, true);
    const int teams = device.sm_count / size.blocks / request.directions;
    if (teams < 1 || !shape.fits(device.smem_per_block)) continue;
    largest = size.padded;
    if (size.padded >= request.hidden) return accepted(Kernel::kCooperative, request, device, shape, teams);
  }
  return refused(too_large(request, "this device", largest));
}

}  // namespace seqattn::gpu
