// The cell operators on a CPU: checks, allocation and the number of threads. The kernels are in cell_kernels.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "allocate.h"
#include "cell_launch.h"
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

// A second thread costs about as much as 200k products, or as one row's pass over 180 KB of weights.
template <class T>
int plan_threads(const CellInfo& cell, const StepProblem<T>& p, double passes) {
  const double weights = passes * cell.gates * double(p.sizes.hidden) * double(p.sizes.input + p.sizes.hidden);
  const double useful = std::max(weights * double(p.batch) / 2e5, weights / 4.5e4);
  const double panels = double((p.sizes.hidden + kUnitPad - 1) / kUnitPad);
  return int(std::clamp(std::min(useful, panels), 1.0, double(torch::stable::get_num_threads())));
}

template <class T>
void take_scratch(StepProblem<T>* p) {
  p->shared_scratch = padded(p->shared_scratch);
  p->thread_scratch = padded(p->thread_scratch);
  p->scratch = static_cast<T*>(workspace(size_t(p->shared_scratch + p->threads * p->thread_scratch) * sizeof(T)));
}

// Results of a step in T; only what there is, since an empty tensor costs as much to make as a full one.
template <class T>
class Results {
 public:
  explicit Results(size_t most) { tensors.reserve(most); }

  T* make(std::initializer_list<int64_t> shape) {
    tensors.push_back(allocate(sizeof(T) == 4 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(), shape.begin(),
                               shape.size()));
    return tensors.back().template mutable_data_ptr<T>();
  }

  std::vector<Tensor> tensors;
};

}  // namespace

int64_t step_packed_size(int64_t cell, const Sizes& sizes) {
  return SEQATTN_KERNELS(recurrence_kernels).f32.packed_size(int(cell), sizes);
}

template <class T>
std::vector<Tensor> launch_step(int64_t number, StepProblem<T> p, bool save) {
  const CellInfo& cell = cell_info(number);
  const int64_t B = p.batch, H = p.sizes.hidden;
  Results<T> results(3);
  p.h_new = results.make({B, H});
  p.c_new = cell.has_cell ? results.make({B, H}) : nullptr;
  p.reserve = save ? results.make({B, step_reserved(cell.saved) * padded(H)}) : nullptr;
  p.threads = plan_threads<T>(cell, p, 1.0);
  const StepKernels<T>& k = kernels<T>();
  k.forward_scratch(int(number), &p);
  take_scratch(&p);
  run_gang(p.threads, [&](Gang& gang) { k.forward(int(number), p, gang); });
  return std::move(results.tensors);
}

template <class T>
std::vector<Tensor> launch_step_backward(int64_t number, StepProblem<T> p, StepGradients wanted) {
  const CellInfo& cell = cell_info(number);
  const int64_t B = p.batch, I = p.sizes.input, H = p.sizes.hidden, rows = cell.gates * H;
  Results<T> results(7);
  p.d_x = wanted.input ? results.make({B, I}) : nullptr;
  p.d_h = wanted.h ? results.make({B, H}) : nullptr;
  p.d_c = wanted.c ? results.make({B, H}) : nullptr;
  if (wanted.weights) {
    p.d_w_ih = results.make({rows, I});
    p.d_w_hh = results.make({rows, H});
    p.d_b_ih = p.b_ih ? results.make({rows}) : nullptr;
    p.d_b_hh = p.b_hh ? results.make({rows}) : nullptr;
  }
  p.threads = plan_threads<T>(cell, p, 2.0);
  const StepKernels<T>& k = kernels<T>();
  k.backward_scratch(int(number), &p);
  take_scratch(&p);
  run_gang(p.threads, [&](Gang& gang) { k.backward(int(number), p, gang); });
  return std::move(results.tensors);
}

template std::vector<Tensor> launch_step(int64_t, StepProblem<float>, bool);
template std::vector<Tensor> launch_step(int64_t, StepProblem<double>, bool);
template std::vector<Tensor> launch_step_backward(int64_t, StepProblem<float>, StepGradients);
template std::vector<Tensor> launch_step_backward(int64_t, StepProblem<double>, StepGradients);

namespace {

template <class T>
std::vector<Tensor> forward(int64_t number, const Tensor& input, const std::optional<Tensor>& h,
                            const std::optional<Tensor>& c, const std::vector<Tensor>& weights,
                            const std::vector<Tensor>& packed, bool has_bias, bool save) {
  StepProblem<T> p = read<T>(cell_info(number), input, h, c, weights, has_bias);
  if (!packed.empty()) {
    check_tensor("packed", packed[0], dtype_of<T>(), {step_packed_size(number, p.sizes)});
    p.packed = packed[0].const_data_ptr<T>();
  }
  return launch_step<T>(number, p, save);
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
  p.reserve = const_cast<T*>(reserve.const_data_ptr<T>());
  p.d_h_new = data<T>(d_h);
  p.d_c_new = data<T>(d_c);
  return launch_step_backward<T>(number, p, {need_input, h.has_value(), c.has_value(), need_weights});
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
