// What kernels call through platform.h: checked loads and stores, copies behind a thread's back, matrices.
#include <cstring>

#include "memory.h"
#include "platform/matrix.h"

namespace seqattn::emulator {

#define SEQATTN_CALLER __builtin_return_address(0)

void read_shared(const Spot& spot, void* to, size_t bytes, size_t align) {
  std::memcpy(to, Machine::get().shared(spot.block, spot.offset, bytes, align, false, SEQATTN_CALLER), bytes);
}
void write_shared(const Spot& spot, const void* from, size_t bytes, size_t align) {
  std::memcpy(Machine::get().shared(spot.block, spot.offset, bytes, align, true, SEQATTN_CALLER), from, bytes);
}
void check_shared(const Spot& spot, size_t bytes, size_t align, bool write) {
  Machine::get().shared(spot.block, spot.offset, bytes, align, write, SEQATTN_CALLER);
}
void read_global(const void* from, void* to, size_t bytes, size_t align) {
  Machine::get().global(from, bytes, align, false, SEQATTN_CALLER);
  std::memcpy(to, from, bytes);
}
void write_global(void* to, const void* from, size_t bytes, size_t align) {
  Machine::get().global(to, bytes, align, true, SEQATTN_CALLER);
  std::memcpy(to, from, bytes);
}

namespace {
// The barrier that counts a copy, and the copy's access: seen by who waits for the barrier's present phase.
PhaseBarrier& counted(const Spot& to, const Spot& barrier, const void* pc, Access* access) {
  Machine& m = Machine::get();
  if (to.block != barrier.block) m.fail("a copy and the barrier that counts it lie in different blocks");
  m.shared(barrier.block, barrier.offset, 8, 8, false, pc);
  PhaseBarrier& b = m.barrier_at(*barrier.block, barrier.offset);
  *access = {b.id, b.phase + 1, pc};
  return b;
}
}  // namespace

void store_async(const Spot& to, const void* from, size_t bytes, const Spot& barrier) {
  const void* pc = SEQATTN_CALLER;
  Machine& m = Machine::get();
  Access access{};
  PhaseBarrier& b = counted(to, barrier, pc, &access);
  std::memcpy(m.shared(to.block, to.offset, bytes, bytes, true, pc, &access), from, bytes);
  m.complete(b, static_cast<int64_t>(bytes));
}

void bulk_copy(const Spot& to, const Spot& from, size_t bytes, const Spot& barrier) {
  const void* pc = SEQATTN_CALLER;
  Machine& m = Machine::get();
  if (bytes % 16 != 0) m.fail("bulk copy: expected a multiple of 16 bytes, got " + std::to_string(bytes));
  Access access{};
  PhaseBarrier& b = counted(to, barrier, pc, &access);
  const char* source = m.shared(from.block, from.offset, bytes, 16, false, pc, &access);
  for (size_t i = 0; i < bytes; i += kGranule) {
    const Access& writer = from.block->shadow->writer(from.offset + i);
    if (writer.id < Shadow::first_engine &&
        from.block->threads[writer.id - from.block->first_thread].fenced < writer.time) {
      m.fail("bulk copy at " + line_of(pc) + ": what " + m.name_of(writer.id) + " wrote at " + line_of(writer.pc) +
             " may not be visible to it: fence_async is missing");
    }
  }
  std::memcpy(m.shared(to.block, to.offset, bytes, 16, true, pc, &access), source, bytes);
  m.complete(b, static_cast<int64_t>(bytes));
}

void bulk_load(const Spot& to, const void* from, size_t bytes, const Spot& barrier) {
  const void* pc = SEQATTN_CALLER;
  Machine& m = Machine::get();
  if (bytes % 16 != 0) m.fail("bulk copy: expected a multiple of 16 bytes, got " + std::to_string(bytes));
  Access access{};
  PhaseBarrier& b = counted(to, barrier, pc, &access);
  m.global(from, bytes, 16, false, pc);
  std::memcpy(m.shared(to.block, to.offset, bytes, 16, true, pc, &access), from, bytes);
  m.complete(b, static_cast<int64_t>(bytes));
}

void copy_async(const Spot& to, const void* from, size_t bytes, bool valid) {
  const void* pc = SEQATTN_CALLER;
  Machine& m = Machine::get();
  const Access access = m.copier_access(pc);
  char* place = m.shared(to.block, to.offset, bytes, bytes, true, pc, &access);
  if (valid) {
    m.global(from, bytes, bytes, false, pc);
    std::memcpy(place, from, bytes);
  } else {
    std::memset(place, 0, bytes);
  }
}

namespace {

template <MatrixType kType>
float element(uint32_t word, int index) {
  if constexpr (kType == MatrixType::tf32) {
    return tf32_to_float(word);
  } else {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * index);
    return kType == MatrixType::half ? half_to_float(bits) : bfloat16_to_float(bits);
  }
}

}  // namespace

template <MatrixType kType>
void multiply(Machine&, Warp& warp) {
  // Elements in a word, and columns of A.
  constexpr int kPack = kType == MatrixType::tf32 ? 1 : 2, kK = 8 * kPack;
  float a[16][kK], b[kK][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& request = *static_cast<const MatrixRequest*>(warp.requests[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < kPack; ++i) {
      for (int word = 0; word < 4; ++word) {
        a[g + 8 * (word % 2)][kPack * q + i + kK / 2 * (word / 2)] = element<kType>(request.a[word], i);
      }
      for (int word = 0; word < 2; ++word) b[kPack * q + i + kK / 2 * word][g] = element<kType>(request.b[word], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const MatrixRequest*>(warp.requests[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = d[i];
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[k][column];
      d[i] = sum;
    }
  }
}
template void multiply<MatrixType::half>(Machine&, Warp&);
template void multiply<MatrixType::bfloat16>(Machine&, Warp&);
template void multiply<MatrixType::tf32>(Machine&, Warp&);

namespace {
struct RowRequest {
  uint16_t row[8];
  uint32_t* result;
  int matrices;
  bool transpose;
};
}  // namespace

void load_matrices(uint32_t* result, int matrices, bool transpose, const Spot& row, Place place) {
  place.pc = SEQATTN_CALLER;
  Machine& m = Machine::get();
  RowRequest request{{}, result, matrices, transpose};
  if (m.self().index % 32 < 8 * matrices) {
    std::memcpy(request.row, m.shared(row.block, row.offset, 16, 16, false, place.pc), 16);
  }
  m.meet_warp(
      "ldmatrix", &request,
      [](Machine&, Warp& warp) {
        const auto at = [&](int matrix, int i, int j) -> uint32_t {
          return static_cast<const RowRequest*>(warp.requests[8 * matrix + i])->row[j];
        };
        for (int lane = 0; lane < 32; ++lane) {
          const auto& r = *static_cast<const RowRequest*>(warp.requests[lane]);
          const int g = lane / 4, q = lane % 4;
          for (int k = 0; k < r.matrices; ++k) {
            r.result[k] =
                r.transpose ? at(k, 2 * q, g) | at(k, 2 * q + 1, g) << 16 : at(k, g, 2 * q) | at(k, g, 2 * q + 1) << 16;
          }
        }
      },
      place);
}

}  // namespace seqattn::emulator
