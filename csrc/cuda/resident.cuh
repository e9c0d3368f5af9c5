// How many clusters of a kernel a device holds at once, for those that decide by it how a batch is split.
#pragma once

#include <atomic>

#include "platform.cuh"

namespace seqattn::gpu {

// Of one kernel and shape, static where it is launched: asked once for each device, since it takes longer than a
// launch.
class Resident {
 public:
  template <class Kernel>
  int clusters(Kernel kernel, const Launch& launch) {
    const int device = current_device();
    if (device >= kDevices) return resident_clusters(kernel, launch);
    int count = known_[device].load(std::memory_order_relaxed);  // one more, so that 0 is not known
    if (count == 0) {
      count = resident_clusters(kernel, launch) + 1;
      known_[device].store(count, std::memory_order_relaxed);
    }
    return count - 1;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices] = {};
};

}  // namespace seqattn::gpu
