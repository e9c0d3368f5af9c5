// The cluster kernels of a cell and an element type: each is compiled by itself (cluster_<cell>_<type>.cu).
#pragma once

#include "plan.h"
#include "platform.cuh"
#include "recurrence.h"

namespace seqattn::gpu {

// Start the kernel that a plan asks for. Null on success, else why nothing was started.
template <class Cell, class T>
struct ClusterKernels {
  static const char* forward(const Plan& plan, const Forward& args, Stream stream);
  static const char* backward(const Plan& plan, const Backward& args, Stream stream);
};

}  // namespace seqattn::gpu
