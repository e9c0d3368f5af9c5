// Starting kernels, for nvcc. Errors become exceptions that say what was asked for; none is left behind in the runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace seqattn::gpu {

using Stream = cudaStream_t;

// Shape of a launch: blocks along x, y, z; threads of a block; blocks of a cluster (along x; 1 for none); bytes of
// dynamic shared memory; whether all blocks must be resident at once (for grid barriers).
struct Launch {
  int grid = 1, grid_y = 1, grid_z = 1;
  int block = 32;
  int cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

inline std::string to_string(const Launch& l) {
  const auto n = [](auto v) { return std::to_string(v); };
  return "grid " + n(l.grid) + "x" + n(l.grid_y) + "x" + n(l.grid_z) + ", block " + n(l.block) + ", cluster " +
         n(l.cluster) + ", " + n(l.shared_bytes) + " bytes of shared memory" + (l.cooperative ? ", cooperative" : "");
}

inline void check_launch(cudaError_t error, const Launch& l) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("CUDA kernel (" + to_string(l) + "): " + cudaGetErrorString(error));
}

// Lets the kernel use the shared memory and cluster size of `l`.
template <class... P>
void allow(void (*kernel)(P...), const Launch& l) {
  const void* f = reinterpret_cast<const void*>(kernel);
  if (l.shared_bytes > 48 * 1024) {
    check_launch(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared_bytes)),
                 l);
  }
  if (l.cluster > 8) check_launch(cudaFuncSetAttribute(f, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), l);
}

inline cudaLaunchConfig_t configuration(const Launch& l, Stream stream, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid, l.grid_y, l.grid_z);
  config.blockDim = dim3(l.block);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (l.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = l.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (l.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  return config;
}

// Starts kernel(args...) on the stream; throws std::runtime_error. An empty grid starts nothing.
template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& l, Stream stream, A&&... args) {
  if (l.grid == 0 || l.grid_y == 0 || l.grid_z == 0) return;
  allow(kernel, l);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(l, stream, attributes);
  check_launch(cudaLaunchKernelEx(&config, kernel, static_cast<A&&>(args)...), l);
}

// Index of the device that launches go to.
inline int current_device() {
  int device = 0;
  check_launch(cudaGetDevice(&device), Launch{});
  return device;
}

// How many clusters of this launch the device holds at once; 0 where none fits.
template <class... P>
int resident_clusters(void (*kernel)(P...), const Launch& l) {
  allow(kernel, l);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(l, nullptr, attributes);
  int clusters = 0;
  check_launch(cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &config), l);
  return clusters;
}

// How many blocks of this launch one SM holds at once.
template <class... P>
int resident_blocks(void (*kernel)(P...), const Launch& l) {
  allow(kernel, l);
  int blocks = 0;
  check_launch(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), l.block,
                                                             l.shared_bytes),
               l);
  return blocks;
}

}  // namespace seqattn::gpu
