// Backward pass of one recurrent layer. Included by recurrence_kernels.cpp, once per instruction set.
//
// A reverse loop over blocks of steps. Within a block, each step turns dh, dc into gradients of the pre-activations
// (kept for the block as rows [slot][unit]) and those, times W_hh, into dh of the step before. The block's gradients
// then serve as one operand of three larger products: dW_ih, dW_hh (transposed first) and dx. Blocks keep all of it in
// cache and the memory flat in T. Threads share the units; each output value is summed by one thread, in order.
#pragma once

#include "recurrence_forward.h"

namespace seqattn::SEQATTN_ISA {

// Row-major w[K][N] (row k at w + row_of(k) * ld; null: zeros) as panels [group][K][vectors of the group].
template <class T, class RowOf>
void pack_rows(T* out, RowOf&& row_of, int64_t K, int64_t column, int64_t n, int64_t vectors) {
  constexpr int W = kLanes<T>;
  for (int64_t k = 0; k < K; ++k, out += vectors * W) {
    const T* row = row_of(k);
    for (int64_t v = 0; v < vectors; ++v) {
      store(out + v * W, row ? load_partial(row + column + v * W, n - column - v * W) : Vec<T>{});
    }
  }
}

// c[row][column...] (+)= a b for rows of c of `columns` values, where the last vector of the panel may reach past their
// end; `product` holds a panel's product meanwhile.
template <class T>
void multiply_ragged(T* c, int64_t columns, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K, int64_t rows,
                     int64_t column, int64_t vectors, bool add, T* product) {
  constexpr int W = kLanes<T>;
  if (column + vectors * W <= columns) {
    multiply_strided(c + column, columns, a, lda, b, ldb, K, rows, int(vectors), add);
    return;
  }
  multiply_strided(product, vectors * W, a, lda, b, ldb, K, rows, int(vectors), false);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      T* out = c + r * columns + column + v * W;
      const int64_t left = columns - column - v * W;
      Vec<T> value = load(product + (r * vectors + v) * W);
      if (add) value += load_partial(out, left);
      store_partial(out, value, left);
    }
  }
}

template <class Cell, class T>
struct BackwardScratch {
  static constexpr int W = kLanes<T>;
  int64_t block, ld_grad, ld_t, ld_h, ld_c, ld_dp, ld_full;
  T *hh, *ih, *hr;                         // panels of W_hh [out group][slot rows], W_ih [in group], W_hr [H group]
  T *grad, *grad_t, *dh, *dc, *dp, *full;  // see the constructor
  T* end;

  BackwardScratch(const RecurrenceProblem<T>& p, T* data) {
    const Sizes& s = p.sizes;
    const int64_t width = padded(s.hidden), batch = p.rows.batch;
    block = p.chunk_rows;
    ld_grad = Cell::kSlots * width + kUnitPad;
    ld_t = row_stride(block);
    ld_h = row_stride(s.output);
    ld_c = width;
    ld_dp = row_stride(s.output);
    ld_full = row_stride(s.hidden);
    T* at = data;
    auto take = [&](int64_t n) {
      T* start = at;
      at += padded(n);
      return start;
    };
    hh = take(Cell::kGates * width * padded(s.output));
    ih = take(Cell::kGates * width * padded(s.input));
    grad = take(block * ld_grad);                  // [block row][slot][unit] gradients of the pre-activations
    grad_t = take(Cell::kSlots * width * ld_t);    // the same, transposed
    dh = take(batch * ld_h);                       // [batch][output] gradient of h of the step before
    dc = take(Cell::kHasCell ? batch * ld_c : 0);  // [batch][hidden]
    hr = take(s.projected ? s.output * width : 0);
    dp = take(s.projected ? block * ld_dp : 0);      // [block row][output] gradients of the projected h
    full = take(s.projected ? block * ld_full : 0);  // [block row][hidden] h before projection
    end = at;
  }
};

