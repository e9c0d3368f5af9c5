#include "plan.h"

#include <iterator>
#include <stdexcept>

#include "../cells/registry.h"

namespace seqattn::gpu {
namespace {

void check(const PlanRequest& r, const Device& d) {
  const auto positive = [](const char* name, int64_t value) {
    if (value < 1) {
      throw std::invalid_argument(std::string(name) + ": expected a positive number, got " + std::to_string(value));
    }
  };
  positive("hidden", r.hidden);
  positive("sm", d.sm);
  positive("sm_count", d.sm_count);
  positive("smem_per_block", d.smem_per_block);
  positive("max_cluster", d.max_cluster);
  if (r.batch < 0) throw std::invalid_argument("batch: expected 0 or more, got " + std::to_string(r.batch));
  if (r.directions < 1 || r.directions > 2) {
    throw std::invalid_argument("directions: expected 1 or 2, got " + std::to_string(r.directions));
  }
}

}  // namespace

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kCluster:
      return "cluster";
    case Kernel::kCooperative:
      return "cooperative";
    case Kernel::kStepwise:
      break;
  }
  return "stepwise";
}

int cell_number(const std::string& name) {
  int number = 0;
#define SEQATTN_TRY(Cell)                 \
  if (name == Cell::kName) return number; \
  ++number;
  SEQATTN_FOR_EACH_CELL(SEQATTN_TRY)
#undef SEQATTN_TRY
  throw std::invalid_argument("cell: expected a name of the registry, got '" + name + "'");
}

DType dtype_number(const std::string& name) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16"};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return DType(i);
  }
  throw std::invalid_argument("dtype: expected 'float64', 'float32', 'bfloat16' or 'float16', got '" + name + "'");
}

Plan plan_recurrence(const PlanRequest& request, const Device& device) {
  check(request, device);
  Plan stepwise;
  if (request.batch == 0) {
    stepwise.why_not = "there is nothing to do";
  } else if (request.projected) {
    stepwise.why_not = "the persistent kernels take no projection";
  } else if (request.dtype == DType::kFloat64) {
    stepwise.why_not = "the persistent kernels take no float64";
  } else if (request.dtype == DType::kFloat32 && !request.allow_tf32) {
    stepwise.why_not = "the persistent kernels round products of float32 to tf32, which isn't allowed";
  }
  if (!stepwise.why_not.empty()) return stepwise;
  Plan cluster = plan_cluster(request, device);
  if (cluster.kernel != Kernel::kStepwise) return cluster;
  Plan cooperative = plan_cooperative(request, device);
  if (cooperative.kernel != Kernel::kStepwise) return cooperative;
  stepwise.why_not = "cluster: " + cluster.why_not + "; cooperative: " + cooperative.why_not;
  return stepwise;
}

}  // namespace seqattn::gpu
