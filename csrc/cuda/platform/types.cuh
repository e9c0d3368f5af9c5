// Qualifiers, number types, pointers and indices, for nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A kernel's head, with __launch_bounds__: SEQATTN_KERNEL(threads) or SEQATTN_KERNEL(threads, blocks an SM).
#define SEQATTN_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
// Before a kernel's parameter passed by value: kept in constant memory, never copied to the stack.
#define SEQATTN_KERNEL_PARAM const __grid_constant__
#define SEQATTN_DEVICE __device__ __forceinline__
#define SEQATTN_UNROLL _Pragma("unroll")
#define SEQATTN_PRAGMA(x) _Pragma(#x)
#define SEQATTN_UNROLL_BY(n) SEQATTN_PRAGMA(unroll n)

// Clusters, mbarrier transactions and st.async exist from sm_90 on. A kernel with them compiles for older ones as a
// trap; launch() refuses to start it there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SEQATTN_HAVE_CLUSTERS 1
#else
#define SEQATTN_HAVE_CLUSTERS 0
#endif

namespace seqattn::gpu {

using bfloat16 = __nv_bfloat16;
using half = __half;

// Pointers into this block's shared memory, and into global memory that blocks exchange. The emulator checks both.
template <class T>
using Shared = T*;
template <class T>
using Global = T*;

// Pointer into shared memory of a block of the cluster (from map_shared). Arithmetic counts elements.
template <class T>
struct Remote {
  uint32_t address;
  SEQATTN_DEVICE Remote operator+(int64_t n) const { return {address + static_cast<uint32_t>(n * sizeof(T))}; }
};

SEQATTN_DEVICE float to_float(float x) { return x; }
SEQATTN_DEVICE float to_float(half x) { return __half2float(x); }
SEQATTN_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
SEQATTN_DEVICE T from_float(float x);
template <>
SEQATTN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
SEQATTN_DEVICE half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
SEQATTN_DEVICE bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two 16-bit numbers in a register, `low` in the low half: what mma fragments are made of.
template <class T>
SEQATTN_DEVICE uint32_t pack(float low, float high);
template <>
SEQATTN_DEVICE uint32_t pack<half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
SEQATTN_DEVICE uint32_t pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// The bits of x rounded to tf32 (nearest, ties away from zero), as mma_m16n8k8 takes them.
SEQATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
SEQATTN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
SEQATTN_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

SEQATTN_DEVICE int thread_index() { return threadIdx.x; }
SEQATTN_DEVICE int block_size() { return blockDim.x; }
SEQATTN_DEVICE int block_index() { return blockIdx.x; }
SEQATTN_DEVICE int block_index_y() { return blockIdx.y; }
SEQATTN_DEVICE int block_index_z() { return blockIdx.z; }
SEQATTN_DEVICE int grid_size() { return gridDim.x; }
SEQATTN_DEVICE int grid_size_y() { return gridDim.y; }
SEQATTN_DEVICE int grid_size_z() { return gridDim.z; }
SEQATTN_DEVICE int lane_index() { return threadIdx.x & 31; }
// The same in all lanes, and known as such to the compiler.
SEQATTN_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0); }

// This block's number in its cluster, and the cluster's number of blocks. Clusters lie along x.
SEQATTN_DEVICE int cluster_rank() {
#if SEQATTN_HAVE_CLUSTERS
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
#else
  return 0;
#endif
}
SEQATTN_DEVICE int cluster_size() {
#if SEQATTN_HAVE_CLUSTERS
  uint32_t r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return static_cast<int>(r);
#else
  return 1;
#endif
}

// x, but the compiler no longer knows where it comes from: it stays in a register, where it would be computed again at
// each use.
SEQATTN_DEVICE int keep(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ex2.approx and rcp.approx: relative error about 2^-22; tanh.approx: about 2^-11.
SEQATTN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEQATTN_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEQATTN_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace seqattn::gpu
