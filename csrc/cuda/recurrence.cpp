// The recurrence and cell operators on CUDA: checks, memory, products, and the kernels between them.
#include <algorithm>
#include <vector>

#include "factors.h"
#include "problem.h"
#include "stepwise.h"

namespace seqattn::gpu {
namespace {

// Consecutive slots that are consecutive gates in torch's order too.
struct Run {
  int slot, gate, count;
};

std::vector<Run> runs(int first_slot, int slots, int (*gate)(int)) {
  std::vector<Run> found;
  for (int s = first_slot; s < first_slot + slots; ++s) {
    if (!found.empty() && gate(s) == found.back().gate + found.back().count) {
      ++found.back().count;
    } else {
      found.push_back({s, gate(s), 1});
    }
  }
  return found;
}

#define SEQATTN_X_GATE(Cell) Cell::x_gate,
#define SEQATTN_H_GATE(Cell) Cell::h_gate,
int (*const kXGate[])(int) = {SEQATTN_FOR_EACH_CELL(SEQATTN_X_GATE)};
int (*const kHGate[])(int) = {SEQATTN_FOR_EACH_CELL(SEQATTN_H_GATE)};
#undef SEQATTN_X_GATE
#undef SEQATTN_H_GATE

std::vector<int64_t> shape_vector(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

char* offset(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

Plan plan(const Problem& p, bool backward, bool stepwise) {
  if (stepwise) return {};
  return plan_recurrence(
      {p.number, p.sizes.hidden, p.rows.batch, p.directions, p.dtype, backward, p.sizes.projected, p.allow_tf32},
      device_of(p.input.get_device_index()));
}

Tensor workspace_of(const Problem& p, const Plan& plan) {
  Tensor workspace = p.make_bytes(plan.workspace_bytes);
  if (plan.workspace_bytes) clear(workspace.mutable_data_ptr(), plan.workspace_bytes, p.stream());
  return workspace;
}

// The input in the internal order. With `masked`, rows that are not valid are zero.
Tensor internal_input(const Problem& p, bool masked) {
  if (!p.reordered() && !(masked && p.rows.lengths && !p.rows.offsets)) return p.input;
  Tensor x = p.make({p.rows.rows, p.sizes.input});
  gather_rows(p.dtype, p.rows, p.input.const_data_ptr(), x.mutable_data_ptr(), p.sizes.input, p.stream());
  return x;
}

Tensor combined_bias(const Problem& p) {
  const int64_t H = p.sizes.hidden;
  Tensor bias = p.make_sum({p.directions, p.cell.slots * H});
  const void *ih[2] = {}, *hh[2] = {};
  for (int d = 0; d < p.directions; ++d) {
    ih[d] = p.weight_data(d, 2);
    hh[d] = p.weight_data(d, 3);
  }
  combine_bias(p.number, p.dtype, H, p.directions, ih, hh, bias.mutable_data_ptr(), p.stream());
  return bias;
}

void forward_stepwise(Problem& p, const Forward& args, void* unprojected_rows) {
  const Products products = p.products();
  const int64_t D = p.directions, B = p.rows.batch, H = p.sizes.hidden, N = p.sizes.output, GH = p.cell.gates * H;
  void* stream = p.stream();
  ForwardStep step{};
  step.args = args;
  step.h = args.hn;
  convert(p.dtype, args.h0, p.dtype, step.h, D * B * N, stream);
  const DType sums = p.sum_type == p.type ? p.dtype : DType::kFloat32;
  Tensor c = p.make_sum({p.cell.has_cell && sums != p.dtype ? D * B * H : 0});
  if (p.cell.has_cell) {
    step.c = sums == p.dtype ? args.cn : c.mutable_data_ptr();
    convert(p.dtype, args.c0, sums, step.c, D * B * H, stream);
  }
  Tensor h_gates = p.make_sum({D * B * GH});
  step.h_gates = h_gates.mutable_data_ptr();
  const Tensor h_view = products.view({step.h, B, N, N, false, D, B * N});
  const Tensor w_hh = products.view(transpose(p.recurrent_weight()));
  const Tensor gates_view = products.view_sum({h_gates.mutable_data_ptr(), B, GH, GH, false, D, B * GH});
  Tensor unprojected = p.make({p.sizes.projected ? D * B * H : 0});
  Tensor projected = p.make_sum({p.sizes.projected ? D * B * N : 0});
  if (!p.sizes.projected) {
    for (int64_t t = 0; t < p.rows.steps; ++t) {
      products.multiply_to_sum(gates_view, h_view, w_hh);
      step_forward(step, t, stream);
    }
  } else {
    step.unprojected = unprojected.mutable_data_ptr();
    step.unprojected_rows = unprojected_rows;
    step.projected = projected.mutable_data_ptr();
    const Tensor unprojected_view = products.view({step.unprojected, B, H, H, false, D, B * H});
    const Tensor projected_view = products.view_sum({projected.mutable_data_ptr(), B, N, N, false, D, B * N});
    const Tensor w_hr = products.view(transpose(p.recurrent_weight(true)));
    for (int64_t t = 0; t < p.rows.steps; ++t) {
      products.multiply_to_sum(gates_view, h_view, w_hh);
      step_forward(step, t, stream);
      products.multiply_to_sum(projected_view, unprojected_view, w_hr);
      project_forward(step, t, stream);
    }
  }
  if (p.cell.has_cell && step.c != args.cn) convert(sums, step.c, p.dtype, args.cn, D * B * H, stream);
}

struct Results {
  Tensor output, hn, cn, cell_rows, reserve;
};

Results forward(Problem& p, const OptionalTensor& h0, const OptionalTensor& c0, bool save, bool cell_states,
                bool stepwise) {
  const int64_t D = p.directions, B = p.rows.batch, H = p.sizes.hidden, N = p.sizes.output, GH = p.cell.gates * H;
  const int64_t rows = p.rows.rows;
  const bool keep_cells = cell_states && p.cell.has_cell;
  const std::vector<int64_t> none{0};
  Forward a{};
  a.h0 = p.checked("h0", h0, {D, B, N});
  a.c0 = p.checked("c0", c0, {D, B, H});
  Results r{p.make(p.rows_shape(D * N)), p.make({D, B, N}), p.make(p.cell.has_cell ? std::vector{D, B, H} : none),
            p.make(keep_cells ? p.rows_shape(D * H) : none), p.make_bytes(save ? p.reserve_bytes() : 0)};
  const Reserve reserve = save ? p.reserve(r.reserve.mutable_data_ptr()) : Reserve{};
  a.cell = p.number;
  a.dtype = p.dtype;
  a.allow_tf32 = p.allow_tf32;
  a.hidden = H;
  a.output = N;
  a.directions = p.directions;
  a.rows = p.rows;
  a.output_rows = r.output.mutable_data_ptr();
  a.cell_rows = keep_cells ? r.cell_rows.mutable_data_ptr() : nullptr;
  a.ld_output = D * N;
  a.ld_cell = D * H;
  a.hn = r.hn.mutable_data_ptr();
  a.cn = p.cell.has_cell ? r.cn.mutable_data_ptr() : nullptr;
  a.saved = reserve.saved;
  a.cells = reserve.cells;
  a.h_prev = reserve.h_prev;

  Tensor x_gates = p.make({D, rows, GH});
  if (rows) {
    const int64_t I = p.sizes.input;
    Tensor x = internal_input(p, false);
    SplitFactors split_factors(p);
    for (int d = 0; d < D; ++d) {
      void* to = offset(x_gates.mutable_data_ptr(), d * rows * GH * p.item);
      product(p, split_factors, {to, rows, GH, GH}, {{const_cast<void*>(x.const_data_ptr()), rows, I, I}},
              {transpose({p.weight_data(d, 0), GH, I, I})});
    }
  }
  Tensor bias = p.has_bias ? combined_bias(p) : p.make_sum(none);
  a.x_gates = x_gates.const_data_ptr();
  a.bias = p.has_bias ? bias.const_data_ptr() : nullptr;
  for (int d = 0; d < D; ++d) a.w_hh[d] = p.weight_data(d, 1);

  const Plan chosen = rows ? plan(p, false, stepwise) : Plan{};
  if (chosen.kernel == Kernel::kStepwise) {
    forward_stepwise(p, a, reserve.unprojected);
  } else {
    Tensor workspace = workspace_of(p, chosen);
    if (const char* error = persistent_forward(chosen, a, workspace.mutable_data_ptr(), p.stream())) fail(error);
  }
  return r;
}

void backward_stepwise(Problem& p, const Backward& args, void* d_projected_rows) {
  const Products products = p.products();
  const int64_t D = p.directions, B = p.rows.batch, H = p.sizes.hidden, N = p.sizes.output, GH = p.cell.gates * H;
  void* stream = p.stream();
  const DType sums = p.sum_type == p.type ? p.dtype : DType::kFloat32;
  Tensor dh_product = p.make_sum({D * B * N}), dh_carry = p.make_sum({D * B * N});
  Tensor dc = p.make_sum({p.cell.has_cell ? D * B * H : 0}), d_step = p.make({D * B * GH});
  convert(p.dtype, nullptr, sums, dh_product.mutable_data_ptr(), D * B * N, stream);
  convert(p.dtype, args.d_hn, sums, dh_carry.mutable_data_ptr(), D * B * N, stream);
  if (p.cell.has_cell) convert(p.dtype, args.d_cn, sums, dc.mutable_data_ptr(), D * B * H, stream);
  BackwardStep step{};
  step.args = args;
  step.dh_product = dh_product.mutable_data_ptr();
  step.dh_carry = dh_carry.mutable_data_ptr();
  step.dc = p.cell.has_cell ? dc.mutable_data_ptr() : nullptr;
  step.d_step = d_step.mutable_data_ptr();
  const Tensor d_step_view = products.view({step.d_step, B, GH, GH, false, D, B * GH});
  const Tensor product_view = products.view_sum({dh_product.mutable_data_ptr(), B, N, N, false, D, B * N});
  const Tensor w_hh = products.view(p.recurrent_weight());
  Tensor d_projected = p.make({p.sizes.projected ? D * B * N : 0});
  Tensor d_unprojected = p.make_sum({p.sizes.projected ? D * B * H : 0});
  if (!p.sizes.projected) {
    for (int64_t t = p.rows.steps - 1; t >= 0; --t) {
      step_backward(step, t, stream);
      products.multiply_to_sum(product_view, d_step_view, w_hh);
    }
  } else {
    step.d_projected = d_projected.mutable_data_ptr();
    step.d_projected_rows = d_projected_rows;
    step.d_unprojected = d_unprojected.mutable_data_ptr();
    const Tensor d_projected_view = products.view({step.d_projected, B, N, N, false, D, B * N});
    const Tensor d_unprojected_view = products.view_sum({d_unprojected.mutable_data_ptr(), B, H, H, false, D, B * H});
    const Tensor w_hr = products.view(p.recurrent_weight(true));
    for (int64_t t = p.rows.steps - 1; t >= 0; --t) {
      project_backward(step, t, stream);
      products.multiply_to_sum(d_unprojected_view, d_projected_view, w_hr);
      step_backward(step, t, stream);
      products.multiply_to_sum(product_view, d_step_view, w_hh);
    }
  }
  finish_backward(step, stream);
}

// d_gates [directions][rows][slots * hidden] -> gradients of the input.
Tensor input_gradient(const Problem& p, void* d_gates) {
  const int64_t rows = p.rows.rows, I = p.sizes.input, H = p.sizes.hidden, SH = p.cell.slots * H;
  const bool moved = p.reordered();
  Tensor d_input = p.make(p.rows_shape(I));
  Tensor d_rows = moved ? p.make({rows, I}) : d_input;
  std::vector<Matrix> gates, weights;
  for (int d = 0; d < p.directions; ++d) {
    for (const Run& run : runs(0, p.cell.gates, kXGate[p.number])) {
      gates.push_back({offset(d_gates, (d * rows * SH + run.slot * H) * p.item), rows, run.count * H, SH});
      weights.push_back({offset(p.weight_data(d, 0), run.gate * H * I * p.item), run.count * H, I, I});
    }
  }
  SplitFactors split_factors(p);
  product(p, split_factors, {d_rows.mutable_data_ptr(), rows, I, I}, gates, weights);
  if (moved) scatter_rows(p.dtype, p.rows, d_rows.const_data_ptr(), d_input.mutable_data_ptr(), I, p.stream());
  return d_input;
}

// Gradient of a weight [G * hidden, width] from the gradients of `first_slot` and the slots after, and the rows it met.
void weight_gradient(const Problem& p, SplitFactors& split_factors, int d, void* d_gates, int first_slot,
                     int (*gate)(int), const void* met, int64_t width, const Tensor& to) {
  const int64_t rows = p.rows.rows, H = p.sizes.hidden, SH = p.cell.slots * H;
  for (const Run& run : runs(first_slot, p.cell.gates, gate)) {
    const Matrix gates{offset(d_gates, (d * rows * SH + run.slot * H) * p.item), rows, run.count * H, SH};
    void* part = offset(to.mutable_data_ptr(), run.gate * H * width * p.item);
    product(p, split_factors, {part, run.count * H, width, width}, {transpose(gates)},
            {{const_cast<void*>(met), rows, width, width}});
  }
}

std::vector<Tensor> weight_gradients(const Problem& p, void* d_gates, const Reserve& reserve,
                                     const Tensor& d_projected_rows) {
  const int64_t rows = p.rows.rows, H = p.sizes.hidden, N = p.sizes.output, SH = p.cell.slots * H;
  std::vector<Tensor> found;
  for (const Tensor& w : p.weights) {
    found.push_back(rows ? p.make(shape_vector(w)) : torch::stable::new_zeros(w, w.sizes()));
  }
  if (!rows) return found;
  const Tensor x = internal_input(p, true);
  Tensor partial = p.make_sum({p.has_bias ? column_chunks(rows) * SH : 0}), sums = p.make_sum({SH});
  for (int d = 0; d < p.directions; ++d) {
    SplitFactors split_factors(p);
    Tensor* to = &found[d * p.stride()];
    weight_gradient(p, split_factors, d, d_gates, 0, kXGate[p.number], x.const_data_ptr(), p.sizes.input, to[0]);
    weight_gradient(p, split_factors, d, d_gates, p.cell.slots - p.cell.gates, kHGate[p.number],
                    offset(reserve.h_prev, d * rows * N * p.item), N, to[1]);
    if (p.has_bias) {
      column_sums(p.dtype, offset(d_gates, d * rows * SH * p.item), rows, SH, partial.mutable_data_ptr(),
                  sums.mutable_data_ptr(), p.stream());
      split_bias(p.number, p.dtype, H, sums.const_data_ptr(), to[2].mutable_data_ptr(), to[3].mutable_data_ptr(),
                 p.stream());
    }
    if (p.sizes.projected) {
      const Matrix projected{offset(d_projected_rows.mutable_data_ptr(), d * rows * N * p.item), rows, N, N};
      product(p, split_factors, {to[p.stride() - 1].mutable_data_ptr(), N, H, H}, {transpose(projected)},
              {{offset(reserve.unprojected, d * rows * H * p.item), rows, H, H}});
    }
  }
  return found;
}

struct Gradients {
  Tensor input, h0, c0;
  std::vector<Tensor> weights;
};

Gradients backward(Problem& p, const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& reserve_bytes,
                   const OptionalTensor& d_output, const OptionalTensor& d_hn, const OptionalTensor& d_cn,
                   const OptionalTensor& d_cell_states, bool need_input, bool need_weights, bool stepwise) {
  const int64_t D = p.directions, B = p.rows.batch, H = p.sizes.hidden, N = p.sizes.output;
  const int64_t rows = p.rows.rows;
  if (reserve_bytes.scalar_type() != ScalarType::Byte || reserve_bytes.numel() != p.reserve_bytes() ||
      !on_device(reserve_bytes) || reserve_bytes.get_device_index() != p.input.get_device_index()) {
    fail("reserve: expected the ", p.reserve_bytes(), " bytes that forward returned");
  }
  const Reserve reserve = p.reserve(const_cast<void*>(reserve_bytes.const_data_ptr()));
  const std::vector<int64_t> none{0};
  p.checked("h0", h0, {D, B, N});
  Gradients r{p.make(none), p.make(h0 ? std::vector{D, B, N} : none), p.make(c0 ? std::vector{D, B, H} : none), {}};
  Backward a{};
  a.cell = p.number;
  a.dtype = p.dtype;
  a.allow_tf32 = p.allow_tf32;
  a.hidden = H;
  a.output = N;
  a.directions = p.directions;
  a.rows = p.rows;
  a.saved = reserve.saved;
  a.cells = reserve.cells;
  a.h_prev = reserve.h_prev;
  a.c0 = p.checked("c0", c0, {D, B, H});
  a.d_output = p.checked("d_output", d_output, p.rows_shape(D * N));
  a.d_cell_rows = p.checked("d_cell_states", d_cell_states, p.rows_shape(D * H));
  a.ld_output = D * N;
  a.ld_cell = D * H;
  a.d_hn = p.checked("d_hn", d_hn, {D, B, N});
  a.d_cn = p.checked("d_cn", d_cn, {D, B, H});
  Tensor d_gates = p.make({D, rows, p.cell.slots * H});
  Tensor d_projected_rows = p.make({p.sizes.projected ? D * rows * N : 0});
  a.d_gates = d_gates.mutable_data_ptr();
  a.d_h0 = h0 ? r.h0.mutable_data_ptr() : nullptr;
  a.d_c0 = c0 ? r.c0.mutable_data_ptr() : nullptr;
  for (int d = 0; d < D; ++d) a.w_hh[d] = p.weight_data(d, 1);

  const Plan chosen = rows ? plan(p, true, stepwise) : Plan{};
  if (chosen.kernel == Kernel::kStepwise) {
    backward_stepwise(p, a, d_projected_rows.mutable_data_ptr());
  } else {
    Tensor workspace = workspace_of(p, chosen);
    if (const char* error = persistent_backward(chosen, a, workspace.mutable_data_ptr(), p.stream())) fail(error);
  }
  if (need_input) r.input = rows ? input_gradient(p, a.d_gates) : p.make(p.rows_shape(p.sizes.input));
  if (need_weights) r.weights = weight_gradients(p, a.d_gates, reserve, d_projected_rows);
  return r;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_fwd_cuda(int64_t cell, Tensor input, OptionalTensor sizes,
                                                                       int64_t layout, OptionalTensor h0,
                                                                       OptionalTensor c0, std::vector<Tensor> weights,
                                                                       std::vector<Tensor> packed, bool has_bias,
                                                                       bool save, bool cell_states, bool allow_tf32,
                                                                       bool stepwise) {
  if (!packed.empty()) fail("packed: expected none with CUDA tensors, got ", packed.size());
  const DeviceGuard guard(input.get_device_index());
  Problem p(cell, input, sizes, layout, weights, has_bias, allow_tf32);
  Results r = forward(p, h0, c0, save, cell_states, stepwise);
  return {r.output, r.hn, r.cn, r.cell_rows, r.reserve};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrence_bwd_cuda(
    int64_t cell, Tensor input, OptionalTensor sizes, int64_t layout, OptionalTensor h0, OptionalTensor c0,
    std::vector<Tensor> weights, bool has_bias, Tensor reserve, OptionalTensor d_output, OptionalTensor d_hn,
    OptionalTensor d_cn, OptionalTensor d_cell_states, bool need_input, bool need_weights, bool allow_tf32,
    bool stepwise) {
  const DeviceGuard guard(input.get_device_index());
  Problem p(cell, input, sizes, layout, weights, has_bias, allow_tf32);
  Gradients r = backward(p, h0, c0, reserve, d_output, d_hn, d_cn, d_cell_states, need_input, need_weights, stepwise);
  return {r.input, r.h0, r.c0, r.weights};
}

// A step of a cell is a sequence of one step.
Tensor as_sequence(const Tensor& t) {
  return torch::stable::unsqueeze(t.is_contiguous() ? t : torch::stable::contiguous(t), 0);
}

OptionalTensor as_sequence(const OptionalTensor& t) { return t ? OptionalTensor(as_sequence(*t)) : std::nullopt; }

Problem cell_problem(int64_t cell, const Tensor& input, std::vector<Tensor> weights, bool has_bias) {
  if (input.dim() != 2) fail("input: expected [B, I], got ", shape_of(input));
  if (weights.size() != (has_bias ? 4 : 2)) {
    fail("weights: expected ", has_bias ? 4 : 2, " tensors, got ", weights.size());
  }
  for (Tensor& w : weights) {
    if (!w.is_contiguous()) w = torch::stable::contiguous(w);
  }
  return Problem(cell, as_sequence(input), std::nullopt, kTimeMajor, weights, has_bias, false);
}

std::vector<Tensor> cell_fwd_cuda(int64_t cell, Tensor input, OptionalTensor h, OptionalTensor c,
                                  std::vector<Tensor> weights, std::vector<Tensor> packed, bool has_bias, bool save) {
  if (!packed.empty()) fail("packed: expected none with CUDA tensors, got ", packed.size());
  const DeviceGuard guard(input.get_device_index());
  Problem p = cell_problem(cell, input, weights, has_bias);
  Results r = forward(p, as_sequence(h), as_sequence(c), save, false, true);
  std::vector<Tensor> results{torch::stable::squeeze(r.hn, 0)};
  if (p.cell.has_cell) results.push_back(torch::stable::squeeze(r.cn, 0));
  if (save) results.push_back(r.reserve);
  return results;
}

std::vector<Tensor> cell_bwd_cuda(int64_t cell, Tensor input, OptionalTensor h, OptionalTensor c,
                                  std::vector<Tensor> weights, bool has_bias, Tensor reserve, OptionalTensor d_h,
                                  OptionalTensor d_c, bool need_input, bool need_weights) {
  const DeviceGuard guard(input.get_device_index());
  Problem p = cell_problem(cell, input, weights, has_bias);
  Gradients r = backward(p, as_sequence(h), as_sequence(c), reserve, std::nullopt, as_sequence(d_h), as_sequence(d_c),
                         std::nullopt, need_input, need_weights, true);
  std::vector<Tensor> results;
  if (need_input) results.push_back(torch::stable::squeeze(r.input, 0));
  if (h) results.push_back(torch::stable::squeeze(r.h0, 0));
  if (c) results.push_back(torch::stable::squeeze(r.c0, 0));
  results.insert(results.end(), r.weights.begin(), r.weights.end());
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(SEQATTN_LIBRARY, SEQATTN_DISPATCH_KEY, m) {
  m.impl("recurrence_fwd", TORCH_BOX(&recurrence_fwd_cuda));
  m.impl("recurrence_bwd", TORCH_BOX(&recurrence_bwd_cuda));
  m.impl("cell_fwd", TORCH_BOX(&cell_fwd_cuda));
  m.impl("cell_bwd", TORCH_BOX(&cell_bwd_cuda));
}

}  // namespace
}  // namespace seqattn::gpu