template <class Cell, class T>
void backward_scratch(RecurrenceProblem<T>* p) {
  const BackwardScratch<Cell, T> layout(*p, nullptr);
  p->shared_scratch = layout.end - static_cast<T*>(nullptr);
  const int64_t rows = p->chunk_rows > padded(p->sizes.hidden) ? p->chunk_rows : padded(p->sizes.hidden);
  p->thread_scratch = (p->chunk_rows + rows) * kMaxPanel * kLanes<T>;
}

template <class Cell, class T>
class BackwardDirection {
 public:
  BackwardDirection(const RecurrenceProblem<T>& problem, int index, T* shared, T* own, Gang& gang)
      : p_(problem),
        d_(problem.direction[index]),
        rows_(problem.rows),
        sizes_(problem.sizes),
        gang_(gang),
        s_(problem, shared),
        units_(vectors_of<T>(sizes_.hidden)),
        outputs_(vectors_of<T>(sizes_.output)),
        inputs_(vectors_of<T>(sizes_.input)),
        panel_(own),
        product_(own + problem.chunk_rows * kMaxPanel * W) {
    int64_t begin, end;
    gang_.share(units_.groups, &begin, &end);
    unit_begin_ = units_.begin(begin) * W;
    unit_end_ = units_.begin(end) * W;
    if (unit_end_ > sizes_.hidden) unit_end_ = sizes_.hidden;
    unit_group_begin_ = begin;
    unit_group_end_ = end;
    gang_.share(outputs_.groups, &output_begin_, &output_end_);
  }

  void run() {
    begin();
    gang_.barrier();
    for (int64_t s = rows_.steps; s > 0;) {
      // The block's steps [t0, t1) in time; the loop walks them from the last step processed to the first.
      int64_t t0, t1;
      if (d_.reverse) {
        t0 = rows_.steps - s;
        for (t1 = t0 + 1; t1 < rows_.steps && rows_.first[t1 + 1] - rows_.first[t0] <= s_.block;) ++t1;
      } else {
        t1 = s;
        for (t0 = t1 - 1; t0 > 0 && rows_.first[t1] - rows_.first[t0 - 1] <= s_.block;) --t0;
      }
      for (int64_t i = 0; i < t1 - t0; ++i) step(d_.reverse ? t0 + i : t1 - 1 - i, rows_.first[t0]);
      const int64_t n = rows_.first[t1] - rows_.first[t0];
      const bool add = s != rows_.steps;
      if (d_.d_w_ih) weight_gradients(t0, t1, n, add);
      if (d_.d_input && n) input_gradients(t0, t1, n);
      gang_.barrier();
      s -= t1 - t0;
    }
    finish();
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int kHSlot = Cell::kSlots - Cell::kGates;
  static constexpr int kReserved = reserved(Cell::kSaved);

  // Row k of [slot][padded unit] in torch's w[gate * H + unit][ld]; null in the padding.
  const T* slot_row(const T* w, int64_t ld, int64_t k, int (*gate_of)(int), int first_slot) const {
    const int64_t width = padded(sizes_.hidden), unit = k % width;
    if (unit >= sizes_.hidden) return nullptr;
    return w + (gate_of(first_slot + int(k / width)) * sizes_.hidden + unit) * ld;
  }

  void begin() {
    const int64_t K = Cell::kGates * padded(sizes_.hidden);
    for (int64_t g = output_begin_; g < output_end_; ++g) {
      const int64_t first = outputs_.begin(g), n = outputs_.begin(g + 1) - first;
      if (in_place(first, n, sizes_.output)) continue;
      pack_rows(
          s_.hh + first * W * K, [&](int64_t k) { return slot_row(d_.w_hh, sizes_.output, k, &Cell::h_gate, kHSlot); },
          K, first * W, sizes_.output, n);
    }
    int64_t begin, end;
    if (d_.d_input) {
      gang_.share(inputs_.groups, &begin, &end);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = inputs_.begin(g), n = inputs_.begin(g + 1) - first;
        if (in_place(first, n, sizes_.input)) continue;
        pack_rows(
            s_.ih + first * W * K, [&](int64_t k) { return slot_row(d_.w_ih, sizes_.input, k, &Cell::x_gate, 0); }, K,
            first * W, sizes_.input, n);
      }
    }
    if (sizes_.projected) {
      for (int64_t g = unit_group_begin_; g < unit_group_end_; ++g) {
        const int64_t first = units_.begin(g), n = units_.begin(g + 1) - first;
        pack_rows(
            s_.hr + first * W * sizes_.output, [&](int64_t k) { return d_.w_hr + k * sizes_.hidden; }, sizes_.output,
            first * W, sizes_.hidden, n);
      }
    }
    // The products below run over padded units: what no vector covers must not hold leftovers.
    const int64_t width = padded(sizes_.hidden), covered = vectors_of<T>(sizes_.hidden) * W;
    gang_.share(covered < width ? s_.block : 0, &begin, &end);
    for (int64_t r = begin; r < end; ++r) {
      for (int s = 0; s < Cell::kSlots; ++s)
        set_row(s_.grad + r * s_.ld_grad + s * width + covered, nullptr, 0, width - covered);
    }
    gang_.share(rows_.batch, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = rows_.batch_index[i];
      set_row(s_.dh + i * s_.ld_h, d_.d_hn ? d_.d_hn + b * sizes_.output : nullptr, sizes_.output, s_.ld_h);
      if constexpr (Cell::kHasCell) {
        set_row(s_.dc + i * s_.ld_c, d_.d_cn ? d_.d_cn + b * sizes_.hidden : nullptr, sizes_.hidden, s_.ld_c);
      }
    }
  }

