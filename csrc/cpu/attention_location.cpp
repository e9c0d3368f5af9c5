// Scores of location-sensitive attention on the CPU, convolution of the history included. The arithmetic is in
// attention_location_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include "attention_linear_problem.h"
#include "attention_location_kernels.h"

namespace seqattn {
namespace {

template <class T>
Tensor fwd(const Tensor& query, const Tensor& keys, const Tensor& v, const Tensor& history_, const Tensor& conv_weight_,
           const Tensor& feature_weight_, const MaybeTensor& lengths) {
  Problem<T> problem(query, keys, std::nullopt, v, lengths, std::nullopt);
  AttentionArgs<T>& score = problem.args;
  const Tensor history = dense(history_), conv_weight = dense(conv_weight_), feature_weight = dense(feature_weight_);
  check_tensor("conv_weight", conv_weight, kScalarType<T>, {-1, -1, -1});
  LocationArgs<T> args{};
  args.B = score.B;
  args.T_ = score.T_;
  args.S = score.S;
  args.A = score.A;
  args.F = conv_weight.size(0);
  args.channels = conv_weight.size(1);
  args.taps = conv_weight.size(2);
  if (args.taps % 2 == 0) fail("conv_weight: expected [F, C, W] with W odd, got ", shape_of(conv_weight));
  check_tensor("feature_weight", feature_weight, kScalarType<T>, {args.A, args.F});
  args.per_query = history.dim() == 4;
  if (args.per_query) {
    check_tensor("history", history, kScalarType<T>, {args.B, args.T_, args.channels, args.S});
  } else {
    check_tensor("history", history, kScalarType<T>, {args.B, args.channels, args.S});
  }
  args.heads = score.heads;
  args.query = score.query;
  args.keys = score.keys;
  args.lengths = score.lengths;
  args.history = data_of<T>(history);
  args.conv_weight = data_of<T>(conv_weight);
  args.feature_weight = data_of<T>(feature_weight);
  Tensor out = problem.empty(problem.per_query(args.S));
  if (!out.numel()) return out;
  problem.read_v(args.A);
  args.v = score.v;
  args.scores = data_of<T>(out);
  args.weight_stride = round_up(args.A, kKeyBlock);
  const LocationKernels<T>& kernel = location_kernels<T>();
  const int threads = problem.threads(args.B * args.T_ * args.S * args.A * 8);
  const int64_t each = location_scratch(args);
  T* scratch;
  Parts<T> parts;
  parts.add(&args.packed_conv, args.channels * args.taps * args.padded_features());
  parts.add(&args.packed_weight, args.F * args.weight_stride);
  parts.add(&scratch, each * threads);
  parts.place();
  args.weight = args.packed_weight;
  kernel.pack(args);
  Queue queue(args.B * args.T_ * args.row_blocks(), threads);
  run_gang(threads, [&](Gang& gang) {
    queue.drain([&](int64_t begin, int64_t end) { kernel.scores(args, begin, end, scratch + gang.rank * each); });
  });
  return out;
}

Tensor location_fwd_cpu(Tensor query, Tensor keys, Tensor v, Tensor history, Tensor conv_weight, Tensor feature_weight,
                        MaybeTensor lengths) {
  return by_type(query, [&](auto zero) {
    return fwd<decltype(zero)>(query, keys, v, history, conv_weight, feature_weight, lengths);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) { m.impl("location_fwd", TORCH_BOX(&location_fwd_cpu)); }

}  // namespace seqattn
