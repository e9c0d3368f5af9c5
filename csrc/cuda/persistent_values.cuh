// Where a persistent backward kernel finds what forward left and the gradient of the output, in pieces of 16 bytes.
#pragma once

#include "persistent.cuh"

namespace seqattn::gpu {

// A piece that a lane fetches at each step. Step t is `step` * t (or offsets[t]) bytes from `from`, each further
// sequence `sequence` bytes; `traits` has 1 for a piece of the step before (in forward's time), 2 for an aligned one,
// and 4 times one more than the bytes to the end of a row, at most 16; 0 for none.
struct ValuePiece {
  const unsigned char* from;
  int step, sequence, traits;
};

// The piece a lane fetches in round i, of the 2 * Shape::kValuePieces that its warp needs: for its own column.
template <class Shape>
SEQATTN_DEVICE ValuePiece value_piece(const Backward& args, const Sequences& sequences, int group, int column, int i) {
  constexpr TeamShape kTeam = Shape::kShape;
  constexpr int kBytes = sizeof(typename Shape::T), kKept = kTeam.cell.kept;
  constexpr int kH = kTeam.kept_pieces(), kC = kH + kTeam.h_pieces(), kD = kC + kTeam.cell_pieces();
  const Standing here = standing<Shape>();
  if constexpr (kBytes == 2) group = here.group;  // found anew: the loop needs the registers
  const int k = here.lane / 2 + 16 * i, group_unit = here.rank * Shape::kUnits + group * kGroupUnits;
  const bool is_h = k >= kH && k < kC, is_c = k >= kC && k < kD, is_d = k >= kD;
  const void* base = is_h ? args.h_prev : is_c ? args.cells : is_d ? args.d_output : args.saved;
  const int unit_bytes = is_c ? 4 : is_h || is_d ? kBytes : kKept * kBytes;
  const int at = (k - (is_h ? kH : is_c ? kC : is_d ? kD : 0)) * 16;
  const int row_bytes = is_d ? sequences.ld_output : sequences.hidden * unit_bytes;
  const int sequence_rows = is_d && !sequences.packed ? sequences.out_batch : 1;
  const int step_rows = sequences.packed ? 1 : is_d ? sequences.out_step : sequences.batch;
  const int left = (sequences.hidden - group_unit) * unit_bytes - at;
  const int direction_row = here.direction * static_cast<int>(args.rows.rows);
  const int64_t begin =
      is_d ? here.direction * sequences.hidden : static_cast<int64_t>(direction_row) * sequences.hidden;
  ValuePiece own;
  own.from = static_cast<const unsigned char*>(base) + (begin + group_unit) * unit_bytes + at +
             static_cast<int64_t>(sequences.first + column) * sequence_rows * row_bytes;
  own.step = step_rows * row_bytes;
  own.sequence = sequence_rows * row_bytes;
  const bool aligned = own.step % 16 == 0 && own.sequence % 16 == 0 && reinterpret_cast<uintptr_t>(own.from) % 16 == 0;
  own.traits = (is_c ? 1 : 0) + (aligned ? 2 : 0) + 4 * (1 + (left < 0 ? 0 : left < 16 ? left : 16));
  if (k >= Shape::kValuePieces || base == nullptr) own.traits = 0;
  return own;
}

}  // namespace seqattn::gpu
