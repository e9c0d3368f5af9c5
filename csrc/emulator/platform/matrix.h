// Products on tensor cores, for the emulator: the last lane to come computes for the warp.
#pragma once

#include "memory.h"

namespace seqattn::emulator {

struct MatrixRequest {
  float* d;
  const uint32_t *a, *b;
};
enum class MatrixType { half, bfloat16, tf32 };
template <MatrixType kType>
void multiply(Machine&, Warp& warp);
extern template void multiply<MatrixType::half>(Machine&, Warp&);
extern template void multiply<MatrixType::bfloat16>(Machine&, Warp&);
extern template void multiply<MatrixType::tf32>(Machine&, Warp&);

__attribute__((noinline)) void load_matrices(uint32_t* result, int matrices, bool transpose, const Spot& row,
                                             Place place);

}  // namespace seqattn::emulator

namespace seqattn::gpu {

template <class T>
SEQATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 Here here = Here::current()) {
  static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16>);
  using emulator::MatrixType;
  constexpr MatrixType kType = std::is_same_v<T, half> ? MatrixType::half : MatrixType::bfloat16;
  emulator::MatrixRequest request{d, a, b};
  detail::machine().meet_warp("mma_m16n8k16", &request, &emulator::multiply<kType>, detail::place(here));
}
SEQATTN_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                Here here = Here::current()) {
  emulator::MatrixRequest request{d, a, b};
  detail::machine().meet_warp("mma_m16n8k8", &request, &emulator::multiply<emulator::MatrixType::tf32>,
                              detail::place(here));
}

template <int kMatrices, bool kTranspose = false, class T>
SEQATTN_DEVICE void ldmatrix(uint32_t (&r)[kMatrices], detail::Pointer<T> row, Here here = Here::current()) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  emulator::load_matrices(r, kMatrices, kTranspose, row.spot(), detail::place(here));
}

}  // namespace seqattn::gpu
