// One step of a recurrent cell, forward and backward, for one instruction set.
//
// A step has no time to pack weights beforehand. Forward takes dot products straight from torch's layout for few rows,
// and packs one panel after the other into cache for many; packed weights are used where they are given. Backward reads
// W_ih and W_hh in place, as their rows already run along its output.
#include "../cells/registry.h"
#include "cell.h"
#include "recurrence_backward.h"
#include "with_cell.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// From this batch on, packing a panel costs less than the sums across lanes that dot products end with.
constexpr int64_t kPackFrom = 24;

template <class Cell, class T>
void step_forward_scratch(StepProblem<T>* p) {
  constexpr int kUnits = PackedWeights<Cell, T>::kUnits;
  const int64_t width = kUnits * kLanes<T>;
  p->shared_scratch = 0;
  p->thread_scratch = p->batch * Cell::kSlots * width;
  if (!p->packed && p->batch >= kPackFrom) {
    p->thread_scratch += Cell::kGates * width * (p->sizes.input > p->sizes.hidden ? p->sizes.input : p->sizes.hidden);
  }
}

template <class Cell, class T>
class StepForward {
 public:
  StepForward(const StepProblem<T>& p, T* own)
      : p_(p),
        sizes_(p.sizes),
        packed_(p.sizes, const_cast<T*>(p.packed)),
        pre_(own),
        panel_(own + p.batch * Cell::kSlots * PackedWeights<Cell, T>::kUnits * W) {}

  void run(Gang& gang) {
    int64_t begin, end;
    gang.share(packed_.panels.groups, &begin, &end);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = packed_.panels.begin(p), units = packed_.panels.begin(p + 1) - first;
      set_biases(first, units);
      if (p_.packed) {
        multiply(packed_.ih_panel(p), packed_.hh_panel(p), units);
      } else if (p_.batch >= kPackFrom) {
        pack_and_multiply(first, units);
      } else {
        for (int64_t v = 0; v < units; ++v) multiply_in_place(first + v, v, units);
      }
      for (int64_t i = 0; i < p_.batch; ++i) {
        for (int64_t v = 0; v < units; ++v) apply_cell(i, v, units, (first + v) * W);
      }
    }
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int kHSlot = Cell::kSlots - Cell::kGates;

  void set_biases(int64_t first, int64_t units) {
    const int64_t ld = Cell::kSlots * units * W;
    for (int slot = 0; slot < Cell::kSlots; ++slot) {
      for (int64_t v = 0; v < units; ++v) {
        const int64_t unit = (first + v) * W, left = sizes_.hidden - unit;
        Vec<T> sum{};
        if (p_.b_ih && slot < Cell::kGates)
          sum += load_partial(p_.b_ih + Cell::x_gate(slot) * sizes_.hidden + unit, left);
        if (p_.b_hh && slot >= kHSlot) sum += load_partial(p_.b_hh + Cell::h_gate(slot) * sizes_.hidden + unit, left);
        T* out = pre_ + (slot * units + v) * W;
        for (int64_t i = 0; i < p_.batch; ++i) store(out + i * ld, sum);
      }
    }
  }

  void multiply(const T* ih, const T* hh, int64_t units) {
    const int64_t ld = Cell::kSlots * units * W;
    packed_.multiply(pre_, ld, p_.x, sizes_.input, ih, sizes_.input, p_.batch, units);
    if (p_.h) packed_.multiply(pre_ + kHSlot * units * W, ld, p_.h, sizes_.hidden, hh, sizes_.hidden, p_.batch, units);
  }

  void pack_and_multiply(int64_t first, int64_t units) {
    const int64_t ld = Cell::kSlots * units * W;
    pack_panel<Cell>(panel_, p_.w_ih, sizes_.input, sizes_.hidden, first, units, &Cell::x_gate, 0);
    packed_.multiply(pre_, ld, p_.x, sizes_.input, panel_, sizes_.input, p_.batch, units);
    if (!p_.h) return;
    pack_panel<Cell>(panel_, p_.w_hh, sizes_.hidden, sizes_.hidden, first, units, &Cell::h_gate, kHSlot);
    packed_.multiply(pre_ + kHSlot * units * W, ld, p_.h, sizes_.hidden, panel_, sizes_.hidden, p_.batch, units);
  }

