#pragma once

#include "cell.h"

namespace seqattn {

// i, f, o = sigmoid, g = tanh of W_ih x + b_ih + W_hh h + b_hh;  c' = f * c + i * g,  h' = o * tanh(c')
// (Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000).
struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kSlots = 4, kSaved = 5;
  static constexpr bool kHasCell = true;
  static constexpr int x_gate(int slot) { return slot; }
  static constexpr int h_gate(int slot) { return slot; }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void forward(const V* pre, V, V c, V* h_new, V* c_new, V* saved) {
    const V i = M::sigmoid(pre[0]), f = M::sigmoid(pre[1]), g = M::tanh(pre[2]), o = M::sigmoid(pre[3]);
    *c_new = f * c + i * g;
    *h_new = o * M::tanh(*c_new);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    saved[4] = *c_new;
  }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void backward(const V* saved, V, V c, V, V dh_new, V dc_new, V* d_pre, V* dh, V* dc) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V t = M::tanh(saved[4]);
    const V dct = dc_new + dh_new * o * (1 - t * t);
    d_pre[0] = dct * g * (i * (1 - i));
    d_pre[1] = dct * c * (f * (1 - f));
    d_pre[2] = dct * i * (1 - g * g);
    d_pre[3] = dh_new * t * (o * (1 - o));
    *dh = V{};
    *dc = dct * f;
  }
};

}  // namespace seqattn
