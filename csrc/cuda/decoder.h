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

  void* output;    // T [B][T][H], h of every step
  void* contexts;  // T [B][T][D]
  void* weights;   // T [B][T][S] or null
  void *hn, *cn;   // T [B][H]; cn null without a cell state
};

// For sizes that decoder_why_not (plan.h) has nothing against; `shared_limit`: bytes a block may use. Null on success,
// else a message (static storage) and nothing launched.
const char* decoder_forward(const DecoderForward& args, int64_t shared_limit, void* stream);

}  // namespace seqattn::gpu
