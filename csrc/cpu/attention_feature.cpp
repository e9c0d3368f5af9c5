// Attention over time for each feature on the CPU: checks, work sharing, registration. The arithmetic is in
// attention_feature_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_feature_kernels.h"
#include "attention_linear_problem.h"

namespace seqattn {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
const FeatureKernels<T>& feature_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return SEQATTN_KERNELS(feature_kernels_f32);
  } else {
    return SEQATTN_KERNELS(feature_kernels_f64);
  }
}

template <class T>
struct FeatureProblem {
  LinearProblem<T> linear;
  Masks<T> masks;
  FeatureArgs<T> args{};

  FeatureProblem(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& lengths,
                 const MaybeTensor& mask, bool reduce)
      : linear(input, weight, bias), masks(linear.args.B, 1, linear.args.S, lengths, mask) {
    if (linear.args.N != linear.args.K) fail("weight: expected [D, D], got ", shape_of(weight));
    if (masks.mask_add) fail("mask: expected torch.bool");
    linear.args.lengths = masks.lengths;
    args.mask_bool = masks.mask_bool;
    args.mask_b = masks.mask_b;
    args.reduce = reduce;
  }
  std::vector<int64_t> shape() const { return {linear.args.B, linear.args.S, linear.args.K}; }
  std::vector<int64_t> result_shape() const {
    return args.reduce ? std::vector<int64_t>{linear.args.B, linear.args.K} : shape();
  }
};

template <class T>
Three fwd(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& lengths,
          const MaybeTensor& mask, bool reduce, bool keep) {
  FeatureProblem<T> problem(input, weight, bias, lengths, mask, reduce);
  const FeatureKernels<T>& kernel = feature_kernels<T>();
  FeatureArgs<T>& args = problem.args;
  Tensor weights = allocate(input, problem.shape()), result = allocate(input, problem.result_shape());
  Tensor tangents = allocate(input, keep ? problem.shape() : std::vector<int64_t>{0});
  args.weights = data_of<T>(weights);
  args.tangents = keep ? data_of<T>(tangents) : nullptr;
  args.result = data_of<T>(result);
  if (!result.numel()) return {result, weights, tangents};
  const int threads = problem.linear.threads(1);
  const int64_t chunks = problem.linear.panels(problem.linear.args.N, kernel.columns),
                each = kLinearRows * kernel.columns;
  T* scratch;
  Parts<T> parts;
  parts.add(&problem.linear.args.packed, problem.linear.args.K * problem.linear.args.width());
  parts.add(&scratch, each * threads);
  parts.place();
  args.linear = problem.linear.args;
  Queue panels(chunks, threads), items(args.linear.B * chunks, threads);
  run_gang(threads, [&](Gang& gang) {
    panels.drain([&](int64_t begin, int64_t end) { kernel.pack(args, begin, end); });
    gang.barrier();
    items.drain([&](int64_t begin, int64_t end) { kernel.forward(args, begin, end, scratch + gang.rank * each); });
  });
  return {result, weights, tangents};
}

template <class T>
Three bwd(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const Tensor& weights_,
          const Tensor& tangents_, const MaybeTensor& d_result, const MaybeTensor& d_weights,
          const MaybeTensor& lengths, const MaybeTensor& mask, bool reduce, bool need_input) {
  FeatureProblem<T> problem(input, weight, bias, lengths, mask, reduce);
  LinearProblem<T>& linear = problem.linear;
  const FeatureKernels<T>& kernel = feature_kernels<T>();
  FeatureArgs<T>& args = problem.args;
  const Tensor weights = dense(weights_), tangents = dense(tangents_);
  check_tensor("weights", weights, kScalarType<T>, problem.shape());
  check_tensor("tangents", tangents, kScalarType<T>, problem.shape());
  args.weights = data_of<T>(weights);
  args.tangents = data_of<T>(tangents);
  Tensor dr, dw;
  if (d_result) {
    dr = dense(*d_result);
    check_tensor("d_result", dr, kScalarType<T>, problem.result_shape());
    args.d_result = data_of<T>(dr);
  }
  if (d_weights) {
    dw = dense(*d_weights);
    check_tensor("d_weights", dw, kScalarType<T>, problem.shape());
    args.d_weights = data_of<T>(dw);
  }
  linear.make_gradients(need_input, 0);
  const int threads = linear.threads(2);
  const int64_t each = linear_scratch(linear.args);
  T* scratch;
  Parts<T> parts;
  parts.add(&linear.args.packed_back, linear.args.N * linear.args.input_width());
  parts.add(&linear.args.parts, linear.args.groups * linear.args.part);
  parts.add(&args.sums, linear.args.B * linear.args.K);
  parts.add(&scratch, each * threads);
  parts.place();
  args.linear = linear.args;
  const int64_t chunks = linear.panels(linear.args.N, kernel.columns);
  Queue panels(chunks, threads), items(linear.args.B * chunks, threads), groups(linear.args.groups, threads),
      rows(linear.args.N + 1, threads);
  run_gang(threads, [&](Gang& gang) {
    panels.drain([&](int64_t begin, int64_t end) { kernel.pack_back(args, begin, end); });
    items.drain([&](int64_t begin, int64_t end) { kernel.weighted_sums(args, begin, end); });
    gang.barrier();
    groups.drain([&](int64_t begin, int64_t end) { kernel.gradients(args, begin, end, scratch + gang.rank * each); });
    gang.barrier();
    rows.drain([&](int64_t begin, int64_t end) { kernel.sum_parts(args, begin, end); });
  });
  return {linear.d_input, linear.d_weight, linear.d_bias};
}

Three feature_fwd_cpu(Tensor input, Tensor weight, MaybeTensor bias, MaybeTensor lengths, MaybeTensor mask, bool reduce,
                      bool keep) {
  return by_type(input,
                 [&](auto zero) { return fwd<decltype(zero)>(input, weight, bias, lengths, mask, reduce, keep); });
}

Three feature_bwd_cpu(Tensor input, Tensor weight, MaybeTensor bias, Tensor weights, Tensor tangents,
                      MaybeTensor d_result, MaybeTensor d_weights, MaybeTensor lengths, MaybeTensor mask, bool reduce,
                      bool need_input) {
  return by_type(input, [&](auto zero) {
    return bwd<decltype(zero)>(input, weight, bias, weights, tangents, d_result, d_weights, lengths, mask, reduce,
                               need_input);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("feature_fwd", TORCH_BOX(&feature_fwd_cpu));
  m.impl("feature_bwd", TORCH_BOX(&feature_bwd_cpu));
}

}  // namespace seqattn
