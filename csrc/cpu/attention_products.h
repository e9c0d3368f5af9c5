// Batched matrix products of CPU tensors by torch's C functions: an operator's results have its own dtype, and these
// are never under autocast.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "attention_problem.h"

namespace seqattn {

// a [B, M, N] times b [B, N, D], of any strides.
inline Tensor product(const Tensor& a, const Tensor& b) {
  Tensor out = allocate(a, {a.size(0), a.size(1), b.size(2)});
  if (aoti_torch_cpu_bmm_out(out.get(), a.get(), b.get()) != AOTI_TORCH_SUCCESS) {
    fail("a product of ", shape_of(a), " and ", shape_of(b), " failed");
  }
  return out;
}

// A view of three dimensions.
template <class T>
struct View3 {
  T* data;
  int64_t stride[3];
  explicit View3(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())), stride{t.stride(0), t.stride(1), t.stride(2)} {}
  T* at(int64_t i, int64_t j) const { return data + i * stride[0] + j * stride[1]; }
};

// What sums of products of this type are kept in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
bool all_finite(const T* x, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::abs(Wide<T>(x[i])) <= std::numeric_limits<Wide<T>>::max();
  return finite;
}

// `product` in which an element of b that meets a zero of a contributes nothing, even if it is not finite.
//
// The product is torch's. What is not finite in b leaves its mark on every row of the result, so that looking at the
// smaller of the two suffices, and only rows that bear a mark are computed again.
template <class T>
Tensor contained_product(const Tensor& a, const Tensor& b) {
  Tensor out = product(a, b);
  const int64_t M = a.size(1), N = a.size(2), D = b.size(2), rows = a.size(0) * M;
  if (!out.numel() || !N) return out;
  if (b.numel() < out.numel() && all_finite(data_of<const T>(dense(b)), b.numel())) return out;
  const View3<const T> x(a), y(b);
  constexpr int64_t kRowsPerThread = 1 << 14;  // elements to look at
  const int threads = int(std::min<int64_t>(rows * D / kRowsPerThread + 1, torch::stable::get_num_threads()));
  Queue queue(rows, threads);
  Scratch<Wide<T>> scratch(threads * D);
  run_gang(threads, [&](Gang& gang) {
    Wide<T>* sums = scratch.get() + gang.rank * D;
    queue.drain([&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* result = data_of<T>(out) + row * D;
        if (all_finite(result, D)) continue;
        const T* weights = x.at(row / M, row % M);
        std::fill_n(sums, D, Wide<T>(0));
        for (int64_t n = 0; n < N; ++n) {
          const Wide<T> w(weights[n * x.stride[2]]);
          if (w == 0) continue;
          const T* from = y.at(row / M, n);
          for (int64_t d = 0; d < D; ++d) sums[d] += w * Wide<T>(from[d * y.stride[2]]);
        }
        for (int64_t d = 0; d < D; ++d) result[d] = T(sums[d]);
      }
    });
  });
  return out;
}

}  // namespace seqattn
