#pragma once

#include "cell.h"

namespace seqattn {

// r = sigmoid(x_r + h_r), z = sigmoid(x_z + h_z), n = tanh(x_n + r * h_n), h' = (1 - z) * n + z * h
// with x_* = W_i* x + b_i*, h_* = W_h* h + b_h*  (Cho et al., 2014, as cuDNN and torch define it).
struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3, kSlots = 4, kSaved = 4;
  static constexpr bool kHasCell = false;
  // Slots: x_n, r, z, h_n. torch's gates: r, z, n.
  static constexpr int x_gate(int slot) { return slot == 0 ? 2 : slot - 1; }
  static constexpr int h_gate(int slot) { return slot - 1; }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void forward(const V* pre, V h, V, V* h_new, V*, V* saved) {
    const V r = M::sigmoid(pre[1]), z = M::sigmoid(pre[2]);
    const V n = M::tanh(pre[0] + r * pre[3]);
    *h_new = n + z * (h - n);
    saved[0] = n;
    saved[1] = r;
    saved[2] = z;
    saved[3] = pre[3];
  }

  template <class M, class V = typename M::Value>
  static SEQATTN_CELL void backward(const V* saved, V h, V, V, V dh_new, V, V* d_pre, V* dh, V*) {
    const V n = saved[0], r = saved[1], z = saved[2], hn = saved[3];
    const V dn = dh_new * (1 - z) * (1 - n * n);
    d_pre[0] = dn;
    d_pre[1] = dn * hn * (r * (1 - r));
    d_pre[2] = dh_new * (h - n) * (z * (1 - z));
    d_pre[3] = dn * r;
    *dh = dh_new * z;
  }
};

}  // namespace seqattn
