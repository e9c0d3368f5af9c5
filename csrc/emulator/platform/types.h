// Qualifiers, number types and indices, for the emulator.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <source_location>

#include "../machine.h"
#include "../numbers.h"

#define SEQATTN_KERNEL(...) void
#define SEQATTN_KERNEL_PARAM const
#define SEQATTN_DEVICE inline __attribute__((always_inline))
#define SEQATTN_UNROLL
#define SEQATTN_UNROLL_BY(n)
#define SEQATTN_HAVE_CLUSTERS 1

namespace seqattn::gpu {

using emulator::bfloat16;
using emulator::half;

SEQATTN_DEVICE float to_float(float x) { return x; }
SEQATTN_DEVICE float to_float(half x) { return emulator::half_to_float(x.bits); }
SEQATTN_DEVICE float to_float(bfloat16 x) { return emulator::bfloat16_to_float(x.bits); }

template <class T>
SEQATTN_DEVICE T from_float(float x);
template <>
SEQATTN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
SEQATTN_DEVICE half from_float<half>(float x) {
  return {emulator::float_to_half(x)};
}
template <>
SEQATTN_DEVICE bfloat16 from_float<bfloat16>(float x) {
  return {emulator::float_to_bfloat16(x)};
}

template <class T>
SEQATTN_DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

SEQATTN_DEVICE uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
SEQATTN_DEVICE float bits_float(uint32_t x) { return std::bit_cast<float>(x); }
SEQATTN_DEVICE uint32_t to_tf32(float x) { return emulator::float_to_tf32(x); }

namespace detail {
inline emulator::Machine& machine() { return emulator::Machine::get(); }
inline emulator::Thread& self() { return machine().self(); }
// The line of the call, for what threads must do together.
inline emulator::Place place(const std::source_location& at) { return {at.file_name(), at.line(), nullptr}; }
}  // namespace detail

SEQATTN_DEVICE int thread_index() { return detail::self().index; }
SEQATTN_DEVICE int block_size() { return detail::machine().shape().block; }
SEQATTN_DEVICE int block_index() { return detail::self().block->x; }
SEQATTN_DEVICE int block_index_y() { return detail::self().block->y; }
SEQATTN_DEVICE int block_index_z() { return detail::self().block->z; }
SEQATTN_DEVICE int grid_size() { return detail::machine().shape().grid; }
SEQATTN_DEVICE int grid_size_y() { return detail::machine().shape().grid_y; }
SEQATTN_DEVICE int grid_size_z() { return detail::machine().shape().grid_z; }
SEQATTN_DEVICE int lane_index() { return detail::self().index % 32; }
SEQATTN_DEVICE int warp_index() { return detail::self().index / 32; }
SEQATTN_DEVICE int cluster_rank() { return detail::self().block->rank; }
SEQATTN_DEVICE int cluster_size() { return detail::machine().shape().cluster; }

SEQATTN_DEVICE float exp2_approx(float x) { return std::exp2(x); }
SEQATTN_DEVICE float reciprocal_approx(float x) { return 1 / x; }
// Rounded to the 11 bits that tanh.approx promises.
SEQATTN_DEVICE float tanh_approx(float x) { return bits_float(float_bits(std::tanh(x)) & 0xFFFFF000u); }

inline int keep(int x) { return x; }

}  // namespace seqattn::gpu