  static void set_row(T* out, const T* in, int64_t n, int64_t ld) {
    __builtin_memset(out, 0, std::size_t(ld) * sizeof(T));
    if (in) __builtin_memcpy(out, in, std::size_t(n) * sizeof(T));
  }

  // Whether sequence i has a step processed just before t, and when.
  int64_t previous(int64_t t, int64_t i) const {
    if (!d_.reverse) return t - 1;
    return t + 1 < rows_.steps && i < rows_.active[t + 1] ? t + 1 : -1;
  }

  // What forward kept of step t: [kSaved values, h][padded(hidden)].
  const T* reserve(int64_t t, int64_t i) const { return d_.reserve + (rows_.first[t] + i) * kReserved * s_.ld_c; }

  // Values of h just before step t, or null for zeros.
  const T* previous_h(int64_t t, int64_t i) const {
    const int64_t before = previous(t, i);
    if (before >= 0) return reserve(before, i) + Cell::kSaved * s_.ld_c;
    return d_.h0 ? d_.h0 + rows_.batch_index[i] * sizes_.output : nullptr;
  }

  void step(int64_t t, int64_t block_first) {
    const int64_t n = rows_.active[t];
    if (n == 0) return;
    const int64_t local = rows_.first[t] - block_first;
    const bool last = t == (d_.reverse ? rows_.steps - 1 : 0);
    if (sizes_.projected) {
      project_gradients(t, n, local);
      gang_.barrier();
      for (int64_t g = unit_group_begin_; g < unit_group_end_; ++g) {
        const int64_t first = units_.begin(g), vectors = units_.begin(g + 1) - first;
        multiply_panel(s_.full + local * s_.ld_full + first * W, s_.ld_full, s_.dp + local * s_.ld_dp, s_.ld_dp,
                       s_.hr + first * W * sizes_.output, sizes_.output, n, int(vectors), false);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t unit = unit_begin_; unit < unit_end_; unit += W) cell_gradients(t, i, local + i, unit);
    }
    gang_.barrier();
    if (last && !d_.d_h0) return;  // the gradient of h before all steps isn't wanted
    for (int64_t j = output_begin_; j < output_end_; ++j) {
      const bool backwards = t % 2;  // meets in cache what the last step left
      const int64_t g = backwards ? output_end_ - 1 - (j - output_begin_) : j;
      const int64_t first = outputs_.begin(g), vectors = outputs_.begin(g + 1) - first;
      through_weights(s_.dh + first * W, s_.ld_h, s_.grad + local * s_.ld_grad, n, s_.hh, d_.w_hh, sizes_.output, first,
                      vectors, kHSlot, Cell::h_gate, !sizes_.projected,
                      j + 1 < output_end_ ? outputs_.begin(backwards ? g - 1 : g + 1) : -1);
    }
  }

