// Forward pass of one recurrent layer. Included by recurrence_kernels.cpp, once per instruction set.
//
// A panel is the gates of one to a few vectors of hidden units. Input projections are made for some steps at a time,
// panel by panel, into rows of pre-activations [slot][units]; each step then adds W_hh h to its rows, applies the cell
// and writes h for the next step. Threads share the panels and meet once a step.
//
// A is the type of operands (operand.h): T itself, or pairs of bfloat16. Then weights, rows of x and a copy of h are
// rounded; the products' sums, h, c and everything else stay in T, W_hr and its operand included.
#pragma once

#include "packed_weights.h"
#include "with_cell.h"

namespace seqattn::SEQATTN_ISA {

// Rows of scratch are apart by a little more than a power of two, or they would fall into the same cache sets.
inline int64_t row_stride(int64_t n) { return padded(n) + kUnitPad; }

template <class A>
constexpr bool kRounded = Operand<A>::kDepth > 1;

// Operands between rows of gathered or rounded input.
template <class A>
int64_t input_stride(int64_t n) {
  return kRounded<A> ? row_stride(depth<A>(n)) : padded(n);
}

template <class Cell, class T, class A = T>
void forward_scratch(RecurrenceProblem<T>* p) {
  const Sizes& s = p->sizes;
  const int64_t batch = p->rows.batch;
  // Pre-activations of a chunk, two generations of h (and of its operands where they are rounded), c, and the h of the
  // cell before it is projected.
  p->shared_scratch =
      p->chunk_rows * Cell::kSlots * padded(s.hidden) +
      batch * (2 * row_stride(s.output) + (Cell::kHasCell ? 1 : 0) * padded(s.hidden) +
               (s.projected ? row_stride(s.hidden) : 0) + (kRounded<A> ? 2 * row_stride(depth<A>(s.output)) : 0));
  p->thread_scratch = p->chunk_rows * input_stride<A>(s.input);
  if (p->ih == WeightUse::in_cache || p->hh == WeightUse::in_cache) {
    const int64_t width = Cell::kGates * PackedWeights<Cell, T, A>::kUnits * kLanes<T>;
    p->thread_scratch += width * depth<A>(s.input > s.output ? s.input : s.output);
  }
}

template <class Cell, class T, class A = T>
class ForwardDirection {
 public:
  ForwardDirection(const RecurrenceProblem<T>& problem, int index, T* shared, T* own, Gang& gang)
      : p_(problem),
        d_(problem.direction[index]),
        rows_(problem.rows),
        sizes_(problem.sizes),
        packed_(problem.sizes, d_.packed),
        gang_(gang),
        ldh_(row_stride(sizes_.output)),
        ldc_(padded(sizes_.hidden)),
        ldf_(row_stride(sizes_.hidden)),
        lda_(kRounded<A> ? row_stride(depth<A>(sizes_.output)) : ldh_) {
    pre_ = shared;
    h_[0] = pre_ + p_.chunk_rows * Cell::kSlots * padded(sizes_.hidden);
    h_[1] = h_[0] + rows_.batch * ldh_;
    c_ = h_[1] + rows_.batch * ldh_;
    full_ = c_ + (Cell::kHasCell ? rows_.batch * ldc_ : 0);
    if constexpr (kRounded<A>) {
      a_[0] = reinterpret_cast<A*>(full_ + (sizes_.projected ? rows_.batch * ldf_ : 0));
      a_[1] = a_[0] + rows_.batch * lda_;
    } else {
      a_[0] = h_[0];
      a_[1] = h_[1];
    }
    x_ = reinterpret_cast<A*>(own);
    panel_ = x_ + p_.chunk_rows * input_stride<A>(sizes_.input);
    gang_.share(packed_.panels.groups, &panel_begin_, &panel_end_);
  }

