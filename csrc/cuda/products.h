// Matrix products through torch, on views of raw memory. They run on torch's current stream, and never under autocast.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "torch_device.h"

namespace seqattn::gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix (or a batch of them) in memory that somebody else keeps alive until the stream has passed.
struct Matrix {
  void* data;
  int64_t rows, columns, ld;  // ld: values from one row to the next
  bool transposed = false;    // seen as columns x rows
  int64_t batch = 1, batch_stride = 0;
};

inline Matrix transpose(Matrix m) {
  m.transposed = !m.transposed;
  return m;
}

class Products {
 public:
  Products(torch::stable::Device device, ScalarType type, ScalarType sum_type)
      : device_(device), type_(type), sum_type_(sum_type) {}

  Tensor view_of(const Matrix& m, ScalarType type) const { return view_as(m, type); }
  Tensor view(const Matrix& m) const { return view_as(m, type_); }
  Tensor view_sum(const Matrix& m) const { return view_as(m, sum_type_); }

  // out = a b in the tensors' type.
  void multiply(const Tensor& out, const Tensor& a, const Tensor& b) const {
    if (out.dim() == 3) {
      check(SEQATTN_SHIM(bmm_out)(out.get(), a.get(), b.get()));
    } else {
      check(SEQATTN_SHIM(mm_out)(out.get(), a.get(), b.get()));
    }
  }

  // out += a b
  void accumulate(const Tensor& out, const Tensor& a, const Tensor& b) const {
    check(SEQATTN_SHIM(addmm_out)(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  }

  // out = a b, where `out` has the type of sums.
  void multiply_to_sum(const Tensor& out, const Tensor& a, const Tensor& b) const {
    if (a.scalar_type() == sum_type_) return multiply(out, a, b);
#if defined(SEQATTN_EMULATED)  // no such product on a CPU
    multiply(out, torch::stable::to(a, sum_type_), torch::stable::to(b, sum_type_));
#else
    if (out.dim() == 2 && &aoti_torch_cuda_mm_dtype_out != nullptr) {
      const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(sum_type_));
      return check(aoti_torch_cuda_mm_dtype_out(out.get(), a.get(), b.get(), code));
    }
    std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                      torch::stable::detail::from(sum_type_), torch::stable::detail::from(out)};
    check(
        torch_call_dispatcher(out.dim() == 3 ? "aten::bmm" : "aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that the call returned
#endif
  }

 private:
  Tensor view_as(const Matrix& m, ScalarType type) const {
    std::vector<int64_t> sizes{m.rows, m.columns}, strides{m.ld, 1};
    if (m.transposed) {
      std::swap(sizes[0], sizes[1]);
      std::swap(strides[0], strides[1]);
    }
    if (m.batch > 1) {
      sizes.insert(sizes.begin(), m.batch);
      strides.insert(strides.begin(), m.batch_stride);
    }
    return torch::stable::from_blob(m.data, sizes, strides, device_, type);
  }

  torch::stable::Device device_;
  ScalarType type_, sum_type_;
};

}  // namespace seqattn::gpu
