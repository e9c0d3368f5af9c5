// One step of a recurrent cell: what the launcher (cell.cpp) hands to the kernels (cell_kernels.cpp).
#pragma once

#include "recurrence.h"

namespace seqattn {

// Values a unit keeps for the backward of one step; h' takes the place where the cell keeps nothing else.
constexpr int step_reserved(int saved) { return saved ? saved : 1; }

template <class T>
struct StepProblem {
  Sizes sizes;
  int64_t batch;
  const T *x, *h, *c;  // [batch, input], [batch, hidden] twice; h and c may be null: zero
  const T *w_ih, *w_hh, *b_ih, *b_hh;
  const T* packed;  // as packed for sequences, or null
  T *h_new, *c_new;
  T* reserve;  // [batch][step_reserved][padded(hidden)] or null

  // Backward; a null gradient coming in is zero, one going out isn't wanted.
  const T *d_h_new, *d_c_new;
  T *d_x, *d_h, *d_c, *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh;

  T* scratch;  // shared_scratch, then [threads] of thread_scratch
  int64_t shared_scratch, thread_scratch;
  int threads;
};

template <class T>
struct StepKernels {
  void (*forward_scratch)(int cell, StepProblem<T>*);
  void (*forward)(int cell, const StepProblem<T>&, Gang&);
  void (*backward_scratch)(int cell, StepProblem<T>*);
  void (*backward)(int cell, const StepProblem<T>&, Gang&);
};

struct StepTable {
  StepKernels<float> f32;
  StepKernels<double> f64;
};

SEQATTN_DECLARE_KERNELS(StepTable, step_kernels)

}  // namespace seqattn