  void run() {
    begin_states();
    gang_.barrier();
    const int64_t steps = rows_.steps;
    for (int64_t s = 0; s < steps;) {
      // As many steps as fit a chunk, at least one.
      int64_t t0, t1;
      if (d_.reverse) {
        t1 = steps - s;
        for (t0 = t1 - 1; t0 > 0 && rows_.first[t1] - rows_.first[t0 - 1] <= p_.chunk_rows;) --t0;
      } else {
        t0 = s;
        for (t1 = t0 + 1; t1 < steps && rows_.first[t1 + 1] - rows_.first[t0] <= p_.chunk_rows;) ++t1;
      }
      project_inputs(t0, t1);
      for (int64_t i = 0; i < t1 - t0; ++i) step(d_.reverse ? t1 - 1 - i : t0 + i, rows_.first[t0]);
      s += t1 - t0;
    }
    end_states();
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int kHSlot = Cell::kSlots - Cell::kGates;
  static constexpr int kReserved = reserved(Cell::kSaved);

  static void copy_row(T* out, const T* in, int64_t n) {
    if (in) {
      __builtin_memcpy(out, in, std::size_t(n) * sizeof(T));
    } else {
      __builtin_memset(out, 0, std::size_t(n) * sizeof(T));
    }
  }

  void begin_states() {
    int64_t begin, end;
    gang_.share(rows_.batch, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = rows_.batch_index[i];
      for (T* h : h_) {
        __builtin_memset(h + i * ldh_, 0, std::size_t(ldh_) * sizeof(T));
        if (d_.h0) copy_row(h + i * ldh_, d_.h0 + b * sizes_.output, sizes_.output);
      }
      if constexpr (kRounded<A>) {
        for (A* operands : a_) round_row(operands + i * lda_, h_[0] + i * ldh_, sizes_.output);
      }
      if constexpr (Cell::kHasCell) {
        __builtin_memset(c_ + i * ldc_, 0, std::size_t(ldc_) * sizeof(T));
        if (d_.c0) copy_row(c_ + i * ldc_, d_.c0 + b * sizes_.hidden, sizes_.hidden);
      }
    }
  }

  // Pre-activations W_ih x + b of this thread's panels for steps [t0, t1), in time order.
  void project_inputs(int64_t t0, int64_t t1) {
    const int64_t n = rows_.first[t1] - rows_.first[t0];
    const A* x = x_;
    int64_t ldx = input_stride<A>(sizes_.input);
    if (kRounded<A> || !rows_.dense) {
      A* out = x_;
      for (int64_t t = t0; t < t1; ++t) {
        for (int64_t i = 0; i < rows_.active[t]; ++i, out += ldx) {
          const T* row = p_.input + rows_.row(t, i) * p_.ld_input;
          if constexpr (kRounded<A>) {
            round_row(out, row, sizes_.input);
          } else {
            copy_row(out, row, sizes_.input);
          }
        }
      }
    } else if constexpr (!kRounded<A>) {
      x = p_.input + (rows_.step_row[0] + rows_.first[t0]) * p_.ld_input;
      ldx = p_.ld_input;
    }
    for (int64_t p = panel_begin_; p < panel_end_; ++p) {
      const int64_t units = packed_.panels.begin(p + 1) - packed_.panels.begin(p);
      const int64_t ld = Cell::kSlots * units * W;
      T* pre = pre_panel(p);
      const T* bias = packed_.bias_panel(p);
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t j = 0; j < ld; j += W) store(pre + r * ld + j, load(bias + j));
      }
      multiply(p_.ih, p, pre, x, ldx, d_.w_ih, packed_.ih_panel(p), sizes_.input, n, 0, Cell::x_gate,
               p + 1 < panel_end_ ? packed_.ih_panel(p + 1) : nullptr);
    }
  }

  // pre[row][slot][units] += a[row][K] times the weights of panel p: torch's w[gate * H + unit][K], packed in `panel`,
  // `later` being the panel after it, if any.
  void multiply(WeightUse use, int64_t p, T* pre, const A* a, int64_t lda, const T* w, const A* panel, int64_t K,
                int64_t rows, int first_slot, int (*gate_of)(int), const A* later) {
    const int64_t first = packed_.panels.begin(p), units = packed_.panels.begin(p + 1) - first;
    if (use != WeightUse::in_place) {
      if (use == WeightUse::in_cache) {
        pack_panel<Cell>(panel_, w, K, sizes_.hidden, first, units, gate_of, first_slot);
        panel = panel_;
        later = nullptr;
      }
      packed_.multiply(pre + first_slot * units * W, Cell::kSlots * units * W, a, lda, panel, depth<A>(K), rows, units,
                       later);
      return;
    }
    if constexpr (!kRounded<A>) {
      for (int slot = first_slot; slot < first_slot + Cell::kGates; ++slot) {
        for (int64_t v = 0; v < units; ++v) {
          const int64_t unit = (first + v) * W, left = sizes_.hidden - unit;
          const DotProduct<T> product{a, lda, w + (gate_of(slot) * sizes_.hidden + unit) * K, K};
          multiply_dots(pre + (slot * units + v) * W, Cell::kSlots * units * W, &product, 1, rows, left < W ? left : W);
        }
      }
    }
  }

