// Products of large matrices over all steps, for float32 with tf32 allowed through bfloat16.
#pragma once

#include <algorithm>
#include <vector>

#include "problem.h"
#include "stepwise.h"

namespace seqattn::gpu {

// Multiplications of a product above which splitting its factors is worth it; tests have small products.
#if defined(SEQATTN_EMULATED)
inline constexpr double kSplitFrom = 1e5;
#else
inline constexpr double kSplitFrom = 5e8;
#endif

inline int64_t depth_of(const Matrix& left) { return left.transposed ? left.rows : left.columns; }

// float32 factors as bfloat16 ones of three times the depth, kept for a second product with the same factor.
class SplitFactors {
 public:
  explicit SplitFactors(const Problem& p) : p_(p) {}

  // The parts of a factor follow each other along the depth that the product sums over: columns of a left factor, rows
  // of a right one, the other way round where transposed.
  Tensor factor(const std::vector<Matrix>& parts, bool left) {
    const bool stacked = left == parts[0].transposed;
    for (const Entry& e : entries_) {
      if (e.left == left && same(e.parts, parts)) return e.view;
    }
    int64_t depth = 0;
    for (const Matrix& m : parts) depth += stacked ? m.rows : m.columns;
    const int64_t width = stacked ? parts[0].columns : parts[0].rows;
    Tensor memory = p_.make_bytes(3 * depth * width * 2);
    int64_t begin = 0;
    for (const Matrix& m : parts) {
      split(m.data, m.rows, m.columns, m.ld, memory.mutable_data_ptr(), depth, begin, stacked, !left, p_.stream());
      begin += stacked ? m.rows : m.columns;
    }
    Matrix whole{memory.mutable_data_ptr(), stacked ? 3 * depth : width, stacked ? width : 3 * depth,
                 stacked ? width : 3 * depth, parts[0].transposed};
    entries_.push_back({parts, left, memory, p_.products().view_of(whole, ScalarType::BFloat16)});
    return entries_.back().view;
  }

 private:
  struct Entry {
    std::vector<Matrix> parts;
    bool left;
    Tensor memory, view;
  };

  static bool same(const std::vector<Matrix>& a, const std::vector<Matrix>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Matrix& x, const Matrix& y) {
      return x.data == y.data && x.rows == y.rows && x.columns == y.columns && x.transposed == y.transposed;
    });
  }

  const Problem& p_;
  std::vector<Entry> entries_;
};

// out = left[0] right[0] + left[1] right[1] + ...
//
// float32 with tf32 allowed: torch's own switch for products is another one than cuDNN's, and global. Three products in
// bfloat16, high high + high low + low high summed in float32, keep 16 bits where tf32 keeps 11, as fast.
inline void product(const Problem& p, SplitFactors& split_factors, const Matrix& out, const std::vector<Matrix>& left,
                    const std::vector<Matrix>& right) {
  const Products products = p.products();
  int64_t depth = 0;
  for (const Matrix& m : left) depth += depth_of(m);
  if (p.dtype == DType::kFloat32 && p.allow_tf32 &&
      double(out.rows) * double(out.columns) * double(depth) > kSplitFrom) {
    products.multiply_to_sum(products.view(out), split_factors.factor(left, true), split_factors.factor(right, false));
    return;
  }
  const Tensor to = products.view(out);
  for (size_t i = 0; i < left.size(); ++i) {
    if (i == 0) {
      products.multiply(to, products.view(left[i]), products.view(right[i]));
    } else {
      products.accumulate(to, products.view(left[i]), products.view(right[i]));
    }
  }
}

}  // namespace seqattn::gpu