  // Whether a group of columns of W_ih or W_hh is read as torch keeps it: with few rows, where its last vector ends
  // inside the matrix.
  bool in_place(int64_t first, int64_t vectors, int64_t columns) const {
    return p_.hh == WeightUse::in_place && (first + vectors) * W <= columns;
  }

  // c[row][columns of the group] (+)= gradients of the gates from first_slot on, times their rows of w. The group of
  // columns after it begins at vector `next`, or there is none (-1).
  void through_weights(T* c, int64_t ldc, const T* grad, int64_t rows, const T* packed, const T* w, int64_t columns,
                       int64_t first, int64_t vectors, int first_slot, int (*gate_of)(int), bool add, int64_t next) {
    const int64_t width = padded(sizes_.hidden), K = Cell::kGates * width;
    if (!in_place(first, vectors, columns)) {
      multiply_panel(c, ldc, grad + first_slot * width, s_.ld_grad, packed + first * W * K, K, rows, int(vectors), add,
                     next < 0 ? nullptr : packed + next * W * K);
      return;
    }
    for (int s = first_slot; s < first_slot + Cell::kGates; ++s) {
      multiply_strided(c, ldc, grad + s * width, s_.ld_grad, w + gate_of(s) * sizes_.hidden * columns + first * W,
                       columns, sizes_.hidden, rows, int(vectors), add || s > first_slot);
    }
  }

  // Gradients of the projected h: what came from outside and from the step after, for this thread's outputs.
  void project_gradients(int64_t t, int64_t n, int64_t local) {
    const int64_t begin = outputs_.begin(output_begin_) * W;
    int64_t end = outputs_.begin(output_end_) * W;
    for (int64_t i = 0; i < n; ++i) {
      T* dp = s_.dp + (local + i) * s_.ld_dp;
      const T* dy = d_.d_output ? d_.d_output + rows_.row(t, i) * p_.ld_output : nullptr;
      for (int64_t j = begin; j < end; j += W) {
        Vec<T> sum = load(s_.dh + i * s_.ld_h + j);
        if (dy) sum += load_partial(dy + j, sizes_.output - j);
        store(dp + j, sum);
      }
    }
  }

