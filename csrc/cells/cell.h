// What a recurrent cell is made of. A cell is a struct of constants and two functions, templated over a `Math` that
// brings the value type (a vector on a CPU, a number on a GPU) and exp, sigmoid, tanh, relu:
//
//   kName      its name in operators
//   kGates     rows of weight_ih and weight_hh, in units of H, in torch's order
//   kHasCell   whether it carries a cell state c beside h
//   kSlots     pre-activations a unit has. Slots [0, kGates) receive W_ih x, slots [kSlots - kGates, kSlots) receive
//              W_hh h, so where the two ranges overlap the products are simply added
//   x_gate(s), h_gate(s)   torch's gate whose rows of W_ih (W_hh) slot s receives
//   kSaved     values a unit keeps for backward at each step
//   forward    pre-activations and previous state -> new state and saved values
//   backward   saved values, previous and new state, gradients of the new state -> gradients of the pre-activations
//              and of the previous state, as far as it doesn't flow through W_hh
//
// No torch header is included here: the same text serves CPU kernels, CUDA kernels and the emulator.
#pragma once

#if defined(__CUDACC__)
#define SEQATTN_CELL __host__ __device__ __forceinline__
#else
#define SEQATTN_CELL inline __attribute__((always_inline))
#endif
