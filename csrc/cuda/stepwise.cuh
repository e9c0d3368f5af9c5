// Kernels of the stepwise path: the gates of one step, one thread for each unit of each sequence.
#pragma once

#include <type_traits>

#include "../cells/registry.h"
#include "platform.cuh"
#include "stepwise.h"

namespace seqattn::gpu {

inline constexpr int kStepThreads = 128;

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
SEQATTN_DEVICE Sum<T> widen(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <class T>
SEQATTN_DEVICE T rounded(Sum<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <class T>
SEQATTN_DEVICE const T* at(const void* p, int64_t index) {
  return static_cast<const T*>(p) + index;
}

template <class T>
SEQATTN_DEVICE T* at(void* p, int64_t index) {
  return static_cast<T*>(p) + index;
}

SEQATTN_DEVICE int64_t global_thread() { return int64_t(block_index()) * block_size() + thread_index(); }

template <class Cell, class T>
SEQATTN_KERNEL(kStepThreads)
step_forward_kernel(SEQATTN_KERNEL_PARAM ForwardStep step, int64_t forward_t) {
  using R = Sum<T>;
  const Forward& a = step.args;
  const int64_t H = a.hidden, i = global_thread(), b = i / H, j = i % H;
  if (b >= a.rows.batch) return;
  const int d = block_index_z();
  const int64_t t = d ? a.rows.steps - 1 - forward_t : forward_t;
  if (!a.rows.exists(t, b)) return;
  const bool projected = step.unprojected != nullptr;
  const bool valid = a.rows.valid(t, b);
  const int64_t row = d * a.rows.rows + a.rows.row(t, b), out_row = a.rows.out_row(t, b);
  const int64_t state = (d * a.rows.batch + b) * H + j;
  if (!projected && a.h_prev) *at<T>(a.h_prev, row * H + j) = *at<T>(step.h, state);
  R c_new = 0, h_new = 0;
  if (valid) {
    constexpr int G = Cell::kGates, S = Cell::kSlots;
    R pre[S] = {};
    if (a.bias) {
      SEQATTN_UNROLL
      for (int s = 0; s < S; ++s) pre[s] = *at<R>(a.bias, (int64_t(d) * S + s) * H + j);
    }
    SEQATTN_UNROLL
    for (int s = 0; s < G; ++s) pre[s] += widen(*at<T>(a.x_gates, (row * G + Cell::x_gate(s)) * H + j));
    SEQATTN_UNROLL
    for (int s = S - G; s < S; ++s) {
      pre[s] += *at<R>(step.h_gates, ((d * a.rows.batch + b) * G + Cell::h_gate(s)) * H + j);
    }
    const R h = projected ? R(0) : widen(*at<T>(step.h, state));
    R c = 0;
    if constexpr (Cell::kHasCell) c = *at<R>(step.c, state);
    R saved[Cell::kSaved + 1];
    Cell::template forward<Math<R>>(pre, h, c, &h_new, &c_new, saved);
    if (!projected) *at<T>(step.h, state) = rounded<T>(h_new);
    if constexpr (Cell::kHasCell) *at<R>(step.c, state) = c_new;
    if (a.saved) {
      constexpr int K = kept(Cell::kSaved, Cell::kHasCell);
      if constexpr (Cell::kSaved == 0) saved[0] = h_new;
      SEQATTN_UNROLL
      for (int k = 0; k < K; ++k) *at<T>(a.saved, (row * H + j) * K + k) = rounded<T>(saved[k]);
      if constexpr (Cell::kHasCell) *at<R>(a.cells, row * H + j) = c_new;
    }
  }
  if (projected) {
    *at<T>(step.unprojected, state) = rounded<T>(h_new);
    if (step.unprojected_rows) *at<T>(step.unprojected_rows, row * H + j) = rounded<T>(h_new);
  } else {
    *at<T>(a.output_rows, out_row * a.ld_output + d * H + j) = rounded<T>(h_new);
  }
  if constexpr (Cell::kHasCell) {
    if (a.cell_rows) *at<T>(a.cell_rows, out_row * a.ld_cell + d * H + j) = rounded<T>(c_new);
  }
}

// After the product of a projection: the projected h becomes state and output.
template <class T>
SEQATTN_KERNEL(kStepThreads)
project_forward_kernel(SEQATTN_KERNEL_PARAM ForwardStep step, int64_t forward_t) {
  using R = Sum<T>;
  const Forward& a = step.args;
  const int64_t P = a.output, i = global_thread(), b = i / P, j = i % P;
  if (b >= a.rows.batch) return;
  const int d = block_index_z();
  const int64_t t = d ? a.rows.steps - 1 - forward_t : forward_t;
  if (!a.rows.exists(t, b)) return;
  const int64_t row = d * a.rows.rows + a.rows.row(t, b), state = (d * a.rows.batch + b) * P + j;
  T* h = at<T>(step.h, state);
  if (a.h_prev) *at<T>(a.h_prev, row * P + j) = *h;
  T out = rounded<T>(R(0));
  if (a.rows.valid(t, b)) {
    out = rounded<T>(*at<R>(step.projected, state));
    *h = out;
  }
  *at<T>(a.output_rows, a.rows.out_row(t, b) * a.ld_output + d * P + j) = out;
}

// The gradient of h after step t, as far as it comes from outside the cell.
template <class T>
SEQATTN_DEVICE Sum<T> incoming(const BackwardStep& step, int d, int64_t t, int64_t b, int64_t j) {
  using R = Sum<T>;
  const Backward& a = step.args;
  const int64_t N = a.output, state = (d * a.rows.batch + b) * N + j;
  return *at<R>(step.dh_product, state) + *at<R>(step.dh_carry, state);
}

template <class T>
SEQATTN_KERNEL(kStepThreads)
project_backward_kernel(SEQATTN_KERNEL_PARAM BackwardStep step, int64_t forward_t) {
  using R = Sum<T>;
  const Backward& a = step.args;
  const int64_t P = a.output, i = global_thread(), b = i / P, j = i % P;
  if (b >= a.rows.batch) return;
  const int d = block_index_z();
  const int64_t t = d ? a.rows.steps - 1 - forward_t : forward_t;
  const int64_t state = (d * a.rows.batch + b) * P + j;
  const bool valid = a.rows.valid(t, b);
  R dh = incoming<T>(step, d, t, b, j);
  *at<R>(step.dh_carry, state) = valid ? R(0) : dh;
  if (!valid) {
    dh = 0;
  } else if (a.d_output) {
    dh += widen(*at<T>(a.d_output, a.rows.out_row(t, b) * a.ld_output + d * P + j));
  }
  *at<T>(step.d_projected, state) = rounded<T>(dh);
  if (a.rows.exists(t, b)) {
    *at<T>(step.d_projected_rows, (d * a.rows.rows + a.rows.row(t, b)) * P + j) = rounded<T>(dh);
  }
}

template <class Cell, class T>
SEQATTN_KERNEL(kStepThreads)
step_backward_kernel(SEQATTN_KERNEL_PARAM BackwardStep step, int64_t forward_t) {
  using R = Sum<T>;
  constexpr int G = Cell::kGates, S = Cell::kSlots;
  const Backward& a = step.args;
  const int64_t H = a.hidden, i = global_thread(), b = i / H, j = i % H;
  if (b >= a.rows.batch) return;
  const int d = block_index_z();
  const int64_t t = d ? a.rows.steps - 1 - forward_t : forward_t;
  const bool projected = step.d_unprojected != nullptr;
  const int64_t state = (d * a.rows.batch + b) * H + j;
  const bool exists = a.rows.exists(t, b), valid = a.rows.valid(t, b);
  R d_pre[S] = {};
  R dh = projected ? *at<R>(step.d_unprojected, state) : incoming<T>(step, d, t, b, j);
  if (valid) {
    const int64_t row = d * a.rows.rows + a.rows.row(t, b), out_row = a.rows.out_row(t, b);
    constexpr int K = kept(Cell::kSaved, Cell::kHasCell);
    if (!projected && a.d_output) dh += widen(*at<T>(a.d_output, out_row * a.ld_output + d * H + j));
    R saved[K + 1], h = 0, h_new = 0, c = 0, dc = 0, dh_cell = 0, dc_cell = 0;
    SEQATTN_UNROLL
    for (int k = 0; k < K; ++k) saved[k] = widen(*at<T>(a.saved, (row * H + j) * K + k));
    if constexpr (Cell::kSaved == 0) h_new = saved[0];
    if (!projected) h = widen(*at<T>(a.h_prev, row * H + j));
    if constexpr (Cell::kHasCell) {
      saved[K] = *at<R>(a.cells, row * H + j);
      const int64_t before = d ? t + 1 : t - 1;
      if (before >= 0 && before < a.rows.steps && a.rows.valid(before, b)) {
        c = *at<R>(a.cells, (d * a.rows.rows + a.rows.row(before, b)) * H + j);
      } else if (a.c0) {
        c = widen(*at<T>(a.c0, state));
      }
      dc = *at<R>(step.dc, state);
      if (a.d_cell_rows) dc += widen(*at<T>(a.d_cell_rows, out_row * a.ld_cell + d * H + j));
    }
    Cell::template backward<Math<R>>(saved, h, c, h_new, dh, dc, d_pre, &dh_cell, &dc_cell);
    dh = dh_cell;
    if constexpr (Cell::kHasCell) *at<R>(step.dc, state) = dc_cell;
  }
  if (!projected) *at<R>(step.dh_carry, state) = dh;
  if (exists) {
    const int64_t row = d * a.rows.rows + a.rows.row(t, b);
    SEQATTN_UNROLL
    for (int s = 0; s < S; ++s) *at<T>(a.d_gates, (row * S + s) * H + j) = rounded<T>(d_pre[s]);
  }
  SEQATTN_UNROLL
  for (int s = S - G; s < S; ++s) {
    *at<T>(step.d_step, ((d * a.rows.batch + b) * G + Cell::h_gate(s)) * H + j) = rounded<T>(d_pre[s]);
  }
}

template <class T>
SEQATTN_KERNEL(kStepThreads)
finish_backward_kernel(SEQATTN_KERNEL_PARAM BackwardStep step) {
  using R = Sum<T>;
  const Backward& a = step.args;
  const int64_t i = global_thread();
  if (a.d_h0 && i < a.directions * a.rows.batch * a.output) {
    *at<T>(a.d_h0, i) = rounded<T>(*at<R>(step.dh_product, i) + *at<R>(step.dh_carry, i));
  }
  if (a.d_c0 && i < a.directions * a.rows.batch * a.hidden) *at<T>(a.d_c0, i) = rounded<T>(*at<R>(step.dc, i));
}

}  // namespace seqattn::gpu
