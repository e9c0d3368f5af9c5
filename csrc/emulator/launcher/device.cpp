// What device.cu asks of the CUDA runtime, for the launcher on the emulator: an H200, unless a test says otherwise.
#include <cstring>

#include "../../cuda/plan.h"
#include "../../cuda/stepwise.h"

namespace seqattn::gpu {
namespace {

Device device{90, 132, 227 * 1024, 16};

}  // namespace

const Device& device_of(int) { return device; }

void clear(void* to, int64_t bytes, void*) { std::memset(to, 0, size_t(bytes)); }

}  // namespace seqattn::gpu

extern "C" __attribute__((visibility("default"))) void seqattn_set_device(int sm, int sm_count, int smem_per_block,
                                                                          int max_cluster) {
  seqattn::gpu::device = {sm, sm_count, smem_per_block, max_cluster};
}