  void multiply_in_place(int64_t vector, int64_t v, int64_t units) {
    const int64_t unit = vector * W, ld = Cell::kSlots * units * W;
    const int64_t n = sizes_.hidden - unit < W ? sizes_.hidden - unit : W;
    for (int slot = 0; slot < Cell::kSlots; ++slot) {
      DotProduct<T> products[2];
      int count = 0;
      if (slot < Cell::kGates) {
        products[count++] = {p_.x, sizes_.input, p_.w_ih + (Cell::x_gate(slot) * sizes_.hidden + unit) * sizes_.input,
                             sizes_.input};
      }
      if (slot >= kHSlot && p_.h) {
        products[count++] = {p_.h, sizes_.hidden, p_.w_hh + (Cell::h_gate(slot) * sizes_.hidden + unit) * sizes_.hidden,
                             sizes_.hidden};
      }
      if (count) multiply_dots(pre_ + (slot * units + v) * W, ld, products, count, p_.batch, n);
    }
  }

  void apply_cell(int64_t i, int64_t v, int64_t units, int64_t unit) {
    const int64_t left = sizes_.hidden - unit, width = padded(sizes_.hidden);
    const T* pre = pre_ + (i * Cell::kSlots * units + v) * W;
    Vec<T> slots[Cell::kSlots], saved[Cell::kSaved + 1], h{}, c{}, h_new, c_new{};
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSlots; ++s) slots[s] = load(pre + s * units * W);
    if (p_.h) h = load_partial(p_.h + i * sizes_.hidden + unit, left);
    if (Cell::kHasCell && p_.c) c = load_partial(p_.c + i * sizes_.hidden + unit, left);
    Cell::template forward<Math<T>>(slots, h, c, &h_new, &c_new, saved);
    store_partial(p_.h_new + i * sizes_.hidden + unit, h_new, left);
    if constexpr (Cell::kHasCell) store_partial(p_.c_new + i * sizes_.hidden + unit, c_new, left);
    if (!p_.reserve) return;
    if constexpr (Cell::kSaved == 0) saved[0] = h_new;
    T* reserve = p_.reserve + i * step_reserved(Cell::kSaved) * width + unit;
    for (int s = 0; s < step_reserved(Cell::kSaved); ++s) store(reserve + s * width, saved[s]);
  }

  const StepProblem<T>& p_;
  const Sizes& sizes_;
  const PackedWeights<Cell, T> packed_;
  T* pre_;    // [batch][slot][units]
  T* panel_;  // one panel of W_ih or W_hh
};

template <class Cell, class T>
struct StepBackwardScratch {
  int64_t ld_grad, ld_t;
  T *grad, *grad_t, *end;  // [batch][slot][unit] gradients of the pre-activations; transposed

  StepBackwardScratch(const StepProblem<T>& p, T* data) {
    const int64_t width = padded(p.sizes.hidden);
    ld_grad = Cell::kSlots * width + kUnitPad;
    ld_t = p.batch == 1 ? 1 : padded(p.batch);
    grad = data;
    grad_t = grad + p.batch * ld_grad;
    end = grad_t + Cell::kSlots * width * ld_t + kUnitPad;
  }
};

template <class Cell, class T>
void step_backward_scratch(StepProblem<T>* p) {
  const StepBackwardScratch<Cell, T> layout(*p, nullptr);
  const Sizes& s = p->sizes;
  p->shared_scratch = layout.end - static_cast<T*>(nullptr);
  // A panel of x, h or (at the ragged end of a row) weights, and a product before it is copied to its place.
  const int64_t tall = p->batch > s.hidden ? p->batch : s.hidden;
  p->thread_scratch = 2 * padded(tall) * kMaxPanel * kLanes<T>;
}

