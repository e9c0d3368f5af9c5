// The attentional decoder on a GPU, all steps in one launch: what the launcher hands to the kernel.
//
// Each step attends with the h of the step before (Bahdanau et al., 2014) and then updates the cell:
//   q = W_q h + b_q;  score[s] = v . tanh(q + key[s]);  context = softmax(score) values;
//   gates = x_gates[t] + W_c context + W_hh h + bias.
// Plain C++: no torch and no CUDA header, so the emulator reads it too.
#pragma once

#include <cstdint>

#include "recurrence.h"

namespace seqattn::gpu {

// All arrays are on the device and don't overlap; T is bfloat16 or half. Sizes and strides in elements.
struct DecoderForward {
  int cell;  // place in cells/registry.h
  DType dtype;
  int64_t batch, steps, source;      // B, T, S
  int64_t hidden, attention, value;  // H, A, D

  const void* x_gates;  // T, columns [G * H] of row t * x_step + b * x_batch: W_ih's share of the input
  int64_t x_step, x_batch;
  const void* w_hh;       // T [G * H][H]
  const void* w_context;  // T, columns [D] of [G * H] rows, `ld_context` apart, 16-byte aligned
  int64_t ld_context;
  const void* bias;     // float [kSlots * H] in the order of slots, b_ih + b_hh as far as a slot receives each; or null
  const void* w_query;  // T [A][H]
  const float* b_query;    // [A] or null
  const float* v;          // [A]
  const void* keys;        // T [B][S][A], 16-byte aligned, A a multiple of 8
  const void* values;      // T [B][S][D], 16-byte aligned, D a multiple of 8
  const int64_t* lengths;  // [B] or null; read as if clamped to [0, S]
  const bool* mask;        // [B][S], true: attend; or null. A row that attends to nothing has zero weights and context
  const void *h0, *c0;     // T [B][H] or null

  // Earlier weights in the scores: score[s] = v . tanh(q + key[s] + W_feature f[s]), where f is the convolution over
  // the keys of C channels, the last weights, the sum of all earlier ones, or both in this order. No filters: none of
  // this.
  int64_t filters, channels, window;  // F, C, W odd
  bool knows_last, knows_sum;
  const void* history0;   // T [B][C][S], the channels before the first step; null: zeros
  const void* w_conv;     // T [F][C][W rounded up to a multiple of 4, zeros there], 8-byte aligned
  const void* w_feature;  // T [F][A], 8-byte aligned
  const void* fertility;  // T [B][S], what the sum's weights are divided by, or null

  void* output;    // T [B][T][H], h of every step
  void* contexts;  // T [B][T][D]
  void* weights;   // T [B][T][S] or null
  void *hn, *cn;   // T [B][H]; cn null without a cell state
  void* saved;     // T [B][T][H][kept], what a unit keeps for backward (recurrence.h), 8-byte aligned; or null
  float* cells;    // [B][T][H], c after each step; not null where saved is not and the cell has one
};

// What is a chain in time of the gradients: from h and c through the cell, context, weights and scores to q, and from q
// and the gates to the h before. Gradients of weights, keys and values follow from those of all steps at once.
//
// A step, backward in time: decoder_backward_cell; a product of the gates' gradients with W_context;
// decoder_backward_attention; a product of d_step with W_hh and W_query, one above the other.
struct DecoderBackward {
  int cell;
  DType dtype;
  int64_t batch, steps, source, hidden, attention, value;
  int64_t step_width;  // G * H + A

  const void* saved;  // as forward left them
  const float* cells;
  const void *output, *weights;
  const void* queries;  // T [B][T][A], q of every step, 16-byte aligned
  const float* v;
  const void *keys, *values;
  const int64_t* lengths;
  const void *h0, *c0;
  const void *d_output, *d_contexts, *d_weights;  // T, of forward's results, d_contexts 16-byte aligned; or null
  const void* d_cn;                               // T [B][H] or null

  const float* h_product;        // [B][H], the last product of the step after
  const float* context_product;  // [B][D], the product before decoder_backward_attention, 16-byte aligned
  float *dh, *dc;                // [B][H], gradients of h as far as it doesn't pass W_hh or W_query, and of c

  void* d_x_gates;    // T [B][T][G * H], gradients of the gates that the input reaches, in torch's order
  void* d_step;       // T [B][T][step_width], of those that h reaches, in torch's order, and of q
  void* d_context;    // T [B][T][D], all of a context's gradient, 16-byte aligned
  float* d_scores;    // [B][T][S], zero where a weight is
  void *d_h0, *d_c0;  // T [B][H] or null
};

// Step t: gradients of the gates from those of the state.
void decoder_backward_cell(const DecoderBackward& args, int64_t t, void* stream);
// Step t: gradients of the context, the scores and q, on a device of `sm_count` multiprocessors.
void decoder_backward_attention(const DecoderBackward& args, int64_t t, int sm_count, void* stream);
// Of the initial state, after all steps.
void decoder_backward_finish(const DecoderBackward& args, void* stream);

// For sizes that decoder_why_not (plan.h) has nothing against; `shared_limit`: bytes a block may use. Null on success,
// else a message (static storage) and nothing launched.
const char* decoder_forward(const DecoderForward& args, int64_t shared_limit, void* stream);

}  // namespace seqattn::gpu
