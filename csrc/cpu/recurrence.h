// One layer of a recurrent network over whole sequences: what the launcher (recurrence.cpp) hands to the kernels.
//
// Rows. The data of time step t and sequence i is row step_row[t] + batch_row[i] of the input and the output; time
// major, batch first and packed sequences differ only in these two arrays. Sequences are sorted by falling length, so
// that active[t] says which of them take part in step t. Compact rows number the active (t, i) pairs: first[t] + i.
//
// Hidden units are padded to kUnitPad in packed weights, reserves and scratch; the input, the output, the states and
// torch's weights are not.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "gang.h"

namespace seqattn {

inline constexpr int64_t kUnitPad = 16;

constexpr int64_t padded(int64_t n) { return (n + kUnitPad - 1) / kUnitPad * kUnitPad; }

// Values a unit keeps for backward: the cell's own, and h (its place in the row of a projected cell holds the output).
constexpr int reserved(int saved) { return saved + 1; }

struct Rows {
  int64_t steps, batch;
  const int64_t* active;       // [steps]
  const int64_t* first;        // [steps + 1]
  const int64_t* step_row;     // [steps]
  const int64_t* batch_row;    // [batch]
  const int64_t* batch_index;  // [batch] place of sequence i in the states
  const int64_t* length;       // [batch] falling
  bool dense;                  // compact row r is row step_row[0] + r
  bool zero_fill;              // rows past a sequence's length exist and must read 0

  int64_t row(int64_t t, int64_t i) const { return step_row[t] + batch_row[i]; }
};

struct Sizes {
  int64_t input, hidden, output;  // output: projection size, or hidden
  bool projected;
};

// One direction's weights (torch's layout, contiguous; biases and w_hr may be null), states and results.
template <class T>
struct Direction {
  bool reverse;
  const T *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
  const T *h0, *c0;  // [batch, output], [batch, hidden]; null: zero
  T* output;         // rows of output values, ld given beside
  T* cell_states;    // rows of hidden values or null
  T *hn, *cn;        // [batch, output], [batch, hidden]
  T* reserve;        // [compact rows][reserved][padded(hidden)] or null
  T* packed;         // packed_size() values, each in the place of a T: given, or to be filled as WeightUse says

  // Backward only; gradients that are null are zero (d_*n, d_output) or not wanted (others).
  const T *d_output, *d_cell_states, *d_hn, *d_cn;
  T *d_h0, *d_c0, *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh, *d_w_hr;
  T* d_input;
};

// Where the products with W_ih (W_hh) find their weights.
enum class WeightUse {
  given,     // packed by an earlier call
  packed,    // packed by this call before anything else, for many uses
  in_cache,  // packed panel by panel just before the only use
  in_place,  // read as torch keeps them: for few rows that is quicker than packing
};

template <class T>
struct RecurrenceProblem {
  Rows rows;
  Sizes sizes;
  const T* input;
  int64_t ld_input, ld_output, ld_cell;  // values between rows
  int directions;
  Direction<T> direction[2];
  WeightUse ih, hh;
  int64_t chunk_rows;  // rows whose input projections (forward) or gate gradients (backward) are kept at a time
  T* scratch;          // [directions] of shared_scratch, then [threads] of thread_scratch
  int64_t shared_scratch, thread_scratch;
  int threads;
  BarrierFlag* flags;  // [directions][threads], zero
};

template <class T>
struct ForwardKernels {
  int64_t (*packed_size)(int cell, const Sizes&);
  void (*pack)(int cell, const Sizes&, Direction<T>&, Gang&);
  void (*forward_scratch)(int cell, RecurrenceProblem<T>*);
  void (*forward)(int cell, const RecurrenceProblem<T>&, Gang&);
};

template <class T>
struct RecurrenceKernels : ForwardKernels<T> {
  void (*backward_scratch)(int cell, RecurrenceProblem<T>*);
  void (*backward)(int cell, const RecurrenceProblem<T>&, Gang&);
};

struct RecurrenceTable {
  RecurrenceKernels<float> f32;
  RecurrenceKernels<double> f64;
};

SEQATTN_DECLARE_KERNELS(RecurrenceTable, recurrence_kernels)

// Weights, x and h rounded to bfloat16 for the products, sums and all else in float.
using Bfloat16Table = ForwardKernels<float>;
SEQATTN_DECLARE_BFLOAT16_KERNELS(Bfloat16Table, bfloat16_kernels)

}  // namespace seqattn