template <class Cell, class T>
class StepBackward {
 public:
  StepBackward(const StepProblem<T>& p, T* own, Gang& gang)
      : p_(p),
        sizes_(p.sizes),
        gang_(gang),
        s_(p, p.scratch),
        panel_(own),
        product_(own + padded(p.batch > p.sizes.hidden ? p.batch : p.sizes.hidden) * kMaxPanel * W) {
    gang_.share(vectors_of<T>(sizes_.hidden), &unit_begin_, &unit_end_);
    unit_begin_ *= W;
    unit_end_ *= W;
    if (unit_end_ > sizes_.hidden) unit_end_ = sizes_.hidden;
  }

  void run() {
    for (int64_t i = 0; i < p_.batch; ++i) {
      for (int64_t unit = unit_begin_; unit < unit_end_; unit += W) cell_gradients(i, unit);
    }
    if (p_.d_w_ih && unit_begin_ < unit_end_) weight_gradients();
    gang_.barrier();
    if (p_.d_h) through_weights(p_.d_h, sizes_.hidden, p_.w_hh, kHSlot, Cell::h_gate, true);
    if (p_.d_x) through_weights(p_.d_x, sizes_.input, p_.w_ih, 0, Cell::x_gate, false);
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int kHSlot = Cell::kSlots - Cell::kGates;

  void cell_gradients(int64_t i, int64_t unit) {
    const int64_t left = sizes_.hidden - unit, width = padded(sizes_.hidden), at = i * sizes_.hidden + unit;
    Vec<T> saved[Cell::kSaved + 1], h{}, c{}, dh{}, dc{}, d_pre[Cell::kSlots], dh_old{}, dc_old{};
    const T* reserve = p_.reserve + i * step_reserved(Cell::kSaved) * width + unit;
    for (int s = 0; s < step_reserved(Cell::kSaved); ++s) saved[s] = load(reserve + s * width);
    if (!Cell::kHasCell && p_.h) h = load_partial(p_.h + at, left);
    if (Cell::kHasCell && p_.c) c = load_partial(p_.c + at, left);
    if (p_.d_h_new) dh = load_partial(p_.d_h_new + at, left);
    if (Cell::kHasCell && p_.d_c_new) dc = load_partial(p_.d_c_new + at, left);
    Cell::template backward<Math<T>>(saved, h, c, saved[0], dh, dc, d_pre, &dh_old, &dc_old);
    T* grad = s_.grad + i * s_.ld_grad + unit;
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSlots; ++s) {
      store_partial(grad + s * width, d_pre[s], left);
      if (p_.batch == 1) store_partial(s_.grad_t + s * width + unit, d_pre[s], left);
    }
    if (p_.d_h) store_partial(p_.d_h + at, dh_old, left);
    if (Cell::kHasCell && p_.d_c) store_partial(p_.d_c + at, dc_old, left);
  }

  void weight_gradients() {
    const int64_t width = padded(sizes_.hidden), own = unit_end_ - unit_begin_;
    for (int s = 0; s < Cell::kSlots; ++s) {
      const int64_t slot = s * width + unit_begin_;
      for (int64_t i = 0; i < p_.batch && p_.batch > 1; i += W) {
        transpose_strip(s_.grad_t + slot * s_.ld_t + i, s_.ld_t, s_.grad + i * s_.ld_grad + slot, s_.ld_grad,
                        p_.batch - i < W ? p_.batch - i : W, own);
      }
      if (!p_.d_b_ih) continue;
      for (int64_t u = 0; u < own; u += W) {
        Vec<T> sum{};
        for (int64_t i = 0; i < p_.batch; ++i) sum += load_partial(s_.grad + i * s_.ld_grad + slot + u, own - u);
        const int64_t unit = unit_begin_ + u;
        if (s < Cell::kGates) store_partial(p_.d_b_ih + Cell::x_gate(s) * sizes_.hidden + unit, sum, own - u);
        if (s >= kHSlot) store_partial(p_.d_b_hh + Cell::h_gate(s) * sizes_.hidden + unit, sum, own - u);
      }
    }
    outer_product(p_.d_w_ih, p_.x, sizes_.input, 0, Cell::x_gate);
    outer_product(p_.d_w_hh, p_.h, sizes_.hidden, kHSlot, Cell::h_gate);
  }

