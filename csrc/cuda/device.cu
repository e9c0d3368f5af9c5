// What the launcher asks the CUDA runtime.
#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

#include "plan.h"
#include "stepwise.h"

namespace seqattn::gpu {
namespace {

constexpr int kMostDevices = 64;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "CUDA device properties");
  return value;
}

Device describe(int index) {
  Device d{};
  d.sm = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  d.sm_count = attribute(cudaDevAttrMultiProcessorCount, index);
  d.smem_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  // The code with clusters is built for these two alone; others run what is built for sm_80.
  d.max_cluster = d.sm == 90 || d.sm == 100 ? 16 : 1;
  return d;
}

}  // namespace

const Device& device_of(int index) {
  static std::array<Device, kMostDevices> devices;
  static std::array<std::once_flag, kMostDevices> known;
  if (index < 0 || index >= kMostDevices) throw std::runtime_error("device: expected a CUDA device below 64");
  std::call_once(known[index], [&] { devices[index] = describe(index); });
  return devices[index];
}

void clear(void* to, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(to, 0, size_t(bytes), static_cast<cudaStream_t>(stream)), "clearing CUDA memory");
}

}  // namespace seqattn::gpu
