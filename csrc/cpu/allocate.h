// Results on a CPU, uninitialised. torch's C shim hands them out in a third of the time that the operator
// aten::new_empty takes, which a single step of a cell notices; but without that operator's filling in deterministic
// mode, which tests rely on. They set `poison_allocations` for it: every byte is then 0xff, a NaN of any floating type.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <vector>

#include "../checks.h"

namespace seqattn {

inline bool poison_allocations = false;

// A contiguous CPU tensor; dtype as the shim numbers them.
inline torch::stable::Tensor allocate(int32_t dtype, const int64_t* shape, int64_t rank) {
  constexpr int64_t kMostDims = 8;
  if (rank > kMostDims) fail("shape: expected at most ", kMostDims, " dimensions, got ", rank);
  int64_t strides[kMostDims], values = 1;
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = values > 0 ? values : 1;
    values *= shape[i];
  }
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(rank, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) !=
      AOTI_TORCH_SUCCESS) {
    fail("no memory for a result of ", values, " values");
  }
  torch::stable::Tensor t(handle);
  if (poison_allocations) {
    int64_t bytes = 0;
    if (aoti_torch_get_storage_size(handle, &bytes) != AOTI_TORCH_SUCCESS) fail("a new tensor has no storage");
    if (bytes) std::memset(t.data_ptr(), 0xff, size_t(bytes));
  }
  return t;
}

// The same of `like`'s dtype.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, const int64_t* shape, int64_t rank) {
  int32_t dtype;
  if (aoti_torch_get_dtype(like.get(), &dtype) != AOTI_TORCH_SUCCESS) fail("a tensor has no dtype");
  return allocate(dtype, shape, rank);
}

inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape) {
  return allocate(like, shape.begin(), int64_t(shape.size()));
}

inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, const std::vector<int64_t>& shape) {
  return allocate(like, shape.data(), int64_t(shape.size()));
}

}  // namespace seqattn
