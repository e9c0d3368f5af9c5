// What the launchers of recurrent operators share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <iterator>
#include <optional>

#include "../cells/registry.h"
#include "../checks.h"

namespace seqattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct CellInfo {
  const char* name;
  int gates, slots, saved;
  bool has_cell;
};

#define SEQATTN_INFO(Cell) {Cell::kName, Cell::kGates, Cell::kSlots, Cell::kSaved, Cell::kHasCell},
inline constexpr CellInfo kCells[] = {SEQATTN_FOR_EACH_CELL(SEQATTN_INFO)};
#undef SEQATTN_INFO

inline const CellInfo& cell_info(int64_t cell) {
  if (cell < 0 || cell >= int64_t(std::size(kCells))) fail("cell: expected a number of the registry, got ", cell);
  return kCells[cell];
}

template <class T>
constexpr ScalarType dtype_of() {
  return sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
}

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// Calls f with a value of the tensor's type.
template <class F>
auto with_dtype(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    default:
      fail("input: expected float32 or float64, got another dtype");
  }
}

}  // namespace seqattn
