// The forward pass on bfloat16 operands, of one instruction set. Beside the usual ones it is compiled for avx512_bf16.
#include "recurrence_forward.h"

namespace seqattn::SEQATTN_ISA {

extern const ForwardKernels<float> bfloat16_kernels;
const ForwardKernels<float> bfloat16_kernels = forward_kernels<float, Bfloat16Pair>();

}  // namespace seqattn::SEQATTN_ISA
