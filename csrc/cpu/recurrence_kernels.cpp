// The recurrence kernels of one instruction set.
#include "recurrence_backward.h"
#include "recurrence_forward.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class T>
constexpr RecurrenceKernels<T> kernels() {
  return {
      forward_kernels<T>(),
      [](int number, RecurrenceProblem<T>* p) {
        with_cell(number, [&](auto cell) { backward_scratch<decltype(cell), T>(p); });
      },
      [](int number, const RecurrenceProblem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) { backward<decltype(cell), T>(p, gang); });
      },
  };
}

}  // namespace

extern const RecurrenceTable recurrence_kernels;
const RecurrenceTable recurrence_kernels = {kernels<float>(), kernels<double>()};

}  // namespace seqattn::SEQATTN_ISA
