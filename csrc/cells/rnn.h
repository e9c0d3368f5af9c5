#pragma once

#include "cell.h"

namespace seqattn {

// h' = tanh(W_ih x + b_ih + W_hh h + b_hh)  (Elman, 1990); backward needs h' alone.
struct RnnTanh {
  static constexpr const char* kName = "rnn_tanh";
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0;
  static constexpr bool kHasCell = false;
  static constexpr int x_gate(int slot) { return slot; }
  static constexpr int h_gate(int slot) { return slot; }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void forward(const V* pre, V, V, V* h_new, V*, V*) {
    *h_new = M::tanh(pre[0]);
  }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void backward(const V*, V, V, V h_new, V dh_new, V, V* d_pre, V* dh, V*) {
    d_pre[0] = dh_new - dh_new * h_new * h_new;
    *dh = V{};
  }
};

// h' = max(0, W_ih x + b_ih + W_hh h + b_hh)
struct RnnRelu {
  static constexpr const char* kName = "rnn_relu";
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0;
  static constexpr bool kHasCell = false;
  static constexpr int x_gate(int slot) { return slot; }
  static constexpr int h_gate(int slot) { return slot; }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void forward(const V* pre, V, V, V* h_new, V*, V*) {
    *h_new = M::relu(pre[0]);
  }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void backward(const V*, V, V, V h_new, V dh_new, V, V* d_pre, V* dh, V*) {
    d_pre[0] = M::positive(h_new, dh_new);
    *dh = V{};
  }
};

}  // namespace seqattn
