// The cell operators on a CPU: checks, allocation and the number of threads. The kernels are in cell_kernels.cpp.
#include "cell.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "allocate.h"
#include "launch.h"
#include "workspace.h"

namespace seqattn {
namespace {

template <class T>
const StepKernels<T>& kernels() {
  const StepTable& table = SEQATTN_KERNELS(step_kernels);
  if constexpr (sizeof(T) == 4) {
    return table.f32;
  } else {
    return table.f64;
  }
}

// Checks the arguments that forward and backward share.
template <class T>
StepProblem<T> read(const CellInfo& cell, const Tensor& input, const std::optional<Tensor>& h,
                    const std::optional<Tensor>& c, const std::vector<Tensor>& weights, bool has_bias) {
  if (weights.size() != (has_bias ? 4 : 2))
    fail("weights: expected ", has_bias ? 4 : 2, " tensors, got ", weights.size());
  StepProblem<T> p{};
  check_tensor("input", input, dtype_of<T>(), {-1, -1});
  p.batch = input.size(0);
  p.sizes.input = input.size(1);
  p.sizes.hidden = p.sizes.output = weights[1].size(-1);
  const int64_t rows = cell.gates * p.sizes.hidden;
  check_tensor("w_ih", weights[0], dtype_of<T>(), {rows, p.sizes.input});
  check_tensor("w_hh", weights[1], dtype_of<T>(), {rows, p.sizes.hidden});
  if (has_bias) {
    check_tensor("b_ih", weights[2], dtype_of<T>(), {rows});
    check_tensor("b_hh", weights[3], dtype_of<T>(), {rows});
  }
  if (h) check_tensor("h", *h, dtype_of<T>(), {p.batch, p.sizes.hidden});
  if (c) check_tensor("c", *c, dtype_of<T>(), {p.batch, p.sizes.hidden});
  p.x = input.const_data_ptr<T>();
  p.h = data<T>(h);
  p.c = data<T>(c);
  p.w_ih = weights[0].const_data_ptr<T>();
  p.w_hh = weights[1].const_data_ptr<T>();
  p.b_ih = has_bias ? weights[2].const_data_ptr<T>() : nullptr;
  p.b_hh = has_bias ? weights[3].const_data_ptr<T>() : nullptr;
  return p;
}

// Waking a thread costs about as much as 200k products, or as reading half a megabyte of weights.
template <class T>
int plan_threads(const CellInfo& cell, const StepProblem<T>& p, double passes) {
  const double weights = passes * cell.gates * double(p.sizes.hidden) * double(p.sizes.input + p.sizes.hidden);
  const double useful = std::max(weights * double(p.batch) / 2e5, weights / 1.5e5);
  const double panels = double((p.sizes.hidden + kUnitPad - 1) / kUnitPad);
  return int(std::clamp(std::min(useful, panels), 1.0, double(torch::stable::get_num_threads())));
}

template <class T>
void take_scratch(StepProblem<T>* p) {
  p->shared_scratch = padded(p->shared_scratch);
  p->thread_scratch = padded(p->thread_scratch);
  p->scratch = static_cast<T*>(workspace(size_t(p->shared_scratch + p->threads * p->thread_scratch) * sizeof(T)));
}

template <class T>
std::vector<Tensor> forward(int64_t number, const Tensor& input, const std::optional<Tensor>& h,
                            const std::optional<Tensor>& c, const std::vector<Tensor>& weights,
                            const std::vector<Tensor>& packed, bool has_bias, bool save) {
  const CellInfo& cell = cell_info(number);
  StepProblem<T> p = read<T>(cell, input, h, c, weights, has_bias);
  const int64_t B = p.batch, H = p.sizes.hidden;
  // Only what there is: an empty tensor costs as much to make as a full one.
  std::vector<Tensor> results;
  results.reserve(3);
  auto make = [&](int64_t columns) {
    results.push_back(allocate(input, {B, columns}));
    return results.back().template mutable_data_ptr<T>();
  };
  p.h_new = make(H);
  p.c_new = cell.has_cell ? make(H) : nullptr;
  p.reserve = save ? make(step_reserved(cell.saved) * padded(H)) : nullptr;
  if (!packed.empty()) {
    const int64_t values = SEQATTN_KERNELS(recurrence_kernels).f32.packed_size(int(number), p.sizes);
    check_tensor("packed", packed[0], dtype_of<T>(), {values});
    p.packed = packed[0].const_data_ptr<T>();
  }
  p.threads = plan_threads<T>(cell, p, 1.0);
  const StepKernels<T>& k = kernels<T>();
  k.forward_scratch(int(number), &p);
  take_scratch(&p);
  run_gang(p.threads, [&](Gang& gang) { k.forward(int(number), p, gang); });
  return results;
}

template <class T>
std::vector<Tensor> backward(int64_t number, const Tensor& input, const std::optional<Tensor>& h,
                             const std::optional<Tensor>& c, const std::vector<Tensor>& weights, bool has_bias,
                             const Tensor& reserve, const std::optional<Tensor>& d_h, const std::optional<Tensor>& d_c,
                             bool need_input, bool need_weights) {
  const CellInfo& cell = cell_info(number);
  StepProblem<T> p = read<T>(cell, input, h, c, weights, has_bias);
  const int64_t B = p.batch, H = p.sizes.hidden;
  check_tensor("reserve", reserve, dtype_of<T>(), {B, step_reserved(cell.saved) * padded(H)});
  for (const auto* t : {&d_h, &d_c}) {
    if (*t) check_tensor("gradient", **t, dtype_of<T>(), {B, H});
  }
  std::vector<Tensor> results;
  results.reserve(3 + weights.size());
  auto make = [&](const Tensor& like) {
    const auto shape = like.sizes();
    results.push_back(allocate(like, shape.data(), int64_t(shape.size())));
    return results.back().template mutable_data_ptr<T>();
  };
  p.reserve = const_cast<T*>(reserve.const_data_ptr<T>());
  p.d_h_new = data<T>(d_h);
  p.d_c_new = data<T>(d_c);
  p.d_x = need_input ? make(input) : nullptr;
  p.d_h = h ? make(*h) : nullptr;
  p.d_c = c ? make(*c) : nullptr;
  if (need_weights) {
    p.d_w_ih = make(weights[0]);
    p.d_w_hh = make(weights[1]);
    p.d_b_ih = has_bias ? make(weights[2]) : nullptr;
    p.d_b_hh = has_bias ? make(weights[3]) : nullptr;
  }
  p.threads = plan_threads<T>(cell, p, 2.0);
  const StepKernels<T>& k = kernels<T>();
  k.backward_scratch(int(number), &p);
  take_scratch(&p);
  run_gang(p.threads, [&](Gang& gang) { k.backward(int(number), p, gang); });
  return results;
}

void make_contiguous(Tensor* t) {
  if (!t->is_contiguous()) *t = torch::stable::contiguous(*t);
}

void make_contiguous(std::optional<Tensor>* t) {
  if (*t) make_contiguous(&**t);
}

std::vector<Tensor> cell_fwd_cpu(int64_t cell, Tensor input, std::optional<Tensor> h, std::optional<Tensor> c,
                                 std::vector<Tensor> weights, std::vector<Tensor> packed, bool has_bias, bool save) {
  make_contiguous(&input);
  make_contiguous(&h);
  make_contiguous(&c);
  for (Tensor& w : weights) make_contiguous(&w);
  return with_dtype(input,
                    [&](auto t) { return forward<decltype(t)>(cell, input, h, c, weights, packed, has_bias, save); });
}

std::vector<Tensor> cell_bwd_cpu(int64_t cell, Tensor input, std::optional<Tensor> h, std::optional<Tensor> c,
                                 std::vector<Tensor> weights, bool has_bias, Tensor reserve, std::optional<Tensor> d_h,
                                 std::optional<Tensor> d_c, bool need_input, bool need_weights) {
  for (Tensor* t : {&input, &reserve}) make_contiguous(t);
  for (std::optional<Tensor>* t : {&h, &c, &d_h, &d_c}) make_contiguous(t);
  for (Tensor& w : weights) make_contiguous(&w);
  return with_dtype(input, [&](auto t) {
    return backward<decltype(t)>(cell, input, h, c, weights, has_bias, reserve, d_h, d_c, need_input, need_weights);
  });
}

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("cell_fwd", TORCH_BOX(&cell_fwd_cpu));
  m.impl("cell_bwd", TORCH_BOX(&cell_bwd_cpu));
}

}  // namespace
}  // namespace seqattn
