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
  // Additive attention. `packed` is additive_pack(keys), kept by who calls for many steps; `mask` is boolean (true:
  // attend) or added to the scores. A row that attends to nothing has zero weights and context.
  m.def("additive_pack(Tensor keys) -> Tensor");
  m.def(
      "additive_fwd(Tensor query, Tensor keys, Tensor? packed, Tensor values, Tensor v, Tensor? lengths, Tensor? mask, "
      "bool need_weights) -> (Tensor, Tensor)");
  m.def(
      "additive_bwd(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor weights, Tensor? d_context, "
      "Tensor? d_weights, Tensor? lengths, Tensor? mask, bool need_values) -> (Tensor, Tensor, Tensor, Tensor)");
}
