// Checks of the tensors that CUDA operators are given: they name the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "../cpu/launch.h"
#include "torch_device.h"

namespace seqattn::gpu {

using OptionalTensor = std::optional<Tensor>;

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

inline std::string device_text(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : t.is_cpu() ? "cpu" : "another device";
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << ']';
  return out.str();
}

// `t` must lie where kernels can reach it.
inline void check_device(const char* name, const Tensor& t) {
  if (!on_device(t)) fail(name, ": expected a CUDA tensor, got one on ", device_text(t));
}

// `t` must have this shape and dtype, and lie on the device of `like`.
inline void check(const char* name, const Tensor& t, const Tensor& like, ScalarType type,
                  const std::vector<int64_t>& shape) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  if (!same) fail(name, ": expected shape ", shape_text(shape), ", got ", shape_of(t));
  if (t.scalar_type() != type) {
    fail(name, ": expected ", dtype_text(type), ", got ", dtype_text(t.scalar_type()));
  }
  if (!on_device(t) || t.get_device_index() != like.get_device_index()) {
    fail(name, ": expected device ", device_text(like), ", got ", device_text(t));
  }
}

// The data of such a tensor, which must be contiguous besides.
template <class P = void>
const P* whole(const char* name, const Tensor& t, const Tensor& like, ScalarType type,
               const std::vector<int64_t>& shape) {
  check(name, t, like, type, shape);
  if (!t.is_contiguous()) fail(name, ": expected a contiguous tensor");
  return static_cast<const P*>(t.const_data_ptr());
}

// Null where there is none.
template <class P = void>
const P* whole(const char* name, const OptionalTensor& t, const Tensor& like, ScalarType type,
               const std::vector<int64_t>& shape) {
  return t ? whole<P>(name, *t, like, type, shape) : nullptr;
}

}  // namespace seqattn::gpu