  T* pre_panel(int64_t p) const { return pre_ + packed_.panels.begin(p) * W * Cell::kSlots * p_.chunk_rows; }

  void step(int64_t t, int64_t chunk_first) {
    const int64_t n = rows_.active[t];
    if (n == 0) return;
    const int64_t compact = rows_.first[t];
    // Every other step walks the panels backwards: what of W_hh the last step left in cache is met first.
    const bool backwards = t % 2;
    for (int64_t j = panel_begin_; j < panel_end_; ++j) {
      const int64_t p = backwards ? panel_end_ - 1 - (j - panel_begin_) : j;
      const A* later = j + 1 < panel_end_ ? packed_.hh_panel(backwards ? p - 1 : p + 1) : nullptr;
      const int64_t first = packed_.panels.begin(p), units = packed_.panels.begin(p + 1) - first;
      const int64_t ld = Cell::kSlots * units * W;
      T* pre = pre_panel(p) + (compact - chunk_first) * ld;
      multiply(p_.hh, p, pre, a_[0], lda_, d_.w_hh, packed_.hh_panel(p), sizes_.output, n, kHSlot, Cell::h_gate, later);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t v = 0; v < units; ++v)
          apply_cell(t, i, compact + i, pre + i * ld + v * W, units * W, (first + v) * W);
      }
    }
    gang_.barrier();
    if (sizes_.projected) {
      project_states(t, n);
      gang_.barrier();
    }
    T* next = h_[1];
    h_[1] = h_[0];
    h_[0] = next;
    A* next_operands = a_[1];
    a_[1] = a_[0];
    a_[0] = next_operands;
  }

  void apply_cell(int64_t t, int64_t i, int64_t compact, const T* pre, int64_t slot_stride, int64_t unit) {
    Vec<T> slots[Cell::kSlots], saved[Cell::kSaved + 1], h{}, c{}, h_new, c_new{};
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSlots; ++s) slots[s] = load(pre + s * slot_stride);
    if (!sizes_.projected) h = load(h_[0] + i * ldh_ + unit);
    if constexpr (Cell::kHasCell) c = load(c_ + i * ldc_ + unit);
    Cell::template forward<Math<T>>(slots, h, c, &h_new, &c_new, saved);
    const int64_t left = sizes_.hidden - unit;
    if constexpr (Cell::kHasCell) {
      store(c_ + i * ldc_ + unit, c_new);
      if (d_.cell_states) store_partial(d_.cell_states + rows_.row(t, i) * p_.ld_cell + unit, c_new, left);
    }
    if (sizes_.projected) {
      store(full_ + i * ldf_ + unit, h_new);
    } else {
      store(h_[1] + i * ldh_ + unit, h_new);
      if constexpr (kRounded<A>) round_vector(a_[1] + i * lda_ + unit / Operand<A>::kDepth, h_new);
      store_partial(d_.output + rows_.row(t, i) * p_.ld_output + unit, h_new, left);
    }
    if (d_.reserve) {
      T* reserve = d_.reserve + compact * kReserved * ldc_ + unit;
#pragma GCC unroll 8
      for (int s = 0; s < Cell::kSaved; ++s) store(reserve + s * ldc_, saved[s]);
      if (!sizes_.projected) store(reserve + Cell::kSaved * ldc_, h_new);
    }
  }

  void project_states(int64_t t, int64_t n) {
    const Groups& groups = packed_.projections;
    int64_t begin, end;
    gang_.share(groups.groups, &begin, &end);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t column = groups.begin(g) * W, width = (groups.begin(g + 1) - groups.begin(g)) * W;
      multiply_panel(h_[1] + column, ldh_, full_, ldf_, packed_.hr_group(g), sizes_.hidden, n, int(width / W), false);
      const int64_t left = sizes_.output - column < width ? sizes_.output - column : width;
      for (int64_t i = 0; i < n; ++i) {
        const T* h = h_[1] + i * ldh_ + column;
        copy_row(d_.output + rows_.row(t, i) * p_.ld_output + column, h, left);
        if constexpr (kRounded<A>) round_row(a_[1] + i * lda_ + column / Operand<A>::kDepth, h, left);
        if (d_.reserve)
          copy_row(d_.reserve + ((rows_.first[t] + i) * kReserved + Cell::kSaved) * ldc_ + column, h, width);
      }
    }
  }

  void end_states() {
    int64_t begin, end;
    gang_.share(rows_.batch, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = rows_.batch_index[i], length = rows_.length[i];
      const T* last = d_.h0 ? d_.h0 + b * sizes_.output : nullptr;
      if (length > 0) last = d_.output + rows_.row(d_.reverse ? 0 : length - 1, i) * p_.ld_output;
      copy_row(d_.hn + b * sizes_.output, last, sizes_.output);
      if constexpr (Cell::kHasCell) copy_row(d_.cn + b * sizes_.hidden, c_ + i * ldc_, sizes_.hidden);
    }
    if (!rows_.zero_fill) return;
    gang_.share(rows_.steps, &begin, &end);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = rows_.active[t]; i < rows_.batch; ++i) {
        copy_row(d_.output + rows_.row(t, i) * p_.ld_output, nullptr, sizes_.output);
        if (d_.cell_states) copy_row(d_.cell_states + rows_.row(t, i) * p_.ld_cell, nullptr, sizes_.hidden);
      }
    }
  }

  const RecurrenceProblem<T>& p_;
  const Direction<T>& d_;
  const Rows& rows_;
  const Sizes& sizes_;
  const PackedWeights<Cell, T, A> packed_;
  Gang& gang_;
  const int64_t ldh_, ldc_, ldf_, lda_;
  T* h_[2];   // previous, next: [batch][ldh_]
  T* c_;      // [batch][ldc_]
  T* full_;   // [batch][ldf_]
  A* a_[2];   // h_ as operands: [batch][lda_]
  T* pre_;    // [panel][chunk row][slot][units]
  A* x_;      // this thread's: [chunk row][input_stride]
  A* panel_;  // this thread's: one panel of W_ih or W_hh
  int64_t panel_begin_, panel_end_;
};

