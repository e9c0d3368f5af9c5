// Products on tensor cores, for nvcc: warp-wide, called by all lanes.
#pragma once

#include "memory.cuh"

namespace seqattn::gpu {

// Fragments, with lane = 4 * g + q:
//   m16n8k16  a[0] = A[g][2q, 2q+1]  a[1] = A[g+8][2q, 2q+1]  a[2] = A[g][2q+8, 2q+9]  a[3] = A[g+8][2q+8, 2q+9]
//             b[0] = B[2q, 2q+1][g]  b[1] = B[2q+8, 2q+9][g]                      (lower index in the low half)
//   m16n8k8   a[0] = A[g][q]  a[1] = A[g+8][q]  a[2] = A[g][q+4]  a[3] = A[g+8][q+4]   b[0] = B[q][g]  b[1] = B[q+4][g]
//   both      d[0], d[1] = D[g][2q, 2q+1]   d[2], d[3] = D[g+8][2q, 2q+1]
// D[16][8] += A[16][16] B[16][8], elements bfloat16 or half, sums in float.
template <class T>
SEQATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
SEQATTN_DEVICE void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
SEQATTN_DEVICE void mma_m16n8k16<half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// D[16][8] += A[16][8] B[8][8], elements tf32 (bits from to_tf32; other bits are cut off), sums in float.
SEQATTN_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads kMatrices (1, 2 or 4) 8x8 matrices of 16-bit elements. Lane 8 m + i points to row i of matrix m (16 bytes,
// aligned to 16; lanes past 8 * kMatrices are not read). Then r[m] of lane 4 g + q holds row g, columns 2q and 2q+1 of
// matrix m; with kTranspose rows 2q and 2q+1 of column g.
template <int kMatrices, bool kTranspose = false, class T>
SEQATTN_DEVICE void ldmatrix(uint32_t (&r)[kMatrices], const T* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  const uint32_t address = shared_address(row);
  if constexpr (kMatrices == 1 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kMatrices == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

}  // namespace seqattn::gpu
