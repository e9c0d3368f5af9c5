// What the launcher asks of torch about the device. With SEQATTN_EMULATED, in tests alone, the device is the CPU and
// kernels run in the emulator: the launcher itself is tested where there is no GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#if defined(SEQATTN_EMULATED)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define SEQATTN_SHIM(name) aoti_torch_cpu_##name
#if !defined(SEQATTN_LIBRARY)
#define SEQATTN_LIBRARY seqattn_emulated
#endif
#define SEQATTN_DISPATCH_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define SEQATTN_SHIM(name) aoti_torch_cuda_##name
#define SEQATTN_LIBRARY seqattn
#define SEQATTN_DISPATCH_KEY CUDA

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
// Not every torch since 2.10 has it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_dtype_out(AtenTensorHandle out,
                                                                             AtenTensorHandle self,
                                                                             AtenTensorHandle mat2, int32_t out_dtype);
#endif

namespace seqattn::gpu {

using torch::stable::Tensor;

// After a call of torch's C functions. The macro's name depends on torch's version.
inline void check(AOTITorchError error) {
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
  STABLE_TORCH_ERROR_CODE_CHECK(error);
#else
  TORCH_ERROR_CODE_CHECK(error);
#endif
}

#if defined(SEQATTN_EMULATED)
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
inline void* current_stream(int) { return nullptr; }
#else
using torch::stable::accelerator::DeviceGuard;
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
inline void* current_stream(int device_index) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}
#endif

}  // namespace seqattn::gpu
