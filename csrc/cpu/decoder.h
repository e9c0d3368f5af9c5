// The attentional decoder, all steps in one call: what the launcher (decoder.cpp) hands to the kernels.
//
// Batch rows are cut into tiles that go through all steps together; their number depends on the batch alone, so that
// results don't depend on the number of threads. With enough tiles each thread takes its own and never waits; else the
// threads share the panels, keys and columns of one tile after the other, and meet a few times a step.
#pragma once

#include <cstdint>

#include "attention_kernels.h"
#include "recurrence.h"

namespace seqattn {

// Rows of a tile at most: what a panel of three vectors multiplies at a time. Of a single step more: nothing of a tile
// is left in cache for the next one, and each tile reads all weights.
inline constexpr int64_t kDecoderRows = 8, kStepRows = 64;

// Attend with h of the step before, then update; update, then attend with the new h; or the first layer updates and
// attends, and the others see its h beside the context.
enum class DecoderOrder : int { bahdanau, luong, between };
enum class DecoderScore : int { additive, dot };
// Which earlier weights the scores know of: none, the last, the last and the sum of all, or that sum.
enum class DecoderHistory : int { none, last, both, sum };
enum class Activation : int { tanh, none };

template <class T>
struct LayerWeights {
  const T *w_ih, *w_hh, *b_ih, *b_hh;  // torch's layout; biases may be null
};

// Shapes: input [B, T, I], h0 and c0 [L, B, H], context0 [B, D], attentional0 [B, M], contexts [B, T, D], weights
// [B, T, S], hidden [L, B, T, H], attentional [B, T, M], reserve [L, B, T, saved * padded(H)], history0 [B, C, S], all
// contiguous.
template <class T>
struct DecoderProblem {
  DecoderOrder order;
  DecoderScore score;
  Activation activation;
  int64_t B, steps, S, I, H, A, D, M, layers;  // M: 0 without an output projection
  // Columns of the input, the context and the attentional vector in w_ih of the first layer (-1: not fed), which has
  // `width` of them; of context and h in w_output.
  int64_t width, input_at, context_at, attentional_at, output_context_at, output_hidden_at;
  int64_t second_context;  // columns of the context in w_ih of the second layer, after those of h; 0: it isn't there
  T scale;                 // of dot scores
  // Additive scores have a term of features, the convolution of C channels of earlier weights (last, then sum).
  DecoderHistory history;
  bool history_gradient;  // whether gradients reach earlier weights through it
  int64_t C, F, window;
  const T *w_conv, *w_feature;     // [F, C, window], [A, F]
  const T *history0, *fertility;   // the sum adds weights / fertility [rows of keys, S]; null: zeros, ones
  AttentionArgs<T> attention;      // keys, values, v, lengths and mask; results of all steps; query is the kernel's own
  const LayerWeights<T>* weights;  // [layers]
  const T *w_query, *b_query, *w_output, *b_output;  // [A, H], [A], [M, D + H], [M]; null: absent
  const T *input, *h0, *c0, *context0, *attentional0;
  T *hidden, *c_n, *attentional, *reserve;  // reserve: null where backward won't be asked for
  T* packed;
  bool packed_given;
  const int64_t* owners;  // [B] the row of keys, values, lengths and mask that each row attends to, or null: its own

  // Free running: the input of a step is the embedding of the most probable word of the step before, until `end`
  // (none: -1). embedding [V, I] or null: not free; w_predict [V, M or H], or null: the output holds the logits.
  const T *embedding, *w_predict, *b_predict;
  int64_t vocabulary, end;
  const int64_t* start;         // [B]
  int64_t *words, *word_count;  // [B, T]; [B], `end` included
  T* log_probs;                 // [B] sums
  int* not_a_number;            // set where a logit is

  // Backward; a null gradient coming in is zero, one going out isn't wanted. Weight gradients are added to.
  const T *d_hidden, *d_c_n, *d_contexts, *d_weights, *d_attentional;
  T *d_input, *d_keys, *d_values, *d_h0, *d_c0, *d_context0, *d_attentional0;
  T *d_history0, *d_fertility;
  // One sum per row: [B, A], [B, C, window, padded(F)], [B, F, padded(A)].
  T *d_v, *d_conv, *d_feature;
  LayerWeights<T>* d_layers;  // pointers to be written through
  T *d_w_query, *d_b_query, *d_w_output, *d_b_output;

  int64_t tile_rows = kDecoderRows;
  bool split;           // each thread takes tiles of its own
  int64_t chunk_steps;  // steps whose input projections (forward) or gradients (backward) are kept at a time
  // common_scratch (backward), then [1, or threads where split] of tile_scratch, then [threads] of thread_scratch.
  T* scratch;
  int64_t common_scratch, tile_scratch, thread_scratch;
  int threads;

  SEQATTN_HERE int64_t tiles() const { return ceil_div(B, tile_rows); }
  SEQATTN_HERE int64_t tile_begin(int64_t tile) const { return B * tile / tiles(); }
  SEQATTN_HERE int64_t layer_width(int64_t layer) const {
    return layer == 0 ? width : layer == 1 ? H + second_context : H;
  }
  SEQATTN_HERE int64_t query_layer() const { return order == DecoderOrder::between ? 0 : layers - 1; }
  // Whether forward multiplies W_ih by the values beforehand, not by each step's context. A single row's product takes
  // as long as its weights take to be read, so S columns in place of D are a gain that the values' product is small to;
  // more rows would each have weights of their own.
  SEQATTN_HERE bool folds() const {
    return B == 1 && context_at >= 0 && M == 0 && second_context == 0 && !embedding && 4 * steps * (D - S) > S * D;
  }
  SEQATTN_HERE bool has_history() const { return history != DecoderHistory::none; }
  SEQATTN_HERE bool knows_last() const { return history == DecoderHistory::last || history == DecoderHistory::both; }
  SEQATTN_HERE bool knows_sum() const { return history == DecoderHistory::both || history == DecoderHistory::sum; }
  SEQATTN_HERE T* hidden_of(int64_t layer, int64_t b, int64_t t) const {
    return hidden + ((layer * B + b) * steps + t) * H;
  }
};

template <class T>
struct DecoderKernels {
  int64_t (*packed_size)(int cell, const DecoderProblem<T>&);
  void (*pack)(int cell, const DecoderProblem<T>&, Gang&);
  void (*forward_scratch)(int cell, DecoderProblem<T>*);
  void (*forward)(int cell, const DecoderProblem<T>&, Gang&);
  void (*backward_scratch)(int cell, DecoderProblem<T>*);
  void (*backward)(int cell, const DecoderProblem<T>&, Gang&);
};

struct DecoderTable {
  DecoderKernels<float> f32;
  DecoderKernels<double> f64;
};

SEQATTN_DECLARE_KERNELS(DecoderTable, decoder_kernels)

}  // namespace seqattn
