// Checks that name the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace seqattn {

inline std::string shape_of(const torch::stable::Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  throw std::runtime_error(out.str());
}

// `t` must be a CPU tensor of this dtype and shape (-1: any size) whose last dimension has stride 1.
inline void check_tensor(const char* name, const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype,
                         const int64_t* shape, int64_t rank) {
  bool same = t.dim() == rank;
  for (int64_t i = 0; same && i < rank; ++i) same = shape[i] < 0 || t.size(i) == shape[i];
  if (!same) {
    std::ostringstream expected;
    for (int64_t i = 0; i < rank; ++i) {
      if (i) expected << ", ";
      if (shape[i] < 0) {
        expected << '*';
      } else {
        expected << shape[i];
      }
    }
    fail(name, ": expected shape [", expected.str(), "], got ", shape_of(t));
  }
  if (t.scalar_type() != dtype) fail(name, ": expected the dtype of the input, got another one");
  if (!t.is_cpu()) fail(name, ": expected a CPU tensor");
  if (rank && t.size(-1) > 1 && t.stride(-1) != 1) fail(name, ": expected a last dimension of stride 1");
}

inline void check_tensor(const char* name, const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  check_tensor(name, t, dtype, shape.begin(), int64_t(shape.size()));
}

inline void check_tensor(const char* name, const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype,
                         const std::vector<int64_t>& shape) {
  check_tensor(name, t, dtype, shape.data(), int64_t(shape.size()));
}

}  // namespace seqattn
