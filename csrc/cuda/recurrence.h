// One layer of a recurrent network over whole sequences on a GPU: what the launcher (recurrence.cpp) hands to the
// kernels, and the functions it calls. Plain C++: no torch and no CUDA header, so the emulator reads it too.
//
// Types. T is the element type of the tensors (DType), R what sums, pre-activations and cell states are kept in: double
// for float64, float otherwise. Pointers are void here; a kernel knows its T and R.
//
// Rows. Everything that is internal has one row for each (step, sequence), time major: row(t, b). Input, output and
// cell states lie as the caller has them, in the rows out_row(t, b). Sequences stand in the caller's order.
// At step t sequence b takes part where valid(t, b). Where it doesn't, its state passes unchanged, its outputs are zero
// and its gradients of gates are zero: kernels write these zeros. A reverse direction runs t from steps - 1 down, so a
// shorter sequence starts, from its initial state, at t = lengths[b] - 1.
//
// Slots are those of cells/cell.h: x slots [0, G), h slots [kSlots - G, kSlots). Weights, and x_gates, have torch's
// gate order (Cell::x_gate, Cell::h_gate); bias, saved and d_gates have the order of slots.
#pragma once

#include <cstdint>

#include "../cells/cell.h"

namespace seqattn::gpu {

enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct Rows {
  int64_t steps, batch;
  int64_t rows;                 // of internal arrays: steps * batch, or the rows of a packed sequence
  const int64_t* lengths;       // device [batch]; null: all full. Not checked: valid() is safe for any value
  const int64_t* offsets;       // device [steps + 1], first row of each step of a packed sequence; null: padded
  int64_t out_step, out_batch;  // rows of the caller's tensors from one step (sequence) to the next; padded only

  // A packed sequence has lengths too; its rows are those that are valid.
  SEQATTN_CELL bool valid(int64_t t, int64_t b) const { return lengths == nullptr || t < lengths[b]; }
  SEQATTN_CELL int64_t row(int64_t t, int64_t b) const { return (offsets ? offsets[t] : t * batch) + b; }
  SEQATTN_CELL int64_t out_row(int64_t t, int64_t b) const {
    return offsets ? offsets[t] + b : t * out_step + b * out_batch;
  }
  // Whether row(t, b) and out_row(t, b) exist: always when padded, only where valid when packed.
  SEQATTN_CELL bool exists(int64_t t, int64_t b) const { return offsets == nullptr || valid(t, b); }
};

// Values a unit keeps for backward at each row in T: what the cell saves but for its cell state (its last value, kept
// in R by itself), or h' of a cell that saves nothing (RNN).
constexpr int kept(int saved, bool has_cell) { return has_cell ? saved - 1 : saved ? saved : 1; }

// All arrays are on the device, contiguous but for the given strides, and don't overlap.
struct Forward {
  int cell;  // place in cells/registry.h
  DType dtype;
  bool allow_tf32;         // products of float32 may be rounded to tf32
  int64_t hidden, output;  // output: what W_hh multiplies; the projection's size, or hidden
  int directions;
  Rows rows;

  const void* x_gates;  // T [directions][rows][G * hidden], W_ih x alone. Rows that are not valid may hold anything
  const void* w_hh[2];  // T [G * hidden][output], one for each direction
  const void* bias;     // R [directions][kSlots * hidden], b_ih + b_hh as far as a slot receives each; null: none
  const void* h0;       // T [directions][batch][output]; null: zero
  const void* c0;       // T [directions][batch][hidden]; null: zero
  void* output_rows;    // T, direction d in columns [d * output, (d + 1) * output) of out_row(t, b), `ld_output` apart
  void* cell_rows;      // T, the same with hidden, `ld_cell` apart; null: not wanted
  int64_t ld_output, ld_cell;
  void* hn;      // T [directions][batch][output]
  void* cn;      // T [directions][batch][hidden]; null without a cell state
  void* saved;   // T [directions][rows][hidden][kept], a unit's values side by side; null: not wanted
  void* cells;   // R [directions][rows][hidden], c after the step; not null where saved is not and the cell has one
  void* h_prev;  // T [directions][rows][output], h before the step; not null where saved is not. Invalid rows must be
                 // finite (they meet a gradient of zero in a product): write the state that passes. Invalid rows of
                 // saved and cells are never read
};

// Gradients of the gates; gradients of weights, biases and input follow from them in the launcher.
struct Backward {
  int cell;
  DType dtype;
  bool allow_tf32;
  int64_t hidden, output;
  int directions;
  Rows rows;

  const void* w_hh[2];                 // T [G * hidden][output]
  const void *saved, *cells, *h_prev;  // as forward left them
  const void* c0;                      // T [directions][batch][hidden]; null: zero
  const void* d_output;     // T, laid out as output_rows, `ld_output` apart; null: zero. Invalid rows may hold anything
  const void* d_cell_rows;  // T, laid out as cell_rows, `ld_cell` apart; null: zero
  int64_t ld_output, ld_cell;
  const void* d_hn;  // T [directions][batch][output]; null: zero
  const void* d_cn;  // T [directions][batch][hidden]; null: zero
  void* d_gates;     // T [directions][rows][kSlots * hidden], in the order of slots; zero where not valid
  void* d_h0;        // T [directions][batch][output]; null: not wanted
  void* d_c0;        // T [directions][batch][hidden]; null: not wanted
};

// The cell state before step t of a sequence is cells[row of the step before], or c0 at its first step:
// t == 0 forward, t == length - 1 in reverse.

struct Plan;  // plan.h

// Persistent kernels: the whole sequence in one launch. `workspace` has plan.workspace_bytes bytes, zeroed by the
// launcher on the same stream; hidden == output. Null on success, else a message (static storage) and nothing launched.
const char* persistent_forward(const Plan& plan, const Forward& args, void* workspace, void* stream);
const char* persistent_backward(const Plan& plan, const Backward& args, void* workspace, void* stream);

}  // namespace seqattn::gpu
