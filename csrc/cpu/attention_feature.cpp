// Attention over time for each feature on the CPU: checks, work sharing, registration. The arithmetic is in
// attention_feature_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_feature_kernels.h"
#include "attention_problem.h"

namespace seqattn {
namespace {

// Elements a thread should have before another is called in.
constexpr int64_t kFeaturesPerThread = 1 << 13;

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
  FeatureArgs<T> args{};
  Tensor inner, input;
  Masks<T> masks;

  FeatureProblem(const Tensor& inner_, const Tensor& input_, const MaybeTensor& lengths, const MaybeTensor& mask,
                 bool reduce)
      : inner(dense(inner_)), input(dense(input_)), masks(sized(input_), 1, input_.size(1), lengths, mask) {
    const int64_t B = input.size(0), S = input.size(1), D = input.size(2);
    check_tensor("input", input, kScalarType<T>, {B, S, D});
    check_tensor("inner", inner, kScalarType<T>, {B, S, D});
    if (masks.mask_add) fail("mask: expected torch.bool");
    args.B = B;
    args.S = S;
    args.D = D;
    args.lengths = masks.lengths;
    args.mask_bool = masks.mask_bool;
    args.mask_b = masks.mask_b;
    args.reduce = reduce;
    args.inner = data_of<T>(inner);
    args.input = data_of<T>(input);
  }
  static int64_t sized(const Tensor& t) {
    if (t.dim() != 3) fail("input: expected [B, S, D], got ", shape_of(t));
    return t.size(0);
  }
  std::vector<int64_t> shape() const { return {args.B, args.S, args.D}; }
  std::vector<int64_t> result_shape() const { return args.reduce ? std::vector<int64_t>{args.B, args.D} : shape(); }
  template <class F>
  void run(F kernel) const {
    const int64_t useful = args.B * args.S * args.D / kFeaturesPerThread + 1;
    const int threads = int(std::min<int64_t>(useful, torch::stable::get_num_threads()));
    Queue queue(args.B * args.chunks(), threads);
    run_gang(threads, [&](Gang&) { queue.drain([&](int64_t begin, int64_t end) { kernel(args, begin, end); }); });
  }
};

template <class T>
std::tuple<Tensor, Tensor> fwd(const Tensor& inner, const Tensor& input, const MaybeTensor& lengths,
                               const MaybeTensor& mask, bool reduce) {
  FeatureProblem<T> problem(inner, input, lengths, mask, reduce);
  Tensor weights = allocate(input, problem.shape());
  Tensor result = allocate(input, problem.result_shape());
  problem.args.weights = data_of<T>(weights);
  problem.args.result = data_of<T>(result);
  if (result.numel()) problem.run(feature_kernels<T>().forward);
  return {result, weights};
}

template <class T>
std::tuple<Tensor, Tensor> bwd(const Tensor& inner, const Tensor& input, const Tensor& weights_,
                               const MaybeTensor& d_result, const MaybeTensor& d_weights, const MaybeTensor& lengths,
                               const MaybeTensor& mask, bool reduce) {
  FeatureProblem<T> problem(inner, input, lengths, mask, reduce);
  const Tensor weights = dense(weights_);
  check_tensor("weights", weights, kScalarType<T>, problem.shape());
  Tensor dr, dw;
  if (d_result) {
    dr = dense(*d_result);
    check_tensor("d_result", dr, kScalarType<T>, problem.result_shape());
    problem.args.d_result = data_of<T>(dr);
  }
  if (d_weights) {
    dw = dense(*d_weights);
    check_tensor("d_weights", dw, kScalarType<T>, problem.shape());
    problem.args.d_weights = data_of<T>(dw);
  }
  Tensor d_inner = allocate(input, problem.shape());
  Tensor d_input = allocate(input, problem.shape());
  problem.args.weights = data_of<T>(weights);
  problem.args.d_inner = data_of<T>(d_inner);
  problem.args.d_input = data_of<T>(d_input);
  if (d_inner.numel()) problem.run(feature_kernels<T>().backward);
  return {d_inner, d_input};
}

std::tuple<Tensor, Tensor> feature_fwd_cpu(Tensor inner, Tensor input, MaybeTensor lengths, MaybeTensor mask,
                                           bool reduce) {
  return by_type(input, [&](auto zero) { return fwd<decltype(zero)>(inner, input, lengths, mask, reduce); });
}

std::tuple<Tensor, Tensor> feature_bwd_cpu(Tensor inner, Tensor input, Tensor weights, MaybeTensor d_result,
                                           MaybeTensor d_weights, MaybeTensor lengths, MaybeTensor mask, bool reduce) {
  return by_type(input, [&](auto zero) {
    return bwd<decltype(zero)>(inner, input, weights, d_result, d_weights, lengths, mask, reduce);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("feature_fwd", TORCH_BOX(&feature_fwd_cpu));
  m.impl("feature_bwd", TORCH_BOX(&feature_bwd_cpu));
}

}  // namespace seqattn
