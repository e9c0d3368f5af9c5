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
  // attend) or added to the scores. A row that attends to nothing has zero weights and context. `v` is [A], or [H, A]
  // where heads are folded into the batch: batch element b has row b % H.
  m.def("additive_pack(Tensor keys) -> Tensor");
  m.def(
      "additive_fwd(Tensor query, Tensor keys, Tensor? packed, Tensor values, Tensor v, Tensor? lengths, Tensor? mask, "
      "bool need_weights) -> (Tensor, Tensor)");
  m.def(
      "additive_bwd(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor weights, Tensor? d_context, "
      "Tensor? d_weights, Tensor? lengths, Tensor? mask, bool need_values) -> (Tensor, Tensor, Tensor, Tensor)");
  // The attentional decoder, all steps. options: order (0: attend with h of the step before, then update the cells, 1:
  // the reverse, 2: the first layer updates and attends, the second sees its h and the context), score (0: additive, 1:
  // dot times scale), activation of the output projection (0: tanh, 1: none), then the columns where the input, the
  // context and the attentional vector (-1: not fed) begin in w_ih of the first layer, and the context and h in
  // w_output; which earlier weights the scores know of (0: none, 1: the last, 2: the last and the sum of all, 3: that
  // sum), and whether gradients reach those through it (0, 1). They enter additive scores as features, their
  // convolution by w_conv [F, C, window] times w_feature [A, F]; history0 [B, C, S] are those before the first step,
  // and the sum is of weights / fertility [B, S]. input [B, T, I]; keys [B, S, A] and what additive_pack made of them;
  // mask boolean [B, S]; weights: of each layer w_ih, w_hh, then b_ih, b_hh (has_bias); packed: what decoder_pack made.
  // Results: h [L, B, T, H], last c [L, B, H], contexts [B, T, D], weights [B, T, S], attentional vectors [B, T, M],
  // reserve for backward; those there are none of are empty. owners [B]: the row of keys, values, lengths and mask that
  // each row attends to, its own where absent; not with `save`.
  m.def(
      "decoder_fwd(int cell, int[] options, float scale, Tensor input, Tensor keys, Tensor? packed_keys, "
      "Tensor values, Tensor? lengths, Tensor? mask, Tensor? h0, Tensor? c0, Tensor? context0, Tensor? attentional0, "
      "Tensor[] weights, bool has_bias, Tensor? w_query, Tensor? b_query, Tensor? v, Tensor? w_output, "
      "Tensor? b_output, Tensor? history0, Tensor? w_conv, Tensor? w_feature, Tensor? fertility, Tensor? packed, "
      "Tensor? owners, bool save) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same, each step's input the embedding [V, I] of the most probable word of the step before, until `end` (-1:
  // none) or `max_length`. w_predict [V, M or H], b_predict: from the output to logits; absent where it is them. start
  // [B]: the first words. Results: words [B, T], how many are each row's [B], log-probabilities [B], weights [B, T, S].
  m.def(
      "decoder_generate(int cell, int[] options, float scale, Tensor embedding, Tensor keys, Tensor? packed_keys, "
      "Tensor values, Tensor? lengths, Tensor? mask, Tensor? h0, Tensor? c0, Tensor? context0, Tensor? attentional0, "
      "Tensor[] weights, bool has_bias, Tensor? w_query, Tensor? b_query, Tensor? v, Tensor? w_output, "
      "Tensor? b_output, Tensor? history0, Tensor? w_conv, Tensor? w_feature, Tensor? fertility, Tensor? packed, "
      "Tensor? owners, Tensor? w_predict, Tensor? b_predict, Tensor start, int end, int max_length) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  // Results: gradients of input (need_input), keys, values, h0, c0, context0, attentional0, w_query, b_query, v,
  // w_output, b_output, history0, w_conv, w_feature, fertility (empty where there is none), then of the weights.
  m.def(
      "decoder_bwd(int cell, int[] options, float scale, Tensor input, Tensor keys, Tensor values, Tensor? lengths, "
      "Tensor? mask, Tensor? h0, Tensor? c0, Tensor? context0, Tensor? attentional0, Tensor[] weights, bool has_bias, "
      "Tensor? w_query, Tensor? b_query, Tensor? v, Tensor? w_output, Tensor? b_output, Tensor? history0, "
      "Tensor? w_conv, Tensor? w_feature, Tensor? fertility, Tensor hidden, Tensor contexts, Tensor found, Tensor? "
      "attentional, Tensor reserve, Tensor? d_hidden, Tensor? d_c_n, "
      "Tensor? d_contexts, Tensor? d_weights, Tensor? d_attentional, bool need_input) -> Tensor[]");
  // The weights in the order forward reads them, valid while they are unchanged.
  m.def(
      "decoder_pack(int cell, Tensor[] weights, bool has_bias, Tensor? w_query, Tensor? b_query, Tensor? w_output, "
      "Tensor? b_output, Tensor? w_conv, Tensor? w_feature) -> Tensor");
  // A step of a beam search: prefixes of log-probabilities scores [A, K], their words' log_probs [A * K, V]. Results:
  // of the K best that go on, best first, log-probabilities, parents and words [A, K], -inf where there are fewer; of
  // those among the K best that end, log-probabilities and parents [A, K], -inf at the others' places.
  m.def("beam_grow(Tensor log_probs, Tensor scores, int end) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // All steps of an attentional decoder on a GPU: one layer, additive scores, attending before the update (see
  // cuda/decoder.h). x_gates [B, T, G * H]; w_context [G * H, D], may be columns of a wider matrix; v, b_query float32.
  // Results: h of every step [B, T, H], last h, last c (empty where there is none), contexts [B, T, D], weights; with
  // `save`, what backward needs of every unit [B, T, H, kept] and c of every step in float32 [B, T, H], else empty.
  // With w_conv [F, C, W], W odd, and w_feature [A, F], scores know of earlier weights; history: 1 the last, 2 the sum
  // of all, 3 both, which are the C channels of history0 [B, C, S]; fertility [B, S]. Not with `save`.
  m.def(
      "decoder_loop(int cell, Tensor x_gates, Tensor w_hh, Tensor w_context, Tensor? b_ih, Tensor? b_hh, "
      "Tensor w_query, Tensor? b_query, Tensor v, Tensor keys, Tensor values, Tensor? lengths, Tensor? mask, "
      "Tensor? h0, Tensor? c0, bool save, int history=0, Tensor? history0=None, Tensor? w_conv=None, "
      "Tensor? w_feature=None, Tensor? fertility=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The chain in time of its gradients. w_recurrent [G * H + A, H] is W_hh above W_query, `queries` [B, T, A] q of
  // every step. Results: gradients of x_gates, of what w_recurrent makes of h [B, T, G * H + A], of the contexts, of
  // the scores (float32 [B, T, S]), of h0 and c0 (empty where these are not given).
  m.def(
      "decoder_loop_bwd(int cell, Tensor w_recurrent, Tensor w_context, Tensor v, Tensor keys, Tensor values, "
      "Tensor? lengths, Tensor? h0, Tensor? c0, Tensor output, Tensor weights, Tensor queries, Tensor saved, "
      "Tensor cells, Tensor? d_output, Tensor? d_cn, Tensor? d_contexts, Tensor? d_weights) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Scores [B, T, S] by themselves; `kind` is a place in the tables of the reference, of which
  // scores/registry.h has the first. `features` [B, S, F] or [B, T, S, F] with
  // `feature_weight` [F, A] are a term of additive scores beside query and key. 0 past the lengths.
  m.def(
      "scores_fwd(int kind, Tensor query, Tensor keys, Tensor? v, Tensor? features, Tensor? feature_weight, "
      "Tensor? lengths) -> Tensor");
  // Results: gradients of query, keys, v, features, feature_weight (empty where there is none). A score whose gradient
  // is 0 contributes nothing, even where query or key is NaN.
  m.def(
      "scores_bwd(int kind, Tensor d_scores, Tensor query, Tensor keys, Tensor? v, Tensor? features, "
      "Tensor? feature_weight, Tensor? lengths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Additive scores with features made on the way, feature_weight [A, F] times a convolution, conv_weight [F, C, W], of
  // a history [B, C, S] or [B, T, C, S]: [B, T, S], without T for a query [B, A]. 0 past the lengths.
  m.def(
      "location_fwd(Tensor query, Tensor keys, Tensor v, Tensor history, Tensor conv_weight, Tensor feature_weight, "
      "Tensor? lengths) -> Tensor");
  // Weights [B, T, S] of (scale * scores + mask) / temperature by softmax, sparsemax, entmax15 or sigmoid (`kind` 0
  // to 3), with `fill` where lengths or a boolean mask hide a key. zero_empty: a row that attends to nothing is 0. On a
  // CPU also [B, S].
  m.def(
      "normalize_fwd(int kind, Tensor scores, Tensor? lengths, Tensor? mask, float scale, float temperature, "
      "float fill, bool zero_empty) -> Tensor");
  // The gradient of the scores, where `factor` is scale / temperature; 0 at hidden keys and where a weight is 0.
  m.def(
      "normalize_bwd(int kind, Tensor d_weights, Tensor weights, Tensor? lengths, Tensor? mask, float factor) "
      "-> Tensor");
  // weights [B, T, S] times values [B, S, D]. A value without weight contributes nothing, even if it is NaN.
  m.def("context_fwd(Tensor weights, Tensor values) -> Tensor");
  // Monotonic alignment: weights [B, T, S] from the probabilities of stopping `choose` [B, T, S] and where attention
  // stood before, `previous` [B, S].
  m.def("monotonic_fwd(Tensor choose, Tensor previous) -> Tensor");
  m.def("monotonic_bwd(Tensor choose, Tensor previous, Tensor weights, Tensor d_weights) -> (Tensor, Tensor)");
  // Attention over time for each feature: weights [B, S, D], a softmax over s of tanh(input weight^T + bias), and
  // weights * input, summed over s with `reduce`; with `keep` also that tanh, for backward. `mask` is boolean [B, S].
  m.def(
      "feature_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor? lengths, Tensor? mask, bool reduce, bool keep) "
      "-> (Tensor, Tensor, Tensor)");
  // Results: gradients of input (empty unless `need_input`), weight, bias (empty without one).
  m.def(
      "feature_bwd(Tensor input, Tensor weight, Tensor? bias, Tensor weights, Tensor tangents, Tensor? d_result, "
      "Tensor? d_weights, Tensor? lengths, Tensor? mask, bool reduce, bool need_input) -> (Tensor, Tensor, Tensor)");
  // Self-attentive pooling: weights [B, R, S], a softmax over s of v . tanh(input weight^T + bias) with v [R, N], and
  // the sums of values (the input where absent) by them, both without R where v is [N]; with `keep` also that tanh, for
  // backward. Masks [B, S].
  m.def(
      "pooling_fwd(Tensor input, Tensor weight, Tensor? bias, Tensor v, Tensor? values, Tensor? lengths, Tensor? mask, "
      "bool keep) -> (Tensor, Tensor, Tensor)");
  // Results: gradients of input (empty unless `need_input`), weight, bias, v, values (empty where absent or not
  // needed).
  m.def(
      "pooling_bwd(Tensor input, Tensor weight, Tensor? bias, Tensor v, Tensor? values, Tensor weights, "
      "Tensor tangents, Tensor? d_context, Tensor? d_weights, Tensor? lengths, Tensor? mask, bool need_input, "
      "bool need_values) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
