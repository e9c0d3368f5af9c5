#include <algorithm>

#include "../cells/registry.h"
#include "plan.h"

namespace seqattn::gpu {

std::string decoder_why_not(const DecoderSizes& s, const Device& device) {
  if (device.max_cluster < kDecoderCluster) return "the decoder's kernel needs clusters of 16 blocks (sm_90, sm_100)";
  if (s.dtype != DType::kBFloat16 && s.dtype != DType::kFloat16) {
    return "the decoder's kernel takes bfloat16 and float16";
  }
  const auto at_most = [](const char* name, int64_t value, int64_t limit) {
    return value <= limit ? std::string()
                          : std::string("the decoder's kernel takes ") + name + " up to " + std::to_string(limit) +
                                ", got " + std::to_string(value);
  };
  for (const std::string& reason :
       {at_most("H", s.hidden, kLargeDecoder.hidden), at_most("A", s.attention, kLargeDecoder.hidden),
        at_most("D", s.value, kLargeDecoder.value)}) {
    if (!reason.empty()) return reason;
  }
  if (s.attention % 8 || s.value % 8 || s.attention == 0 || s.value == 0) {
    return "the decoder's kernel takes A and D that are multiples of 8";
  }
  if (s.source == 0) return "the decoder's kernel takes sources with keys";
  constexpr int kGates[] = {
#define SEQATTN_GATES(Cell) Cell::kGates,
      SEQATTN_FOR_EACH_CELL(SEQATTN_GATES)
#undef SEQATTN_GATES
  };
  constexpr int kSlots[] = {
#define SEQATTN_SLOTS(Cell) Cell::kSlots,
      SEQATTN_FOR_EACH_CELL(SEQATTN_SLOTS)
#undef SEQATTN_SLOTS
  };
  const bool small = std::max(s.hidden, s.attention) <= kSmallDecoder.hidden;
  const int64_t bytes =
      decoder_shared_bytes(small ? kSmallDecoder : kLargeDecoder, kGates[s.cell], kSlots[s.cell], s.source, 2) +
      decoder_history_bytes(s.source, s.filters, s.channels, s.window);
  if (bytes > device.smem_per_block) {
    const std::string with = s.filters ? " with " + std::to_string(s.filters) + " features" : "";
    return "the decoder's kernel has no room for the scores of " + std::to_string(s.source) + " keys" + with;
  }
  return {};
}

}  // namespace seqattn::gpu
