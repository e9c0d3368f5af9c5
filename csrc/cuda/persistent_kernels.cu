// The persistent kernels of one cell and one element type: units.py has this compiled once for each pair of them.
#include "persistent_launch.cuh"

namespace seqattn::gpu {

template struct PersistentKernels<SEQATTN_UNIT_CELL, SEQATTN_UNIT_TYPE>;

}  // namespace seqattn::gpu
