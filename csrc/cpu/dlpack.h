// The part of DLPack's C ABI (1.3) that reads a tensor's memory from its Python object: torch's copy of the header
// can't be included beside the stable ABI.
#pragma once

#include <cstdint>

namespace seqattn::dlpack {

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr int32_t kCpu = 1;    // of Tensor::device_type
inline constexpr uint8_t kFloat = 2;  // of Tensor::code

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void (*unused[3])();
  // Fills *out, which is valid while the object is alive and unchanged; -1 with a Python exception where it can't.
  int (*tensor_from_object)(void* object, Tensor* out);
};

inline constexpr const char* kCapsule = "dlpack_exchange_api";  // Tensor.__dlpack_c_exchange_api__

}  // namespace seqattn::dlpack