  void cell_gradients(int64_t t, int64_t i, int64_t local, int64_t unit) {
    const int64_t left = sizes_.hidden - unit, width = s_.ld_c, row = rows_.row(t, i);
    Vec<T> saved[Cell::kSaved + 1], h{}, c{}, h_new{}, dh, dc{}, d_pre[Cell::kSlots], dh_old{}, dc_old{};
    const T* kept = reserve(t, i) + unit;
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSaved; ++s) saved[s] = load(kept + s * width);
    if constexpr (Cell::kHasCell) {
      const int64_t before = previous(t, i);
      if (before >= 0) {
        c = load(reserve(before, i) + (Cell::kSaved - 1) * width + unit);
      } else if (d_.c0) {
        c = load_partial(d_.c0 + rows_.batch_index[i] * sizes_.hidden + unit, left);
      }
      dc = load(s_.dc + i * s_.ld_c + unit);
      if (d_.d_cell_states) dc += load_partial(d_.d_cell_states + row * p_.ld_cell + unit, left);
    } else {
      if (const T* before = previous_h(t, i)) h = load_partial(before + unit, left);
      h_new = load(kept + Cell::kSaved * width);
    }
    if (sizes_.projected) {
      dh = load(s_.full + local * s_.ld_full + unit);
    } else {
      dh = load(s_.dh + i * s_.ld_h + unit);
      if (d_.d_output) dh += load_partial(d_.d_output + row * p_.ld_output + unit, left);
    }
    Cell::template backward<Math<T>>(saved, h, c, h_new, dh, dc, d_pre, &dh_old, &dc_old);
    T* grad = s_.grad + local * s_.ld_grad + unit;
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSlots; ++s) {
      store(grad + s * width, Vec<T>{});
      store_partial(grad + s * width, d_pre[s], left);
    }
    if constexpr (Cell::kHasCell) store(s_.dc + i * s_.ld_c + unit, dc_old);
    if (sizes_.projected) {
      // The gradient of h before projection is used up; the place serves h itself, for the gradient of W_hr.
      if constexpr (Cell::kHasCell) store(s_.full + local * s_.ld_full + unit, saved[3] * tanh<T>(saved[4]));
    } else {
      store(s_.dh + i * s_.ld_h + unit, dh_old);
    }
  }

  void weight_gradients(int64_t t0, int64_t t1, int64_t n, bool add) {
    const int64_t width = padded(sizes_.hidden), own = unit_end_ - unit_begin_;
    if (own <= 0) return;
    for (int s = 0; s < Cell::kSlots; ++s) {
      const int64_t slot = s * width + unit_begin_;
      for (int64_t r = 0; r < n; r += W) {
        transpose_strip(s_.grad_t + slot * s_.ld_t + r, s_.ld_t, s_.grad + r * s_.ld_grad + slot, s_.ld_grad,
                        n - r < W ? n - r : W, own);
      }
      if (!d_.d_b_ih) continue;
      for (int64_t u = 0; u < own; ++u) {
        const T* row = s_.grad_t + (slot + u) * s_.ld_t;
        Vec<T> sum{};
        for (int64_t r = 0; r < n; r += W) sum += load_partial(row + r, n - r);
        const T total = sum_lanes<T>(sum);
        const int64_t unit = unit_begin_ + u;
        if (s < Cell::kGates) accumulate(d_.d_b_ih + Cell::x_gate(s) * sizes_.hidden + unit, total, add);
        if (s >= kHSlot) accumulate(d_.d_b_hh + Cell::h_gate(s) * sizes_.hidden + unit, total, add);
      }
    }
    outer_product(t0, t1, n, sizes_.input, d_.d_w_ih, 0, Cell::x_gate, add,
                  [&](int64_t t, int64_t i) { return p_.input + rows_.row(t, i) * p_.ld_input; });
    if (rows_.steps == 1 && !d_.h0) {  // no state came before
      for (int g = 0; g < Cell::kGates; ++g) {
        set_row(d_.d_w_hh + (g * sizes_.hidden + unit_begin_) * sizes_.output, nullptr, 0, own * sizes_.output);
      }
    } else {
      outer_product(t0, t1, n, sizes_.output, d_.d_w_hh, kHSlot, Cell::h_gate, add,
                    [&](int64_t t, int64_t i) { return previous_h(t, i); });
    }
    if (sizes_.projected) projection_gradients(n, add);
  }

  static void accumulate(T* out, T value, bool add) { *out = add ? *out + value : value; }

  // dw[gate * H + unit][column] (+)= sum over the block's rows of gradient * row value, for this thread's units.
  template <class RowAt>
  void outer_product(int64_t t0, int64_t t1, int64_t n, int64_t columns, T* dw, int first_slot, int (*gate_of)(int),
                     bool add, RowAt&& row_at) {
    const Groups groups(vectors_of<T>(columns));
    const int64_t own = unit_end_ - unit_begin_;
    for (int64_t g = 0; g < groups.groups; ++g) {
      const int64_t column = groups.begin(g) * W, vectors = groups.begin(g + 1) - groups.begin(g);
      T* out = panel_;
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t active = rows_.active[t];
        pack_rows(out, [&](int64_t i) { return row_at(t, i); }, active, column, columns, vectors);
        out += active * vectors * W;
      }
      for (int s = first_slot; s < first_slot + Cell::kGates; ++s) {
        const T* a = s_.grad_t + (s * padded(sizes_.hidden) + unit_begin_) * s_.ld_t;
        multiply_ragged(dw + (gate_of(s) * sizes_.hidden + unit_begin_) * columns, columns, a, s_.ld_t, panel_,
                        vectors * W, n, own, column, vectors, add, product_);
      }
    }
  }

  // dW_hr[p][unit] (+)= sum over rows of dp * h, for this thread's outputs.
  void projection_gradients(int64_t n, bool add) {
    gang_.barrier();
    const int64_t begin = outputs_.begin(output_begin_) * W;
    int64_t end = outputs_.begin(output_end_) * W;
    if (end > sizes_.output) end = sizes_.output;
    // dp^T of this thread's outputs takes the place of the first rows of the transposed gradients, used up by now.
    for (int64_t r = 0; r < n && begin < end; r += W) {
      transpose_strip(s_.grad_t + begin * s_.ld_t + r, s_.ld_t, s_.dp + r * s_.ld_dp + begin, s_.ld_dp,
                      n - r < W ? n - r : W, end - begin);
    }
    for (int64_t g = 0; g < units_.groups && begin < end; ++g) {
      const int64_t column = units_.begin(g) * W, vectors = units_.begin(g + 1) - units_.begin(g);
      pack_rows(panel_, [&](int64_t r) { return s_.full + r * s_.ld_full; }, n, column, sizes_.hidden, vectors);
      multiply_ragged(d_.d_w_hr + begin * sizes_.hidden, sizes_.hidden, s_.grad_t + begin * s_.ld_t, s_.ld_t, panel_,
                      vectors * W, n, end - begin, column, vectors, add, product_);
    }
  }

  void input_gradients(int64_t t0, int64_t t1, int64_t n) {
    int64_t begin, end;
    gang_.share(n, &begin, &end);
    if (begin == end) return;
    for (int64_t g = 0; g < inputs_.groups; ++g) {
      const int64_t first = inputs_.begin(g), vectors = inputs_.begin(g + 1) - first;
      const int64_t column = first * W, left = sizes_.input - column;
      through_weights(product_, vectors * W, s_.grad + begin * s_.ld_grad, end - begin, s_.ih, d_.w_ih, sizes_.input,
                      first, vectors, 0, Cell::x_gate, false, g + 1 < inputs_.groups ? inputs_.begin(g + 1) : -1);
      int64_t r = 0;
      for (int64_t t = t0; t < t1 && r < end; ++t) {
        for (int64_t i = 0; i < rows_.active[t] && r < end; ++i, ++r) {
          if (r < begin) continue;
          T* out = d_.d_input + rows_.row(t, i) * sizes_.input + column;
          for (int64_t v = 0; v < vectors; ++v) {
            store_partial(out + v * W, load(product_ + (r - begin) * vectors * W + v * W), left - v * W);
          }
        }
      }
    }
  }

  void finish() {
    int64_t begin, end;
    gang_.share(rows_.batch, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = rows_.batch_index[i];
      if (d_.d_h0) {
        __builtin_memcpy(d_.d_h0 + b * sizes_.output, s_.dh + i * s_.ld_h, std::size_t(sizes_.output) * sizeof(T));
      }
      if (Cell::kHasCell && d_.d_c0) {
        __builtin_memcpy(d_.d_c0 + b * sizes_.hidden, s_.dc + i * s_.ld_c, std::size_t(sizes_.hidden) * sizeof(T));
      }
    }
    if (!rows_.zero_fill || !d_.d_input) return;
    gang_.share(rows_.steps, &begin, &end);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = rows_.active[t]; i < rows_.batch; ++i) {
        __builtin_memset(d_.d_input + rows_.row(t, i) * sizes_.input, 0, std::size_t(sizes_.input) * sizeof(T));
      }
    }
  }

  const RecurrenceProblem<T>& p_;
  const Direction<T>& d_;
  const Rows& rows_;
  const Sizes& sizes_;
  Gang& gang_;
  const BackwardScratch<Cell, T> s_;
  const Groups units_, outputs_, inputs_;
  T* panel_;    // this thread's: [block row][kMaxPanel vectors]
  T* product_;  // this thread's: [block row or unit][kMaxPanel vectors]
  int64_t unit_begin_, unit_end_, unit_group_begin_, unit_group_end_, output_begin_, output_end_;
};

template <class Cell, class T>
void backward(const RecurrenceProblem<T>& p, Gang& gang) {
  for_each_direction(p, gang, [&](int d, T* shared, T* own, Gang& team) {
    BackwardDirection<Cell, T>(p, d, shared, own, team).run();
  });
}

}  // namespace seqattn::SEQATTN_ISA
