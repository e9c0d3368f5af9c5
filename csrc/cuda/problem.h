// What forward and backward of the CUDA operators share: checked arguments, rows, memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "plan.h"
#include "products.h"
#include "recurrence.h"
#include "tensors.h"

namespace seqattn::gpu {

enum CallerLayout : int64_t { kTimeMajor = 0, kBatchFirst = 1, kPackedRows = 2 };

struct Sizes {
  int64_t input, hidden, output;
  bool projected;
};

// The parts of a reserve: one tensor of bytes. Null parts are not there.
struct Reserve {
  void *saved = nullptr, *cells = nullptr, *h_prev = nullptr, *unprojected = nullptr;
};

class Problem {
 public:
  Problem(int64_t cell, const Tensor& input, const OptionalTensor& sizes, int64_t layout,
          const std::vector<Tensor>& weights, bool has_bias, bool allow_tf32);

  int number;
  const CellInfo& cell;
  DType dtype;
  ScalarType type, sum_type;
  int64_t item, sum_item;  // bytes of T and R
  bool has_bias, allow_tf32;
  Sizes sizes{};
  int directions;
  int64_t layout;
  Rows rows{};
  Tensor input;
  std::vector<Tensor> weights;

  void* stream() const;
  Products products() const { return {input.device(), type, sum_type}; }
  // Whether input and output lie in another order than the internal rows.
  bool reordered() const { return layout == kBatchFirst && rows.steps > 1 && rows.batch > 1; }

  size_t stride() const { return weights.size() / directions; }
  const Tensor& weight(int direction, size_t i) const { return weights[direction * stride() + i]; }
  void* weight_data(int direction, size_t i) const { return const_cast<void*>(weight(direction, i).const_data_ptr()); }

  Tensor make(const std::vector<int64_t>& shape) const;
  Tensor make_sum(const std::vector<int64_t>& shape) const;
  Tensor make_bytes(int64_t bytes) const;
  // Shape of the output (columns: all directions together).
  std::vector<int64_t> rows_shape(int64_t columns) const;

  // Null, or the data of a contiguous tensor of this shape, the input's dtype and device.
  void* checked(const char* name, const OptionalTensor& t, const std::vector<int64_t>& shape) const;

  int64_t reserve_bytes() const;
  Reserve reserve(void* bytes) const;

  // W_hh (W_hr) of all directions as one batch of matrices.
  Matrix recurrent_weight(bool projection = false);

 private:
  void read_weights();
  void read_rows(const OptionalTensor& sizes);
  void read_packed(const OptionalTensor& sizes);
  void read_lengths(const Tensor& lengths);
  Tensor allocate(const std::vector<int64_t>& shape, ScalarType scalar_type, int64_t bytes_each) const;
  // Bytes of all parts; fills in `reserve`, whose parts begin at `bytes`, unless it is null.
  int64_t parts(Reserve* reserve, char* bytes) const;

  Tensor row_data_;              // what rows_ points to
  std::vector<Tensor> stacked_;  // weights of both directions side by side
};

}  // namespace seqattn::gpu