// Splits a gang over the directions: with at least as many threads as directions each gets its own part of the gang,
// else the threads take directions in turn.
template <class T, class F>
void for_each_direction(const RecurrenceProblem<T>& p, Gang& gang, F&& run) {
  T* own = p.scratch + p.directions * p.shared_scratch + gang.rank * p.thread_scratch;
  const int parts = gang.size < p.directions ? gang.size : p.directions;
  const int part = gang.rank % parts;
  for (int d = part; d < p.directions; d += parts) {
    Gang team;
    team.rank = gang.rank / parts;
    team.size = gang.size / parts + (part < gang.size % parts ? 1 : 0);
    team.flags = p.flags + d * p.threads;
    run(d, p.scratch + d * p.shared_scratch, own, team);
  }
}

template <class Cell, class T, class A = T>
void forward(const RecurrenceProblem<T>& p, Gang& gang) {
  for_each_direction(p, gang, [&](int d, T* shared, T* own, Gang& team) {
    if (p.hh != WeightUse::given) {
      pack_weights<Cell, T, A>(p.sizes, p.direction[d], team, p.ih == WeightUse::packed, p.hh == WeightUse::packed);
    }
    ForwardDirection<Cell, T, A>(p, d, shared, own, team).run();
  });
}

template <class T, class A = T>
constexpr ForwardKernels<T> forward_kernels() {
  return {
      [](int number, const Sizes& sizes) {
        return with_cell(number, [&](auto cell) { return PackedWeights<decltype(cell), T, A>::size(sizes); });
      },
      [](int number, const Sizes& sizes, Direction<T>& d, Gang& gang) {
        with_cell(number, [&](auto cell) { pack_weights<decltype(cell), T, A>(sizes, d, gang); });
      },
      [](int number, RecurrenceProblem<T>* p) {
        with_cell(number, [&](auto cell) { forward_scratch<decltype(cell), T, A>(p); });
      },
      [](int number, const RecurrenceProblem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) { forward<decltype(cell), T, A>(p, gang); });
      },
  };
}

}  // namespace seqattn::SEQATTN_ISA
