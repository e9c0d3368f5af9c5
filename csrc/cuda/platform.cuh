// All that kernels know of the hardware, behind named functions of namespace seqattn::gpu. nvcc gets inline PTX
// (platform/*.cuh); any other compiler gets the emulator (../emulator/), which runs one fiber for each thread on the
// CPU and reports races, accesses out of bounds, reads of uninitialised shared memory and barriers that part of a block
// misses. Kernels include this header, recurrence.h and ../cells/ alone.
//
// What a kernel must do so that both can run it:
//   - define itself as  template <...> SEQATTN_KERNEL(max_threads) name(SEQATTN_KERNEL_PARAM Args args) { ... }
//     and its helpers as SEQATTN_DEVICE functions; start with launch(name<...>, Launch{...}, stream, args)
//   - blocks are one-dimensional and whole warps; operations of a warp are called by all of its lanes
//   - reach shared memory through Shared<T> (a raw pointer in nvcc) from dynamic_shared() or shared_array(), and a
//     peer's through Remote<T>; change the type with shared_cast<U>(p)
//   - reach global memory that blocks exchange during a kernel through Global<T> (a raw pointer in nvcc) or the named
//     loads and stores; memory that is only read or only written may use plain pointers
//   - spin only in the loops of barrier_wait, grid_wait, or around load_acquire
// A plain `auto v = shared[i]` makes a reference in the emulator and a value in nvcc: write the type, or load(p).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include "platform/types.cuh"
//
#include "platform/launch.cuh"
#include "platform/matrix.cuh"
#include "platform/memory.cuh"
#include "platform/sync.cuh"
#else
#include "../emulator/platform.h"
#endif

#include "platform/common.cuh"
