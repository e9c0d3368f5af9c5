// Which kernel runs a recurrence on a GPU, and with what shape. Plain C++ without a CUDA header, so that the plans of
// every architecture are tested on any machine.
#pragma once

#include <cstdint>
#include <string>

#include "recurrence.h"

namespace seqattn::gpu {

enum class Kernel : int {
  kStepwise,     // a product and a kernel at each step: any size, any type
  kCooperative,  // all blocks of the GPU in one grid, weights resident, a grid barrier at each step
  kCluster,  // a thread-block cluster for a part of the batch, weights resident, h through distributed shared memory
};

struct Device {
  int sm;  // compute capability * 10: 80, 86, 90, 100
  int sm_count;
  int smem_per_block;  // bytes a block can have when it asks for them
  int max_cluster;     // blocks of the largest cluster that can be scheduled; 1 without clusters
};

// Of the device with this index; asked once.
const Device& device_of(int index);

struct PlanRequest {
  int cell;  // place in cells/registry.h
  int64_t hidden, batch;
  int directions;
  DType dtype;
  bool backward;
  bool projected;
  bool allow_tf32;
};

struct Plan {
  Kernel kernel = Kernel::kStepwise;
  int cluster = 1;         // blocks that share one set of weights
  int clusters = 1;        // such groups for each direction, each with its part of the batch
  int rows_per_block = 0;  // hidden units of a block; its weights have kGates times as many rows
  int warps = 0;
  int batch_columns = 0;     // sequences of a group
  int64_t smem_bytes = 0;    // dynamic shared memory of a block
  int weight_registers = 0;  // 32-bit registers of a thread that hold weights
  int64_t workspace_bytes = 0;
  std::string why_not;  // why no persistent kernel serves; empty where one does
};

// Plans of the persistent kernels: kernel is kStepwise and why_not says why where one can't serve.
Plan plan_cluster(const PlanRequest& request, const Device& device);
Plan plan_cooperative(const PlanRequest& request, const Device& device);

// The plan for this device: a persistent kernel where one fits, else stepwise with the reason in why_not.
Plan plan_recurrence(const PlanRequest& request, const Device& device);

// Sizes of an attentional decoder as DecoderForward (decoder.h) has them.
struct DecoderSizes {
  int cell;
  DType dtype;
  int64_t source, hidden, attention, value;
  int64_t filters = 0, channels = 0, window = 0;  // of the history that scores know of
};
// What an instance of the decoder kernel holds: padded H (and A) and D, both multiples of 128.
struct DecoderShape {
  int hidden, value;
};
inline constexpr DecoderShape kSmallDecoder{256, 512}, kLargeDecoder{512, 512};
inline constexpr int kDecoderCluster = 16;

// Bytes of shared memory a block takes, `parts` of which share a sequence's attention. decoder_forward.cuh lays it out.
constexpr int64_t decoder_shared_bytes(DecoderShape shape, int gates, int slots, int64_t source, int parts) {
  const int64_t warps = shape.hidden / 64;
  const int64_t state = 128 + (2 * shape.hidden + shape.value) * 16, sums = warps * 3 * (slots + 1) * 128 + 2 * 1024;
  const int64_t weights = warps * (shape.hidden + gates * shape.value) * 8;
  return state + sums + weights + (parts + 1) * ((source + 3) / 4 * 4) * 4 + warps * 1024;
}

// Of these for a history of weights: its channels and features.
constexpr int64_t decoder_history_bytes(int64_t source, int64_t filters, int64_t channels, int64_t window) {
  const int64_t keys = (source + 3) / 4 * 4, taps = (window + 3) / 4 * 4;
  return filters ? channels * (keys + taps) * 4 + filters * keys * 2 : 0;
}

// Why no cluster can run this decoder; empty where one can.
std::string decoder_why_not(const DecoderSizes& sizes, const Device& device);

// Names as Python has them; an unknown one throws std::invalid_argument.
const char* name_of(Kernel kernel);
int cell_number(const std::string& name);
DType dtype_number(const std::string& name);

}  // namespace seqattn::gpu
