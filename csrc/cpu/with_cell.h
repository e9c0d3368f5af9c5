// From a cell's number in an operator to its type, for kernels of one instruction set.
#pragma once

#include "../cells/registry.h"

namespace seqattn::SEQATTN_ISA {

// Calls run(cell) with the cell of this number, in the order of the registry.
template <class F>
auto with_cell(int number, F&& run) {
  int i = 0;
#define SEQATTN_CASE(Cell) \
  if (number == i++) return run(Cell());
  SEQATTN_FOR_EACH_CELL(SEQATTN_CASE)
#undef SEQATTN_CASE
  __builtin_unreachable();
}

}  // namespace seqattn::SEQATTN_ISA
