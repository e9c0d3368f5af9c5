// Self-attentive pooling on the CPU: checks, work sharing, registration. The arithmetic is in
// attention_pooling_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_linear_problem.h"
#include "attention_pooling_kernels.h"

namespace seqattn {
namespace {

template <class T>
const PoolingKernels<T>& pooling_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return SEQATTN_KERNELS(pooling_kernels_f32);
  } else {
    return SEQATTN_KERNELS(pooling_kernels_f64);
  }
}

// v [N] or [R, N]; values [B, S, D], the input itself where absent.
template <class T>
struct PoolingProblem {
  LinearProblem<T> linear;
  Tensor v, values;
  Masks<T> masks;
  PoolingArgs<T> args{};

  PoolingProblem(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const Tensor& v_,
                 const MaybeTensor& values_, const MaybeTensor& lengths, const MaybeTensor& mask)
      : linear(input, weight, bias),
        v(dense(v_)),
        values(values_ ? dense(*values_) : linear.input),
        masks(linear.args.B, 1, linear.args.S, lengths, mask) {
    const LinearArgs<T>& sizes = linear.args;
    if (v.dim() != 1) {
      check_tensor("v", v, kScalarType<T>, {-1, sizes.N});
    } else {
      check_tensor("v", v, kScalarType<T>, {sizes.N});
    }
    check_tensor("values", values, kScalarType<T>, {sizes.B, sizes.S, -1});
    args.v = data_of<T>(v);
    args.same = !values_;
    AttentionArgs<T>& attention = args.attention;
    attention.B = sizes.B;
    attention.T_ = v.dim() == 1 ? 1 : v.size(0);
    attention.S = sizes.S;
    attention.D = values.size(2);
    attention.values = data_of<T>(values);
    attention.lengths = linear.args.lengths = masks.lengths;
    attention.mask_bool = masks.mask_bool;
    attention.mask_add = masks.mask_add;
    attention.mask_b = masks.mask_b;
    attention.row = round_up(sizes.S, kKeyBlock);
  }
  std::vector<int64_t> per_row(int64_t last) const {
    return v.dim() == 1 ? std::vector<int64_t>{args.attention.B, last}
                        : std::vector<int64_t>{args.attention.B, args.attention.T_, last};
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                                       const Tensor& v, const MaybeTensor& values, const MaybeTensor& lengths,
                                       const MaybeTensor& mask, bool keep) {
  PoolingProblem<T> problem(input, weight, bias, v, values, lengths, mask);
  const PoolingKernels<T>& kernel = pooling_kernels<T>();
  LinearArgs<T>& linear = problem.linear.args;
  PoolingArgs<T>& args = problem.args;
  AttentionArgs<T>& attention = args.attention;
  Tensor context = allocate(input, problem.per_row(attention.D)), weights = allocate(input, problem.per_row(linear.S));
  Tensor tangents =
      allocate(input, keep ? std::vector<int64_t>{linear.B, linear.S, linear.N} : std::vector<int64_t>{0});
  attention.context = data_of<T>(context);
  attention.weights = data_of<T>(weights);
  args.tangents = keep ? data_of<T>(tangents) : nullptr;
  if (!linear.B || !attention.T_) return {context, weights, tangents};
  const int threads = problem.linear.threads(1);
  attention.context_chunk = linear.B < 4 * threads ? kContextChunk : std::max<int64_t>(attention.D, 1);
  const int64_t each = round_up(std::max(kLinearRows * linear.width(), linear.S), 64 / int64_t(sizeof(T)));
  T* scratch;
  Parts<T> parts;
  parts.add(&linear.packed, linear.K * linear.width());
  parts.add(&attention.rows, linear.B * attention.T_ * attention.row);
  parts.add(&scratch, each * threads);
  parts.place();
  args.linear = linear;
  Queue panels(problem.linear.panels(linear.N, kernel.columns), threads), blocks(linear.B * linear.blocks(), threads),
      rows(linear.B * attention.T_, threads),
      columns(linear.B * ceil_div(attention.D, attention.context_chunk), threads);
  run_gang(threads, [&](Gang& gang) {
    T* own = scratch + gang.rank * each;
    panels.drain([&](int64_t begin, int64_t end) { kernel.pack(args, begin, end); });
    gang.barrier();
    blocks.drain([&](int64_t begin, int64_t end) { kernel.scores(args, begin, end, own); });
    gang.barrier();
    rows.drain([&](int64_t begin, int64_t end) { kernel.softmax(args, begin, end); });
    gang.barrier();
    columns.drain([&](int64_t begin, int64_t end) { kernel.context(args, begin, end, own); });
  });
  return {context, weights, tangents};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients bwd(const Tensor& input, const Tensor& weight, const MaybeTensor& bias, const Tensor& v,
              const MaybeTensor& values, const Tensor& weights_, const Tensor& tangents_, const MaybeTensor& d_context,
              const MaybeTensor& d_weights, const MaybeTensor& lengths, const MaybeTensor& mask, bool need_input,
              bool need_values) {
  PoolingProblem<T> problem(input, weight, bias, v, values, lengths, mask);
  const PoolingKernels<T>& kernel = pooling_kernels<T>();
  LinearProblem<T>& linear = problem.linear;
  PoolingArgs<T>& args = problem.args;
  AttentionArgs<T>& attention = args.attention;
  const int64_t R = attention.T_;
  const Tensor weights = dense(weights_), tangents = dense(tangents_);
  check_tensor("weights", weights, kScalarType<T>, problem.per_row(linear.args.S));
  check_tensor("tangents", tangents, kScalarType<T>, {linear.args.B, linear.args.S, linear.args.N});
  attention.weights = data_of<T>(weights);
  args.tangents = data_of<T>(tangents);
  Tensor dc, dw;
  if (d_context) {
    dc = dense(*d_context);
    check_tensor("d_context", dc, kScalarType<T>, problem.per_row(attention.D));
    args.d_context = data_of<T>(dc);
  }
  if (d_weights) {
    dw = dense(*d_weights);
    check_tensor("d_weights", dw, kScalarType<T>, problem.per_row(linear.args.S));
    args.d_weights = data_of<T>(dw);
  }
  linear.make_gradients(need_input, R * linear.args.width());
  const bool own_values = values && need_values;
  Tensor d_v =
      allocate(input, v.dim() == 1 ? std::vector<int64_t>{linear.args.N} : std::vector<int64_t>{R, linear.args.N});
  Tensor d_values = allocate(
      input, own_values ? std::vector<int64_t>{linear.args.B, linear.args.S, attention.D} : std::vector<int64_t>{0});
  args.d_v = data_of<T>(d_v);
  args.d_values = own_values ? data_of<T>(d_values) : nullptr;
  const int threads = linear.threads(2);
  const int64_t each = linear_scratch(linear.args);
  T* scratch;
  Parts<T> parts;
  parts.add(&linear.args.packed_back, linear.args.N * linear.args.input_width());
  parts.add(&linear.args.parts, linear.args.groups * linear.args.part);
  parts.add(&args.d_scores, linear.args.B * R * linear.args.S);
  parts.add(&scratch, each * threads);
  parts.place();
  args.linear = linear.args;
  Queue panels(linear.panels(linear.args.K, kernel.columns), threads), items(linear.args.B, threads),
      groups(linear.args.groups, threads), rows(linear.args.N + 2, threads);
  run_gang(threads, [&](Gang& gang) {
    panels.drain([&](int64_t begin, int64_t end) { kernel.pack_back(args, begin, end); });
    items.drain([&](int64_t begin, int64_t end) { kernel.weight_gradients(args, begin, end); });
    gang.barrier();
    groups.drain([&](int64_t begin, int64_t end) { kernel.gradients(args, begin, end, scratch + gang.rank * each); });
    gang.barrier();
    rows.drain([&](int64_t begin, int64_t end) { kernel.sum_parts(args, begin, end); });
  });
  return {linear.d_input, linear.d_weight, linear.d_bias, d_v, d_values};
}

std::tuple<Tensor, Tensor, Tensor> pooling_fwd_cpu(Tensor input, Tensor weight, MaybeTensor bias, Tensor v,
                                                   MaybeTensor values, MaybeTensor lengths, MaybeTensor mask,
                                                   bool keep) {
  return by_type(input,
                 [&](auto zero) { return fwd<decltype(zero)>(input, weight, bias, v, values, lengths, mask, keep); });
}

Gradients pooling_bwd_cpu(Tensor input, Tensor weight, MaybeTensor bias, Tensor v, MaybeTensor values, Tensor weights,
                          Tensor tangents, MaybeTensor d_context, MaybeTensor d_weights, MaybeTensor lengths,
                          MaybeTensor mask, bool need_input, bool need_values) {
  return by_type(input, [&](auto zero) {
    return bwd<decltype(zero)>(input, weight, bias, v, values, weights, tangents, d_context, d_weights, lengths, mask,
                               need_input, need_values);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("pooling_fwd", TORCH_BOX(&pooling_fwd_cpu));
  m.impl("pooling_bwd", TORCH_BOX(&pooling_bwd_cpu));
}

}  // namespace seqattn
