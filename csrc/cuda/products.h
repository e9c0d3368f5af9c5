// Matrix products through torch, on views of raw memory. They run on torch's current stream, and never under autocast.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

// Not every torch since 2.10 has it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_dtype_out(AtenTensorHandle out,
                                                                             AtenTensorHandle self,
                                                                             AtenTensorHandle mat2, int32_t out_dtype);

namespace seqattn::gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// After a call of torch's C functions. The macro's name depends on torch's version.
inline void check(AOTITorchError error) {
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
  STABLE_TORCH_ERROR_CODE_CHECK(error);
#else
  TORCH_ERROR_CODE_CHECK(error);
#endif
}

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

  Tensor view(const Matrix& m) const { return view_as(m, type_); }
  Tensor view_sum(const Matrix& m) const { return view_as(m, sum_type_); }

  // out = a b in the tensors' type.
  void multiply(const Tensor& out, const Tensor& a, const Tensor& b) const {
    if (out.dim() == 3) {
      check(aoti_torch_cuda_bmm_out(out.get(), a.get(), b.get()));
    } else {
      check(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
    }
  }

  // out += a b
  void accumulate(const Tensor& out, const Tensor& a, const Tensor& b) const {
    check(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  }

  // out = a b, where `out` has the type of sums.
  void multiply_to_sum(const Tensor& out, const Tensor& a, const Tensor& b) const {
    if (type_ == sum_type_) return multiply(out, a, b);
    if (out.dim() == 2 && &aoti_torch_cuda_mm_dtype_out != nullptr) {
      const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(sum_type_));
      return check(aoti_torch_cuda_mm_dtype_out(out.get(), a.get(), b.get(), code));
    }
    std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                      torch::stable::detail::from(sum_type_), torch::stable::detail::from(out)};
    check(
        torch_call_dispatcher(out.dim() == 3 ? "aten::bmm" : "aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that the call returned
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
