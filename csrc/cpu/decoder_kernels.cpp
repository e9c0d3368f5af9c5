// The attentional decoder for one instruction set.
#include "decoder_backward.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class T>
constexpr DecoderKernels<T> kernels() {
  return {
      [](int number, const DecoderProblem<T>& p) {
        return with_cell(number, [&](auto cell) {
          return int64_t(DecoderWeights<decltype(cell), T>(p, nullptr).end - static_cast<T*>(nullptr));
        });
      },
      [](int number, const DecoderProblem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) { pack_decoder<decltype(cell), T>(p, gang); });
      },
      [](int number, DecoderProblem<T>* p) {
        with_cell(number, [&](auto cell) { decoder_forward_scratch<decltype(cell), T>(p); });
      },
      [](int number, const DecoderProblem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) { decoder_forward<decltype(cell), T>(p, gang); });
      },
      [](int number, DecoderProblem<T>* p) {
        with_cell(number, [&](auto cell) { decoder_backward_scratch<decltype(cell), T>(p); });
      },
      [](int number, const DecoderProblem<T>& p, Gang& gang) {
        with_cell(number, [&](auto cell) { decoder_backward<decltype(cell), T>(p, gang); });
      },
  };
}

}  // namespace

extern const DecoderTable decoder_kernels;
const DecoderTable decoder_kernels = {kernels<float>(), kernels<double>()};

}  // namespace seqattn::SEQATTN_ISA
