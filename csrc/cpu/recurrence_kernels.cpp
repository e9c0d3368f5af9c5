// The recurrence kernels of one instruction set.
#include "recurrence_backward.h"
#include "recurrence_forward.h"
#include "with_cell.h"

namespace seqattn::SEQATTN_ISA {
namespace {

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
