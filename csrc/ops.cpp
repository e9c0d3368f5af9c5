// Every operator's schema, and nothing else. Implementations register themselves where they stand (cpu/, cuda/);
// fake kernels and autograd are in seqattn_kernels/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(seqattn, m) {
  // One layer of a recurrent network, all its directions, all time steps. `sequence` says how rows are laid out.
  m.def(
      "recurrence_fwd(str cell, Tensor input, Tensor? sizes, int layout, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "Tensor[] packed, bool has_bias, bool save, bool cell_states) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "recurrence_bwd(str cell, Tensor input, Tensor? sizes, int layout, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "bool has_bias, Tensor output, Tensor reserve, Tensor? d_output, Tensor? d_hn, Tensor? d_cn, "
      "Tensor? d_cell_states, bool need_input, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor[])");
  m.def("recurrence_pack(str cell, Tensor[] weights, bool has_bias) -> Tensor[]");
  m.def(
      "cell_fwd(str cell, Tensor input, Tensor h, Tensor? c, Tensor[] weights, Tensor[] packed, bool has_bias, "
      "bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cell_bwd(str cell, Tensor input, Tensor h, Tensor? c, Tensor[] weights, bool has_bias, Tensor reserve, "
      "Tensor? d_h, Tensor? d_c, bool need_input, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor[])");
}
