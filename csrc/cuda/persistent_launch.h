// The persistent kernels of a cell and an element type: each pair is compiled by itself (persistent_kernels.cu).
#pragma once

#include "plan.h"
#include "platform.cuh"
#include "recurrence.h"

namespace seqattn::gpu {

// Start the kernel that a plan asks for. Null on success, else why nothing was started.
template <class Cell, class T>
struct PersistentKernels {
  static const char* forward(const Plan& plan, const Forward& args, void* workspace, Stream stream);
  static const char* backward(const Plan& plan, const Backward& args, void* workspace, Stream stream);
};

}  // namespace seqattn::gpu
