// Every operator's schema, and nothing else. Implementations register themselves where they stand (cpu/, cuda/);
// fake kernels and autograd are in seqattn_kernels/ops.
#include <torch/csrc/stable/library.h>

#if !defined(SEQATTN_LIBRARY)
#define SEQATTN_LIBRARY seqattn  // a test has a library of its own, whose CUDA kernels run in the emulator
#endif

STABLE_TORCH_LIBRARY(SEQATTN_LIBRARY, m) {
  // One layer of a recurrent network: all its directions, all time steps. `cell` is the place in cells/registry.h.
  // layout 0: input [T, B, I], 1: [B, T, I], 2: packed rows [N, I]. sizes: lengths [B], or batch sizes [T] when packed.
  // weights: for each direction w_ih, w_hh, then b_ih, b_hh (has_bias), then w_hr (projection), in torch's layout.
  // Results: output, h_n, c_n, cell states of every step, reserve for backward (the last three may be empty).
  // allow_tf32: products of float32 on a GPU may be rounded; stepwise: no persistent kernel. Both alike in backward.
  m.def(
      "recurrence_fwd(int cell, Tensor input, Tensor? sizes, int layout, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "Tensor[] packed, bool has_bias, bool save, bool cell_states, bool allow_tf32=False, bool stepwise=False) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Results: gradients of input, h0, c0 and the weights (empty where not needed).
  m.def(
      "recurrence_bwd(int cell, Tensor input, Tensor? sizes, int layout, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "bool has_bias, Tensor reserve, Tensor? d_output, Tensor? d_hn, Tensor? d_cn, "
      "Tensor? d_cell_states, bool need_input, bool need_weights, bool allow_tf32=False, bool stepwise=False) -> "
      "(Tensor, Tensor, Tensor, Tensor[])");
  // One step of a cell: input [B, I], h and c [B, H] (None: zeros), weights w_ih, w_hh and, with has_bias, b_ih, b_hh.
  // Results: h', then c' of a cell that has one, then with `save` what backward needs.
  m.def(
      "cell_fwd(int cell, Tensor input, Tensor? h, Tensor? c, Tensor[] weights, Tensor[] packed, bool has_bias, "
      "bool save) -> Tensor[]");
  // Results: gradients of input (need_input), h and c (where given) and the weights (need_weights), in this order.
  m.def(
      "cell_bwd(int cell, Tensor input, Tensor? h, Tensor? c, Tensor[] weights, bool has_bias, Tensor reserve, "
      "Tensor? d_h, Tensor? d_c, bool need_input, bool need_weights) -> Tensor[]");
  // The weights of each direction in the order the kernels read them. Valid while the weights are unchanged. With
  // `bfloat16` they are rounded and the tensors have that dtype: recurrence_fwd without `save` then rounds x and h too.
  m.def("recurrence_pack(int cell, Tensor[] weights, bool has_bias, bool bfloat16=False) -> Tensor[]");
  // Additive attention. `packed` is additive_pack(keys), kept by who calls for many steps; `mask` is boolean (true:
  // attend) or added to the scores. A row that attends to nothing has zero weights and context.
  m.def("additive_pack(Tensor keys) -> Tensor");
  m.def(
      "additive_fwd(Tensor query, Tensor keys, Tensor? packed, Tensor values, Tensor v, Tensor? lengths, Tensor? mask, "
      "bool need_weights) -> (Tensor, Tensor)");
  m.def(
      "additive_bwd(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor weights, Tensor? d_context, "
      "Tensor? d_weights, Tensor? lengths, Tensor? mask, bool need_values) -> (Tensor, Tensor, Tensor, Tensor)");
  // All steps of an attentional decoder on a GPU: one layer, additive scores, attending before the update (see
  // cuda/decoder.h). x_gates [B, T, G * H]; w_context [G * H, D], may be columns of a wider matrix; v, b_query float32.
  // Results: h of every step [B, T, H], last h, last c (empty where there is none), contexts [B, T, D], weights.
  m.def(
      "decoder_loop(int cell, Tensor x_gates, Tensor w_hh, Tensor w_context, Tensor? b_ih, Tensor? b_hh, "
      "Tensor w_query, Tensor? b_query, Tensor v, Tensor keys, Tensor values, Tensor? lengths, Tensor? mask, "
      "Tensor? h0, Tensor? c0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
