// The recurrence kernels of one instruction set.
#include "../cells/registry.h"
#include "recurrence_backward.h"
#include "recurrence_forward.h"

namespace seqattn::SEQATTN_ISA {
namespace {

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

template <class T>
constexpr RecurrenceKernels<T> kernels() {
  return {
      [](int number, const Sizes& sizes) {
        return with_cell(number, [&](auto cell) { return PackedWeights<decltype(cell), T>::size(sizes); });
      },
      [](int number, const Sizes& sizes, Direction<T>& d, Gang& gang) {
        with_cell(number, [&](auto cell) { pack_weights<decltype(cell), T>(sizes, d, gang); });
      },
      [](int number, Problem<T>* p) {
        with_cell(number, [&](auto cell) { forward_scratch<decltype(cell), T>(p); });
      },
      [](int number, const Problem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) { forward<decltype(cell), T>(p, gang); });
      },
      [](int number, Problem<T>* p) {
        with_cell(number, [&](auto cell) { backward_scratch<decltype(cell), T>(p); });
      },
      [](int number, const Problem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) { backward<decltype(cell), T>(p, gang); });
      },
  };
}

}  // namespace

extern const RecurrenceTable recurrence_kernels;
const RecurrenceTable recurrence_kernels = {kernels<float>(), kernels<double>()};

}  // namespace seqattn::SEQATTN_ISA