  // dw[gate * H + unit][column] = sum over the batch of gradient * value, for this thread's units.
  void outer_product(T* dw, const T* values, int64_t columns, int first_slot, int (*gate_of)(int)) {
    const Groups groups(vectors_of<T>(columns));
    const int64_t own = unit_end_ - unit_begin_;
    for (int64_t g = 0; g < groups.groups; ++g) {
      const int64_t column = groups.begin(g) * W, vectors = groups.begin(g + 1) - groups.begin(g);
      pack_rows(
          panel_, [&](int64_t i) { return values ? values + i * columns : nullptr; }, p_.batch, column, columns,
          vectors);
      for (int s = first_slot; s < first_slot + Cell::kGates; ++s) {
        const T* a = s_.grad_t + (s * padded(sizes_.hidden) + unit_begin_) * s_.ld_t;
        multiply_ragged(dw + (gate_of(s) * sizes_.hidden + unit_begin_) * columns, columns, a, s_.ld_t, panel_,
                        vectors * W, p_.batch, own, column, vectors, false, product_);
      }
    }
  }

  // out[i][column] (+)= sum over gates and units of gradient * w[gate * H + unit][column], for this thread's columns.
  void through_weights(T* out, int64_t columns, const T* w, int first_slot, int (*gate_of)(int), bool add) {
    const Groups groups(vectors_of<T>(columns));
    int64_t begin, end;
    gang_.share(groups.groups, &begin, &end);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t column = groups.begin(g) * W, vectors = groups.begin(g + 1) - groups.begin(g);
      const bool ragged = column + vectors * W > columns;
      for (int s = first_slot; s < first_slot + Cell::kGates; ++s) {
        const T* rows = w + gate_of(s) * sizes_.hidden * columns;
        const T* b = rows + column;
        if (ragged) {
          pack_rows(panel_, [&](int64_t k) { return rows + k * columns; }, sizes_.hidden, column, columns, vectors);
          b = panel_;
        }
        multiply_ragged(out, columns, s_.grad + s * padded(sizes_.hidden), s_.ld_grad, b,
                        ragged ? vectors * W : columns, sizes_.hidden, p_.batch, column, vectors, add || s > first_slot,
                        product_);
      }
    }
  }

  const StepProblem<T>& p_;
  const Sizes& sizes_;
  Gang& gang_;
  const StepBackwardScratch<Cell, T> s_;
  T *panel_, *product_;
  int64_t unit_begin_, unit_end_;
};

template <class T>
constexpr StepKernels<T> kernels() {
  return {
      [](int number, StepProblem<T>* p) {
        with_cell(number, [&](auto cell) { step_forward_scratch<decltype(cell), T>(p); });
      },
      [](int number, const StepProblem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) {
          StepForward<decltype(cell), T>(p, p.scratch + p.shared_scratch + gang.rank * p.thread_scratch).run(gang);
        });
      },
      [](int number, StepProblem<T>* p) {
        with_cell(number, [&](auto cell) { step_backward_scratch<decltype(cell), T>(p); });
      },
      [](int number, const StepProblem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) {
          StepBackward<decltype(cell), T>(p, p.scratch + p.shared_scratch + gang.rank * p.thread_scratch, gang).run();
        });
      },
  };
}

}  // namespace

extern const StepTable step_kernels;
const StepTable step_kernels = {kernels<float>(), kernels<double>()};

}  // namespace seqattn::SEQATTN_ISA
