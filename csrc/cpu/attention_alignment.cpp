// Monotonic alignment on the CPU (Raffel et al., 2017): where attention stands after each step, and gradients.
//
// With q[s] = (1 - p[s - 1]) * q[s - 1] + previous[s], the probability that attention comes by key s, the weights of a
// step are p[s] * q[s], and they are `previous` of the next. One multiply-add after the other: there is nothing to
// compute side by side but the batch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_problem.h"

namespace seqattn {
namespace {

// Elements a thread should have before another is called in; each takes some nanoseconds.
constexpr int64_t kAlignmentsPerThread = 1 << 12;

struct Sizes {
  int64_t B, T_, S;
  int threads() const {
    return int(std::min<int64_t>(B * T_ * S / kAlignmentsPerThread + 1, torch::stable::get_num_threads()));
  }
};

template <class T>
Sizes sizes_of(const Tensor& choose, const Tensor& previous) {
  check_tensor("choose", choose, kScalarType<T>, {-1, -1, -1});
  check_tensor("previous", previous, kScalarType<T>, {choose.size(0), choose.size(2)});
  return {choose.size(0), choose.size(1), choose.size(2)};
}

template <class T>
Tensor fwd(const Tensor& choose_, const Tensor& previous_) {
  const Tensor choose = dense(choose_), previous = dense(previous_);
  const Sizes n = sizes_of<T>(choose, previous);
  Tensor weights = allocate(choose, {n.B, n.T_, n.S});
  const T *p = data_of<T>(choose), *first = data_of<T>(previous);
  T* out = data_of<T>(weights);
  Queue rows(n.B, n.threads());
  run_gang(n.threads(), [&](Gang&) {
    rows.drain([&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const T* stands = first + b * n.S;
        for (int64_t t = 0; t < n.T_; ++t) {
          const int64_t row = (b * n.T_ + t) * n.S;
          T passes = 0;
          for (int64_t s = 0; s < n.S; ++s) {
            const T q = passes + stands[s];
            out[row + s] = p[row + s] * q;
            passes = (1 - p[row + s]) * q;
          }
          stands = out + row;
        }
      }
    });
  });
  return weights;
}

template <class T>
std::tuple<Tensor, Tensor> bwd(const Tensor& choose_, const Tensor& previous_, const Tensor& weights_,
                               const Tensor& d_weights_) {
  const Tensor choose = dense(choose_), previous = dense(previous_), weights = dense(weights_),
               d_weights = dense(d_weights_);
  const Sizes n = sizes_of<T>(choose, previous);
  check_tensor("weights", weights, kScalarType<T>, {n.B, n.T_, n.S});
  check_tensor("d_weights", d_weights, kScalarType<T>, {n.B, n.T_, n.S});
  Tensor d_choose = allocate(choose, {n.B, n.T_, n.S}), d_previous = allocate(choose, {n.B, n.S});
  const T *p = data_of<T>(choose), *first = data_of<T>(previous), *w = data_of<T>(weights), *dw = data_of<T>(d_weights);
  T *dp = data_of<T>(d_choose), *carried = data_of<T>(d_previous);
  Scratch<T> comes_by(n.B * n.S);
  Queue rows(n.B, n.threads());
  run_gang(n.threads(), [&](Gang&) {
    rows.drain([&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        T *q = comes_by.get() + b * n.S, *carry = carried + b * n.S;
        std::fill_n(carry, n.S, T(0));
        for (int64_t t = n.T_ - 1; t >= 0; --t) {
          const int64_t row = (b * n.T_ + t) * n.S;
          const T* stands = t ? w + row - n.S : first + b * n.S;
          T passes = 0;
          for (int64_t s = 0; s < n.S; ++s) {
            q[s] = passes + stands[s];
            passes = (1 - p[row + s]) * q[s];
          }
          T d_passes = 0;  // gradient of what goes on from key s
          for (int64_t s = n.S - 1; s >= 0; --s) {
            const T g = dw[row + s] + carry[s];
            dp[row + s] = (g - d_passes) * q[s];
            d_passes = g * p[row + s] + (1 - p[row + s]) * d_passes;
            carry[s] = d_passes;
          }
        }
      }
    });
  });
  return {d_choose, d_previous};
}

Tensor monotonic_fwd_cpu(Tensor choose, Tensor previous) {
  return by_type(choose, [&](auto zero) { return fwd<decltype(zero)>(choose, previous); });
}

std::tuple<Tensor, Tensor> monotonic_bwd_cpu(Tensor choose, Tensor previous, Tensor weights, Tensor d_weights) {
  return by_type(choose, [&](auto zero) { return bwd<decltype(zero)>(choose, previous, weights, d_weights); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("monotonic_fwd", TORCH_BOX(&monotonic_fwd_cpu));
  m.impl("monotonic_bwd", TORCH_BOX(&monotonic_bwd_cpu));
}

}  // namespace seqattn
