// Weights from scores on the CPU: checks, work sharing, registration. The arithmetic is in
// attention_weights_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include "attention_problem.h"
#include "attention_weights_kernels.h"

namespace seqattn {
namespace {

// Elements a thread should have before another is called in.
constexpr int64_t kWeightsPerThread = 1 << 14;

template <class T>
const WeightKernels<T>& weight_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return SEQATTN_KERNELS(weight_kernels_f32);
  } else {
    return SEQATTN_KERNELS(weight_kernels_f64);
  }
}

void check_kind(int64_t kind) {
  if (kind < 0 || kind >= kNormalizerCount) fail("kind: expected a number in [0, ", kNormalizerCount, "), got ", kind);
}

// Rows of one query each where there is no dimension of time.
int64_t steps_of(const Tensor& t) { return t.dim() == 2 ? 1 : t.size(1); }

std::vector<int64_t> shape_like(const Tensor& t) {
  return t.dim() == 2 ? std::vector<int64_t>{t.size(0), t.size(1)}
                      : std::vector<int64_t>{t.size(0), t.size(1), t.size(2)};
}

template <class T>
WeightArgs<T> args_of(const Tensor& t, const Masks<T>& masks) {
  WeightArgs<T> args{};
  args.B = t.size(0);
  args.T_ = steps_of(t);
  args.S = t.size(-1);
  args.lengths = masks.lengths;
  args.mask_bool = masks.mask_bool;
  args.mask_add = masks.mask_add;
  args.mask_b = masks.mask_b;
  args.mask_t = masks.mask_t;
  return args;
}

template <class T, class F>
void for_rows(const WeightArgs<T>& args, F kernel) {
  const int64_t rows = args.B * args.T_, useful = rows * args.S / kWeightsPerThread + 1;
  const int threads = int(std::min<int64_t>(useful, torch::stable::get_num_threads()));
  Queue queue(rows, threads);
  run_gang(threads, [&](Gang&) { queue.drain([&](int64_t begin, int64_t end) { kernel(args, begin, end); }); });
}

void check_rows(const char* name, const Tensor& t) {
  if (t.dim() != 2 && t.dim() != 3) fail(name, ": expected [B, S] or [B, T, S], got ", shape_of(t));
}

template <class T>
Tensor fwd(int64_t kind, const Tensor& scores_, const MaybeTensor& lengths, const MaybeTensor& mask, double scale,
           double temperature, double fill, bool zero_empty) {
  const Tensor scores = dense(scores_);
  const std::vector<int64_t> shape = shape_like(scores);
  check_tensor("scores", scores, kScalarType<T>, shape);
  const Masks<T> masks(shape[0], steps_of(scores), shape.back(), lengths, mask);
  Tensor weights = allocate(scores, shape);
  WeightArgs<T> args = args_of(scores, masks);
  args.scores = data_of<T>(scores);
  args.weights = data_of<T>(weights);
  args.scale = T(scale);
  args.inverse_temperature = T(1 / temperature);
  args.fill = T(fill);
  args.zero_empty = zero_empty;
  if (weights.numel()) for_rows(args, weight_kernels<T>().forward[kind]);
  return weights;
}

template <class T>
Tensor bwd(int64_t kind, const Tensor& d_weights_, const Tensor& weights_, const MaybeTensor& lengths,
           const MaybeTensor& mask, double factor) {
  const Tensor weights = dense(weights_), d_weights = dense(d_weights_);
  const std::vector<int64_t> shape = shape_like(weights);
  check_tensor("weights", weights, kScalarType<T>, shape);
  check_tensor("d_weights", d_weights, kScalarType<T>, shape);
  const Masks<T> masks(shape[0], steps_of(weights), shape.back(), lengths, mask);
  Tensor d_scores = allocate(weights, shape);
  WeightArgs<T> args = args_of(weights, masks);
  args.weights = data_of<T>(weights);
  args.d_weights = data_of<T>(d_weights);
  args.d_scores = data_of<T>(d_scores);
  args.factor = T(factor);
  if (d_scores.numel()) for_rows(args, weight_kernels<T>().backward[kind]);
  return d_scores;
}

Tensor normalize_fwd_cpu(int64_t kind, Tensor scores, MaybeTensor lengths, MaybeTensor mask, double scale,
                         double temperature, double fill, bool zero_empty) {
  check_kind(kind);
  check_rows("scores", scores);
  return by_type(scores, [&](auto zero) {
    return fwd<decltype(zero)>(kind, scores, lengths, mask, scale, temperature, fill, zero_empty);
  });
}

Tensor normalize_bwd_cpu(int64_t kind, Tensor d_weights, Tensor weights, MaybeTensor lengths, MaybeTensor mask,
                         double factor) {
  check_kind(kind);
  check_rows("weights", weights);
  return by_type(weights,
                 [&](auto zero) { return bwd<decltype(zero)>(kind, d_weights, weights, lengths, mask, factor); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("normalize_fwd", TORCH_BOX(&normalize_fwd_cpu));
  m.impl("normalize_bwd", TORCH_BOX(&normalize_bwd_cpu));
}

}  // namespace seqattn
