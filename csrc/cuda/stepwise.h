// The kernels of the stepwise path and of the work around every path, as the launcher calls them: each function starts
// kernels on the stream and returns; errors are exceptions. Products stand between them (products.h).
#pragma once

#include "recurrence.h"

namespace seqattn::gpu {

// Buffers of the stepwise forward; T and R as in recurrence.h.
struct ForwardStep {
  Forward args;
  const void* h_gates;  // R [directions][batch][G * hidden], W_hh h of this step
  void* h;              // T [directions][batch][output], the state: read, and replaced where valid
  void* c;              // R [directions][batch][hidden], likewise; null without a cell state
  // With a projection only:
  void* unprojected;  // T [directions][batch][hidden], o * tanh(c), which the projection reads next
  void*
      unprojected_rows;   // T [directions][rows][hidden], the same for backward, zero where not valid; null: not wanted
  const void* projected;  // R [directions][batch][output], W_hr times unprojected: what project_forward takes
};

// Buffers of the stepwise backward.
struct BackwardStep {
  Backward args;
  const void* dh_product;  // R [directions][batch][output], W_hh^T times d_step of the step before
  void* dh_carry;          // R [directions][batch][output], gradient of h that doesn't pass W_hh: read and replaced
  void* dc;                // R [directions][batch][hidden], gradient of c: read and replaced; null without a cell state
  void* d_step;            // T [directions][batch][G * hidden], gradients of the h slots of this step
  // With a projection only:
  void* d_projected;          // T [directions][batch][output], gradient of the projected h, zero where not valid
  void* d_projected_rows;     // T [directions][rows][output], the same for all steps
  const void* d_unprojected;  // R [directions][batch][hidden], W_hr^T times d_projected: what step_backward takes
};

// bias R [directions][kSlots * hidden] from torch's biases T [G * hidden] of each direction.
void combine_bias(int cell, DType dtype, int64_t hidden, int directions, const void* const* b_ih,
                  const void* const* b_hh, void* bias, void* stream);

// to[i] = from[i], or 0 where `from` is null; types as given.
void convert(DType from_type, const void* from, DType to_type, void* to, int64_t count, void* stream);

void step_forward(const ForwardStep& step, int64_t t, void* stream);
void project_forward(const ForwardStep& step, int64_t t, void* stream);
void project_backward(const BackwardStep& step, int64_t t, void* stream);
void step_backward(const BackwardStep& step, int64_t t, void* stream);
// d_h0 and d_c0 after the last step.
void finish_backward(const BackwardStep& step, void* stream);

// to[row(t, b)] = from[out_row(t, b)], zeros where not valid; rows of `width` values.
void gather_rows(DType dtype, const Rows& rows, const void* from, void* to, int64_t width, void* stream);
// to[out_row(t, b)] = from[row(t, b)], zeros where not valid.
void scatter_rows(DType dtype, const Rows& rows, const void* from, void* to, int64_t width, void* stream);

// Sums of the columns of T [rows][columns] into R [columns], in a fixed order. `partial` has column_chunks(rows) *
// columns values of R.
int64_t column_chunks(int64_t rows);
void column_sums(DType dtype, const void* from, int64_t rows, int64_t columns, void* partial, void* sums, void* stream);
// d_b_ih and d_b_hh, T [G * hidden], from the sums R [kSlots * hidden].
void split_bias(int cell, DType dtype, int64_t hidden, const void* sums, void* d_b_ih, void* d_b_hh, void* stream);

// A float32 matrix as three copies in bfloat16, one of them what rounding left (Precise in products.h): `to` has
// [rows][3 * depth] values, or [3 * depth][columns] where stacked; this matrix fills depth from `begin` on.
void split(const void* from, int64_t rows, int64_t columns, int64_t ld, void* to, int64_t depth, int64_t begin,
           bool stacked, bool second_low, void* stream);

void clear(void* to, int64_t bytes, void* stream);

// Writes values[0..count) from the host to the device without reading the host's memory later: safe in a capture.
void write_values(const int64_t* values, int64_t count, int64_t* to, void* stream);

}  // namespace seqattn::gpu
