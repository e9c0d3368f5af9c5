// The weights of one direction in the order the forward pass reads them, and how they get there.
//
// A panel is the gates of one to a few vectors of hidden units.
#pragma once

#include "gemm.h"
#include "recurrence.h"

namespace seqattn::SEQATTN_ISA {

// n vectors cut into groups of nearly equal size, none above kMaxPanel, and at least two so that two threads have work.
struct Groups {
  int64_t vectors, groups;
  explicit Groups(int64_t vectors_, int64_t most = kMaxPanel) : vectors(vectors_) {
    groups = (vectors + most - 1) / most;
    if (groups < 2 && vectors > 1) groups = 2;
  }
  int64_t begin(int64_t g) const { return vectors * g / groups; }
};

template <class T>
constexpr int64_t vectors_of(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T>;
}

template <class Cell, class T, class A = T>
struct PackedWeights {
  static_assert(sizeof(A) == sizeof(T));
  static constexpr int W = kLanes<T>;
  static constexpr int kUnits = Cell::kGates == 1 ? kMaxPanel : 1;  // vectors of units in a panel
  // Gates multiplied at a time: four would leave room for few rows, and weights would be read more often.
  static constexpr int kPart = Cell::kGates == 4 ? 2 : Cell::kGates;

  Sizes sizes;
  Groups panels, projections;
  A *ih, *hh;
  T *bias, *hr;

  // Layout: W_ih [panel][part][I][gate][units], W_hh [panel][part][output][gate][units], bias [panel][slot][units],
  // W_hr [group][H][outputs]; I and output as operands.
  PackedWeights(const Sizes& s, T* data)
      : sizes(s), panels(vectors_of<T>(s.hidden), kUnits), projections(vectors_of<T>(s.output)) {
    const int64_t width = vectors_of<T>(s.hidden) * W;
    ih = reinterpret_cast<A*>(data);
    hh = ih + Cell::kGates * width * depth<A>(s.input);
    bias = reinterpret_cast<T*>(hh + Cell::kGates * width * depth<A>(s.output));
    hr = bias + Cell::kSlots * width;
  }

  static int64_t size(const Sizes& s) {
    const int64_t width = padded(s.hidden);
    return Cell::kGates * width * (depth<A>(s.input) + depth<A>(s.output)) + Cell::kSlots * width +
           (s.projected ? padded(s.output) * s.hidden : 0);
  }

  A* ih_panel(int64_t p) const { return ih + panels.begin(p) * W * Cell::kGates * depth<A>(sizes.input); }
  A* hh_panel(int64_t p) const { return hh + panels.begin(p) * W * Cell::kGates * depth<A>(sizes.output); }
  T* bias_panel(int64_t p) const { return bias + panels.begin(p) * W * Cell::kSlots; }
  T* hr_group(int64_t g) const { return hr + projections.begin(g) * W * sizes.hidden; }

  // pre[row][gate][units] += a[row][K] times a panel of K operands; `later` is the panel that comes next, or null.
  static void multiply(T* pre, int64_t ld, const A* a, int64_t lda, const A* panel, int64_t K, int64_t rows,
                       int64_t units, const A* later = nullptr) {
    for (int gate = 0; gate < Cell::kGates; gate += kPart) {
      const A* part = panel + gate * units * W * K;
      multiply_panel(pre + gate * units * W, ld, a, lda, part, K, rows, int(kPart * units), true,
                     gate + kPart < Cell::kGates ? part + kPart * units * W * K : later);
    }
  }
};

// out[part][k][gate][unit] of one panel from torch's w[gate * H + unit][k].
template <class Cell, class T, class A>
void pack_panel(A* out, const T* w, int64_t K, int64_t hidden, int64_t first_vector, int64_t units, int (*gate_of)(int),
                int first_slot) {
  constexpr int W = kLanes<T>, kPart = PackedWeights<Cell, T, A>::kPart;
  const int64_t ld = kPart * units * W;
  for (int slot = 0; slot < Cell::kGates; ++slot) {
    A* part = out + slot / kPart * depth<A>(K) * ld;
    for (int64_t v = 0; v < units; ++v) {
      const int64_t unit = (first_vector + v) * W;
      const int64_t rows = hidden - unit < W ? hidden - unit : W;
      A* strip = part + (slot % kPart * units + v) * W;
      const T* from = w + (gate_of(first_slot + slot) * hidden + unit) * K;
      if constexpr (Operand<A>::kDepth == 1) {
        transpose_strip(strip, ld, from, K, rows, K);
      } else {
        transpose_pairs(strip, ld, from, K, rows, K);
      }
    }
  }
}

// This thread's share of the packed weights; biases and W_hr always, W_ih and W_hh where asked.
template <class Cell, class T, class A = T>
void pack_weights(const Sizes& sizes, const Direction<T>& d, Gang& gang, bool ih = true, bool hh = true) {
  constexpr int W = kLanes<T>;
  constexpr int kHSlot = Cell::kSlots - Cell::kGates;
  const PackedWeights<Cell, T, A> packed(sizes, d.packed);
  int64_t begin, end;
  gang.share(packed.panels.groups, &begin, &end);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = packed.panels.begin(p), units = packed.panels.begin(p + 1) - first;
    if (ih) pack_panel<Cell>(packed.ih_panel(p), d.w_ih, sizes.input, sizes.hidden, first, units, &Cell::x_gate, 0);
    if (hh) {
      pack_panel<Cell>(packed.hh_panel(p), d.w_hh, sizes.output, sizes.hidden, first, units, &Cell::h_gate, kHSlot);
    }
    for (int slot = 0; slot < Cell::kSlots; ++slot) {
      for (int64_t v = 0; v < units; ++v) {
        const int64_t unit = (first + v) * W, n = sizes.hidden - unit;
        Vec<T> sum{};
        if (d.b_ih && slot < Cell::kGates) sum += load_partial(d.b_ih + Cell::x_gate(slot) * sizes.hidden + unit, n);
        if (d.b_hh && slot >= kHSlot) sum += load_partial(d.b_hh + Cell::h_gate(slot) * sizes.hidden + unit, n);
        store(packed.bias_panel(p) + (slot * units + v) * W, sum);
      }
    }
  }
  if (!sizes.projected) return;
  gang.share(packed.projections.groups, &begin, &end);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = packed.projections.begin(g), n = packed.projections.begin(g + 1) - first;
    for (int64_t v = 0; v < n; ++v) {
      const int64_t column = (first + v) * W;
      const int64_t rows = sizes.output - column < W ? sizes.output - column : W;
      transpose_strip(packed.hr_group(g) + v * W, n * W, d.w_hr + column * sizes.hidden, sizes.hidden, rows,
                      sizes.hidden);
    }
  }
}

}  // namespace seqattn::SEQATTN_ISA
