// What an attention score is made of. A score is a struct of constants and functions over a `Math` that brings the
// value type (a vector on a CPU, a number on a GPU) and exp, tanh:
//
//   kName       its name in operators
//   forward     one element q[t, a], k[s, a] -> its term of the sum over a, without the weight v[a]
//   gradient    the same term -> its derivative by q + k
// and whatever forms of the same sum are faster where their range allows.
//
// No torch header is included here: the same text serves CPU kernels, CUDA kernels and the emulator.
#pragma once

#if defined(__CUDACC__)
#define SEQATTN_SCORE __host__ __device__ __forceinline__
#else
#define SEQATTN_SCORE inline __attribute__((always_inline))
#endif
