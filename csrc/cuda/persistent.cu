#include "../cells/registry.h"
#include "persistent_launch.h"

namespace seqattn::gpu {
namespace {

template <class Cell, class Run>
const char* with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(PersistentKernels<Cell, float>{});
    case DType::kBFloat16:
      return run(PersistentKernels<Cell, bfloat16>{});
    case DType::kFloat16:
      return run(PersistentKernels<Cell, half>{});
    case DType::kFloat64:
      break;
  }
  return "the persistent kernels take no float64";
}

template <class Run>
const char* with_kernels(int cell, DType dtype, Run run) {
  int number = 0;
#define SEQATTN_TRY(Cell) \
  if (cell == number++) return with_type<Cell>(dtype, run);
  SEQATTN_FOR_EACH_CELL(SEQATTN_TRY)
#undef SEQATTN_TRY
  return "no such cell";
}

}  // namespace

const char* persistent_forward(const Plan& plan, const Forward& args, void* workspace, void* stream) {
  return with_kernels(args.cell, args.dtype, [&](auto kernels) {
    return decltype(kernels)::forward(plan, args, workspace, static_cast<Stream>(stream));
  });
}

const char* persistent_backward(const Plan& plan, const Backward& args, void* workspace, void* stream) {
  return with_kernels(args.cell, args.dtype, [&](auto kernels) {
    return decltype(kernels)::backward(plan, args, workspace, static_cast<Stream>(stream));
  });
}

}  // namespace seqattn::gpu
