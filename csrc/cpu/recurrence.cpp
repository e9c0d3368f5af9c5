// The recurrence operators on a CPU: checks, allocation, the layout of rows and the number of threads. The loops are
// in recurrence_forward.h and recurrence_backward.h.
#include "recurrence.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "allocate.h"
#include "launch.h"
#include "workspace.h"

namespace seqattn {
namespace {

enum Layout : int64_t { kTimeMajor = 0, kBatchFirst = 1, kPacked = 2 };

// Owns the arrays of Rows. `sizes`: lengths [B] of padded layouts (null: all full) or the batch sizes [T] of a packed
// sequence.
class RowPlan {
 public:
  RowPlan(const Tensor& input, const std::optional<Tensor>& sizes, int64_t layout) {
    if (layout < kTimeMajor || layout > kPacked) fail("layout: expected 0, 1 or 2, got ", layout);
    const int64_t rank = layout == kPacked ? 2 : 3;
    if (input.dim() != rank) fail("input: expected ", rank, " dimensions, got shape ", shape_of(input));
    const int64_t* values = nullptr;
    if (sizes) {
      if (sizes->scalar_type() != ScalarType::Long || sizes->dim() != 1 || !sizes->is_contiguous() ||
          !sizes->is_cpu()) {
        fail("sizes: expected a contiguous CPU tensor of int64 with one dimension");
      }
      values = sizes->const_data_ptr<int64_t>();
    }
    if (layout == kPacked) {
      if (!sizes) fail("sizes: expected the batch sizes of the packed sequence, got None");
      packed(input.size(0), values, sizes->size(0));
    } else {
      const bool batch_first = layout == kBatchFirst;
      const int64_t steps = input.size(batch_first ? 1 : 0), batch = input.size(batch_first ? 0 : 1);
      if (sizes && sizes->size(0) != batch) fail("lengths: expected [", batch, "], got ", shape_of(*sizes));
      padded(steps, batch, values, batch_first);
    }
    finish();
  }

  const Rows& rows() const { return rows_; }

 private:
  void allocate(int64_t steps, int64_t batch) {
    rows_.steps = steps;
    rows_.batch = batch;
    active_.assign(steps, batch);
    step_row_.resize(steps);
    batch_row_.resize(batch);
    batch_index_.resize(batch);
    length_.assign(batch, steps);
    std::iota(batch_index_.begin(), batch_index_.end(), int64_t(0));
  }

  void packed(int64_t rows, const int64_t* batch_sizes, int64_t steps) {
    const int64_t batch = steps ? batch_sizes[0] : 0;
    if (batch < 0) fail("batch_sizes: expected positive sizes, got ", batch);
    allocate(steps, batch);
    int64_t row = 0;
    for (int64_t t = 0; t < steps; ++t) {
      if (batch_sizes[t] < 1 || (t && batch_sizes[t] > batch_sizes[t - 1])) {
        fail("batch_sizes: expected positive sizes that never grow, got ", batch_sizes[t], " at step ", t);
      }
      active_[t] = batch_sizes[t];
      step_row_[t] = row;
      row += batch_sizes[t];
      for (int64_t i = active_[t]; t && i < active_[t - 1]; ++i) length_[i] = t;
    }
    if (row != rows) fail("batch_sizes: expected a sum of ", rows, " (rows of the data), got ", row);
    std::iota(batch_row_.begin(), batch_row_.end(), int64_t(0));
  }

  void padded(int64_t steps, int64_t batch, const int64_t* lengths, bool batch_first) {
    allocate(steps, batch);
    if (lengths) {
      for (int64_t b = 0; b < batch; ++b) {
        if (lengths[b] < 0 || lengths[b] > steps) {
          fail("lengths: expected values from 0 to ", steps, " (steps of the input), got ", lengths[b], " at ", b);
        }
      }
      std::stable_sort(batch_index_.begin(), batch_index_.end(),
                       [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
      for (int64_t i = 0; i < batch; ++i) length_[i] = lengths[batch_index_[i]];
      for (int64_t t = 0, n = batch; t < steps; ++t) {
        while (n > 0 && length_[n - 1] <= t) --n;
        active_[t] = n;
      }
      rows_.zero_fill = batch > 0 && length_[batch - 1] < steps;
    }
    for (int64_t t = 0; t < steps; ++t) step_row_[t] = batch_first ? t : t * batch;
    for (int64_t i = 0; i < batch; ++i) batch_row_[i] = batch_index_[i] * (batch_first ? steps : 1);
  }

  void finish() {
    first_.resize(rows_.steps + 1);
    first_[0] = 0;
    rows_.dense = true;
    for (int64_t t = 0; t < rows_.steps; ++t) {
      first_[t + 1] = first_[t] + active_[t];
      rows_.dense = rows_.dense && step_row_[t] == first_[t];
    }
    for (int64_t i = 0; i < rows_.batch; ++i) rows_.dense = rows_.dense && batch_row_[i] == i;
    rows_.active = active_.data();
    rows_.first = first_.data();
    rows_.step_row = step_row_.data();
    rows_.batch_row = batch_row_.data();
    rows_.batch_index = batch_index_.data();
    rows_.length = length_.data();
  }

  Rows rows_{};
  std::vector<int64_t> active_, first_, step_row_, batch_row_, batch_index_, length_;
};

template <class T>
const RecurrenceKernels<T>& kernels() {
  const RecurrenceTable& table = SEQATTN_KERNELS(recurrence_kernels);
  if constexpr (sizeof(T) == 4) {
    return table.f32;
  } else {
    return table.f64;
  }
}

template <class T>
const ForwardKernels<T>& forward_kernels(bool bfloat16) {
  if constexpr (sizeof(T) == 4) {
    if (bfloat16) return SEQATTN_BFLOAT16_KERNELS(bfloat16_kernels);
  } else if (bfloat16) {
    fail("weights: expected float32 to round to bfloat16, got float64");
  }
  return kernels<T>();
}

// Checks the weights of every direction against the input and fills in their pointers and the sizes.
template <class T>
Sizes read_weights(const CellInfo& cell, int64_t input_size, const std::vector<Tensor>& weights, bool has_bias,
                   std::vector<Direction<T>>* directions) {
  if (weights.size() < 2 || weights[1].dim() != 2) fail("weights: expected w_ih [G*H, I] and w_hh [G*H, H] first");
  Sizes sizes{};
  sizes.input = input_size;
  sizes.hidden = weights[1].size(0) / cell.gates;
  sizes.output = weights[1].size(1);
  sizes.projected = sizes.output != sizes.hidden;
  if (sizes.projected && !cell.has_cell) {
    fail("weight_hh: expected [", weights[1].size(0), ", ", sizes.hidden, "], got ", shape_of(weights[1]));
  }
  const size_t base = has_bias ? 4 : 2, stride = base + (sizes.projected ? 1 : 0);
  const size_t count = weights.size() / stride;
  if (count * stride != weights.size() || count < 1 || count > 2) {
    fail("weights: expected ", stride, " tensors for each of one or two directions, got ", weights.size());
  }
  const int64_t rows = cell.gates * sizes.hidden;
  for (size_t i = 0; i < count; ++i) {
    const Tensor* w = &weights[i * stride];
    check_tensor("weight_ih", w[0], dtype_of<T>(), {rows, sizes.input});
    check_tensor("weight_hh", w[1], dtype_of<T>(), {rows, sizes.output});
    if (has_bias) {
      check_tensor("bias_ih", w[2], dtype_of<T>(), {rows});
      check_tensor("bias_hh", w[3], dtype_of<T>(), {rows});
    }
    if (sizes.projected) check_tensor("weight_hr", w[base], dtype_of<T>(), {sizes.output, sizes.hidden});
    for (size_t j = 0; j < stride; ++j) {
      if (!w[j].is_contiguous()) fail("weights: expected contiguous tensors");
    }
    Direction<T> d{};
    d.reverse = i == 1;
    d.w_ih = w[0].const_data_ptr<T>();
    d.w_hh = w[1].const_data_ptr<T>();
    d.b_ih = has_bias ? w[2].const_data_ptr<T>() : nullptr;
    d.b_hh = has_bias ? w[3].const_data_ptr<T>() : nullptr;
    d.w_hr = sizes.projected ? w[base].const_data_ptr<T>() : nullptr;
    directions->push_back(d);
  }
  return sizes;
}

// A thread must have some microseconds of work in all, and more at every step than a barrier costs.
template <class T>
int plan_threads(const CellInfo& cell, const Sizes& sizes, const Rows& rows, int directions, double passes) {
  const double products = passes * double(rows.first[rows.steps]) * cell.gates * double(sizes.hidden) *
                          double(sizes.input + sizes.output) * directions;
  const double by_total = products / 2e5,
               by_step = products / directions / double(std::max<int64_t>(rows.steps, 1)) / 6e3;
  const int64_t most = directions * ((sizes.hidden + kUnitPad - 1) / kUnitPad);
  const double useful = std::min({by_total, std::max(by_step, double(directions)), double(most)});
  return int(std::clamp(useful, 1.0, double(torch::stable::get_num_threads())));
}

template <class T>
void prepare(RecurrenceProblem<T>* p, std::vector<BarrierFlag>* flags, int64_t pack_values) {
  flags->assign(size_t(p->directions) * p->threads, BarrierFlag{});
  p->flags = flags->data();
  p->shared_scratch = padded(p->shared_scratch);
  p->thread_scratch = padded(p->thread_scratch);
  const int64_t values = p->directions * (p->shared_scratch + pack_values) + p->threads * p->thread_scratch;
  p->scratch = static_cast<T*>(workspace(size_t(values) * sizeof(T)));
  if (!pack_values) return;
  T* packed = p->scratch + p->directions * p->shared_scratch + p->threads * p->thread_scratch;
  for (int i = 0; i < p->directions; ++i) p->direction[i].packed = packed + i * pack_values;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    int64_t number, const Tensor& input, const std::optional<Tensor>& sizes_or_lengths, int64_t layout,
    const std::optional<Tensor>& h0, const std::optional<Tensor>& c0, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& packed, bool has_bias, bool save, bool cell_states) {
  const CellInfo& cell = cell_info(number);
  const RowPlan plan(input, sizes_or_lengths, layout);
  const Rows& rows = plan.rows();
  std::vector<Direction<T>> directions;
  const Sizes sizes = read_weights<T>(cell, input.size(-1), weights, has_bias, &directions);
  const int64_t D = int64_t(directions.size()), B = rows.batch;
  if (!input.is_contiguous()) fail("input: expected a contiguous tensor");
  if (h0) check_tensor("h0", *h0, dtype_of<T>(), {D, B, sizes.output});
  if (c0) check_tensor("c0", *c0, dtype_of<T>(), {D, B, sizes.hidden});
  if ((h0 && !h0->is_contiguous()) || (c0 && !c0->is_contiguous())) fail("hx: expected contiguous tensors");

  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  const int64_t all_rows = layout == kPacked ? input.size(0) : rows.steps * B;
  shape.back() = D * sizes.output;
  Tensor output = allocate(input, shape);
  shape.back() = D * sizes.hidden;
  const std::vector<int64_t> none{0};
  Tensor states = allocate(input, cell_states && cell.has_cell ? shape : none);
  Tensor hn = allocate(input, {D, B, sizes.output});
  Tensor cn = allocate(input, cell.has_cell ? std::vector<int64_t>{D, B, sizes.hidden} : none);
  const int64_t reserve_values = all_rows * reserved(cell.saved) * padded(sizes.hidden);
  Tensor reserve =
      allocate(input, save ? std::vector<int64_t>{D, all_rows, reserved(cell.saved) * padded(sizes.hidden)} : none);

  RecurrenceProblem<T> p{};
  p.rows = rows;
  p.sizes = sizes;
  p.input = input.const_data_ptr<T>();
  p.ld_input = sizes.input;
  p.ld_output = D * sizes.output;
  p.ld_cell = D * sizes.hidden;
  p.directions = int(D);
  const bool prepacked = !packed.empty();
  const bool bfloat16 = prepacked && packed[0].scalar_type() == ScalarType::BFloat16;
  if (bfloat16 && save) fail("packed: expected no bfloat16 where gradients are wanted");
  const ForwardKernels<T>& k = forward_kernels<T>(bfloat16);
  const int64_t pack_values = k.packed_size(int(number), sizes);
  if (prepacked && int64_t(packed.size()) != D) fail("packed: expected ", D, " tensors, got ", packed.size());
  for (int64_t i = 0; i < D; ++i) {
    Direction<T>& d = p.direction[i] = directions[i];
    d.h0 = h0 ? h0->const_data_ptr<T>() + i * B * sizes.output : nullptr;
    d.c0 = c0 ? c0->const_data_ptr<T>() + i * B * sizes.hidden : nullptr;
    d.output = output.mutable_data_ptr<T>() + i * sizes.output;
    d.cell_states = cell_states && cell.has_cell ? states.mutable_data_ptr<T>() + i * sizes.hidden : nullptr;
    d.hn = hn.mutable_data_ptr<T>() + i * B * sizes.output;
    d.cn = cell.has_cell ? cn.mutable_data_ptr<T>() + i * B * sizes.hidden : nullptr;
    d.reserve = save ? reserve.mutable_data_ptr<T>() + i * reserve_values : nullptr;
    if (prepacked) {
      if (bfloat16) {
        check_tensor("packed", packed[i], ScalarType::BFloat16, {2 * pack_values});
      } else {
        check_tensor("packed", packed[i], dtype_of<T>(), {pack_values});
      }
      d.packed = static_cast<T*>(const_cast<void*>(packed[i].const_data_ptr()));
    }
  }
  p.threads = plan_threads<T>(cell, sizes, rows, int(D), 1.0);
  // Pre-activations of a chunk should stay in a core's cache beside a panel of weights.
  const int64_t row_bytes =
      cell.slots * padded(sizes.hidden) * int64_t(sizeof(T)) / std::max<int64_t>(1, p.threads / D);
  p.chunk_rows = std::min(std::max<int64_t>(rows.first[rows.steps], 1),
                          std::max(B, std::clamp<int64_t>((256 << 10) / std::max<int64_t>(row_bytes, 1), 24, 256)));
  if (prepacked) {
    p.ih = p.hh = WeightUse::given;
  } else if (all_rows <= 32 && B < 24) {
    p.ih = p.hh = WeightUse::in_place;
  } else {
    p.ih = rows.first[rows.steps] <= p.chunk_rows ? WeightUse::in_cache : WeightUse::packed;
    p.hh = rows.steps == 1 ? WeightUse::in_cache : WeightUse::packed;
  }
  k.forward_scratch(int(number), &p);
  std::vector<BarrierFlag> flags;
  prepare(&p, &flags, prepacked ? 0 : pack_values);
  run_gang(p.threads, [&](Gang& gang) { k.forward(int(number), p, gang); });
  return {output, hn, cn, states, reserve};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    int64_t number, const Tensor& input, const std::optional<Tensor>& sizes_or_lengths, int64_t layout,
    const std::optional<Tensor>& h0, const std::optional<Tensor>& c0, const std::vector<Tensor>& weights, bool has_bias,
    const Tensor& reserve, const std::optional<Tensor>& d_output, const std::optional<Tensor>& d_hn,
    const std::optional<Tensor>& d_cn, const std::optional<Tensor>& d_cell_states, bool need_input, bool need_weights) {
  const CellInfo& cell = cell_info(number);
  const RowPlan plan(input, sizes_or_lengths, layout);
  const Rows& rows = plan.rows();
  std::vector<Direction<T>> directions;
  const Sizes sizes = read_weights<T>(cell, input.size(-1), weights, has_bias, &directions);
  const int64_t D = int64_t(directions.size()), B = rows.batch;
  const int64_t all_rows = layout == kPacked ? input.size(0) : rows.steps * B;
  const int64_t reserve_values = all_rows * reserved(cell.saved) * padded(sizes.hidden);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = D * sizes.output;
  if (d_output) check_tensor("d_output", *d_output, dtype_of<T>(), shape);
  shape.back() = D * sizes.hidden;
  if (d_cell_states) check_tensor("d_cell_states", *d_cell_states, dtype_of<T>(), shape);
  if (d_hn) check_tensor("d_hn", *d_hn, dtype_of<T>(), {D, B, sizes.output});
  if (d_cn) check_tensor("d_cn", *d_cn, dtype_of<T>(), {D, B, sizes.hidden});
  if (h0) check_tensor("h0", *h0, dtype_of<T>(), {D, B, sizes.output});
  if (c0) check_tensor("c0", *c0, dtype_of<T>(), {D, B, sizes.hidden});
  check_tensor("reserve", reserve, dtype_of<T>(), {D, all_rows, reserved(cell.saved) * padded(sizes.hidden)});
  for (const auto* t : {&d_output, &d_hn, &d_cn, &d_cell_states, &h0, &c0}) {
    if (*t && !(*t)->is_contiguous()) fail("gradients and states: expected contiguous tensors");
  }
  if (!input.is_contiguous()) fail("input: expected a contiguous tensor");

  const std::vector<int64_t> none{0};
  std::vector<int64_t> input_shape(input.sizes().begin(), input.sizes().end());
  if (D > 1) input_shape.insert(input_shape.begin(), D);
  Tensor d_input = allocate(input, need_input ? input_shape : none);
  Tensor d_h0 = allocate(input, h0 ? std::vector<int64_t>{D, B, sizes.output} : none);
  Tensor d_c0 = allocate(input, c0 ? std::vector<int64_t>{D, B, sizes.hidden} : none);
  std::vector<Tensor> d_weights;
  if (need_weights) {
    for (const Tensor& w : weights) {
      d_weights.push_back(rows.first[rows.steps] ? allocate(w, w.sizes().data(), w.dim())
                                                 : torch::stable::new_zeros(w, w.sizes()));
    }
  }

  RecurrenceProblem<T> p{};
  p.rows = rows;
  p.sizes = sizes;
  p.input = input.const_data_ptr<T>();
  p.ld_input = sizes.input;
  p.ld_output = D * sizes.output;
  p.ld_cell = D * sizes.hidden;
  p.directions = int(D);
  const size_t stride = weights.size() / D;
  for (int64_t i = 0; i < D; ++i) {
    Direction<T>& d = p.direction[i] = directions[i];
    d.h0 = h0 ? h0->const_data_ptr<T>() + i * B * sizes.output : nullptr;
    d.c0 = c0 ? c0->const_data_ptr<T>() + i * B * sizes.hidden : nullptr;
    d.reserve = const_cast<T*>(reserve.const_data_ptr<T>()) + i * reserve_values;
    d.d_output = d_output ? data<T>(d_output) + i * sizes.output : nullptr;
    d.d_cell_states = d_cell_states ? data<T>(d_cell_states) + i * sizes.hidden : nullptr;
    d.d_hn = d_hn ? data<T>(d_hn) + i * B * sizes.output : nullptr;
    d.d_cn = d_cn ? data<T>(d_cn) + i * B * sizes.hidden : nullptr;
    d.d_h0 = h0 ? d_h0.mutable_data_ptr<T>() + i * B * sizes.output : nullptr;
    d.d_c0 = c0 ? d_c0.mutable_data_ptr<T>() + i * B * sizes.hidden : nullptr;
    d.d_input = need_input ? d_input.mutable_data_ptr<T>() + i * all_rows * sizes.input : nullptr;
    if (need_weights) {
      Tensor* w = &d_weights[i * stride];
      d.d_w_ih = w[0].mutable_data_ptr<T>();
      d.d_w_hh = w[1].mutable_data_ptr<T>();
      d.d_b_ih = has_bias ? w[2].mutable_data_ptr<T>() : nullptr;
      d.d_b_hh = has_bias ? w[3].mutable_data_ptr<T>() : nullptr;
      d.d_w_hr = sizes.projected ? w[stride - 1].mutable_data_ptr<T>() : nullptr;
    }
  }
  p.threads = plan_threads<T>(cell, sizes, rows, int(D), 2.0);
  p.chunk_rows = std::min(std::max<int64_t>(rows.first[rows.steps], 1), std::max<int64_t>(B, 512));
  p.ih = p.hh = all_rows <= 32 ? WeightUse::in_place : WeightUse::packed;
  const RecurrenceKernels<T>& k = kernels<T>();
  k.backward_scratch(int(number), &p);
  std::vector<BarrierFlag> flags;
  prepare(&p, &flags, 0);
  run_gang(p.threads, [&](Gang& gang) { k.backward(int(number), p, gang); });
  if (need_input && D > 1) d_input = torch::stable::sum(d_input, std::vector<int64_t>{0});
  return {d_input, d_h0, d_c0, d_weights};
}

template <class T>
std::vector<Tensor> pack(int64_t number, const std::vector<Tensor>& weights, bool has_bias, bool bfloat16) {
  const CellInfo& cell = cell_info(number);
  std::vector<Direction<T>> directions;
  if (weights.empty() || weights[0].dim() != 2) fail("weights: expected weight_ih [G*H, I] first");
  const Sizes sizes = read_weights<T>(cell, weights[0].size(1), weights, has_bias, &directions);
  const ForwardKernels<T>& k = forward_kernels<T>(bfloat16);
  const int64_t size = k.packed_size(int(number), sizes);
  std::vector<Tensor> packed;
  for (Direction<T>& d : directions) {
    packed.push_back(bfloat16 ? torch::stable::new_empty(weights[0], {2 * size}, ScalarType::BFloat16)
                              : torch::stable::new_empty(weights[0], {size}));
    d.packed = static_cast<T*>(packed.back().mutable_data_ptr());
    want_huge_pages(d.packed, size_t(size) * sizeof(T));
    run_gang(int(torch::stable::get_num_threads()), [&](Gang& gang) { k.pack(int(number), sizes, d, gang); });
  }
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_fwd_cpu(
    int64_t cell, Tensor input, std::optional<Tensor> sizes, int64_t layout, std::optional<Tensor> h0,
    std::optional<Tensor> c0, std::vector<Tensor> weights, std::vector<Tensor> packed, bool has_bias, bool save,
    bool cell_states, bool, bool) {
  return with_dtype(input, [&](auto t) {
    return forward<decltype(t)>(cell, input, sizes, layout, h0, c0, weights, packed, has_bias, save, cell_states);
  });
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrence_bwd_cpu(
    int64_t cell, Tensor input, std::optional<Tensor> sizes, int64_t layout, std::optional<Tensor> h0,
    std::optional<Tensor> c0, std::vector<Tensor> weights, bool has_bias, Tensor reserve,
    std::optional<Tensor> d_output, std::optional<Tensor> d_hn, std::optional<Tensor> d_cn,
    std::optional<Tensor> d_cell_states, bool need_input, bool need_weights, bool, bool) {
  return with_dtype(input, [&](auto t) {
    return backward<decltype(t)>(cell, input, sizes, layout, h0, c0, weights, has_bias, reserve, d_output, d_hn, d_cn,
                                 d_cell_states, need_input, need_weights);
  });
}

std::vector<Tensor> recurrence_pack_cpu(int64_t cell, std::vector<Tensor> weights, bool has_bias, bool bfloat16) {
  if (weights.empty()) fail("weights: expected tensors, got an empty list");
  return with_dtype(weights[0], [&](auto t) { return pack<decltype(t)>(cell, weights, has_bias, bfloat16); });
}

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("recurrence_fwd", TORCH_BOX(&recurrence_fwd_cpu));
  m.impl("recurrence_bwd", TORCH_BOX(&recurrence_bwd_cpu));
  m.impl("recurrence_pack", TORCH_BOX(&recurrence_pack_cpu));
}

}  // namespace
}  // namespace seqattn
