// Shared memory, a peer's shared memory, asynchronous copies and hinted accesses of global memory, for the emulator.
#pragma once

#include <utility>

#include "pointers.h"
#include "sync.h"

namespace seqattn::emulator {

__attribute__((noinline)) void store_async(const Spot& to, const void* from, size_t bytes, const Spot& barrier);
__attribute__((noinline)) void bulk_copy(const Spot& to, const Spot& from, size_t bytes, const Spot& barrier);
__attribute__((noinline)) void bulk_load(const Spot& to, const void* from, size_t bytes, const Spot& barrier);
__attribute__((noinline)) void copy_async(const Spot& to, const void* from, size_t bytes, bool valid);

}  // namespace seqattn::emulator

namespace seqattn::gpu {

namespace detail {
template <class T>
std::type_identity<T> pointee(const GlobalPointer<T>&);
template <class T>
std::type_identity<T> pointee(T*);
template <class P>
using Pointee = typename decltype(pointee(std::declval<P>()))::type;
}  // namespace detail

template <class T>
SEQATTN_DEVICE Shared<T> dynamic_shared(size_t offset = 0) {
  return Shared<T>(emulator::Spot{detail::self().block, static_cast<int64_t>(emulator::kDynamicBegin + offset)});
}
template <class T, int N, int Tag = 0>
SEQATTN_DEVICE Shared<T> shared_array() {
  static const char key = 0;
  const size_t offset = detail::machine().static_array(&key, sizeof(T) * N);
  return Shared<T>(emulator::Spot{detail::self().block, static_cast<int64_t>(offset)});
}
template <class U, class T>
SEQATTN_DEVICE Shared<U> shared_cast(detail::Pointer<T> p) {
  return Shared<U>(p.spot());
}

template <class T>
SEQATTN_DEVICE std::remove_const_t<T> load(detail::Pointer<T> p) {
  return p.get();
}
template <class T>
SEQATTN_DEVICE std::remove_const_t<T> load(detail::GlobalPointer<T> p) {
  return p.get();
}
template <class T>
SEQATTN_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
SEQATTN_DEVICE void store(detail::Pointer<T> p, std::type_identity_t<T> x) {
  p.set(x);
}
template <class T>
SEQATTN_DEVICE void store(detail::GlobalPointer<T> p, std::type_identity_t<T> x) {
  p.set(x);
}
template <class T>
SEQATTN_DEVICE void store(T* p, std::type_identity_t<T> x) {
  *p = x;
}

template <class T>
SEQATTN_DEVICE Remote<T> map_shared(detail::Pointer<T> p, int rank) {
  const auto& blocks = detail::self().block->cluster->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) detail::machine().fail("map_shared: no such block");
  return Remote<T>(emulator::Spot{blocks[rank].get(), p.spot().offset});
}
template <class U, class T>
SEQATTN_DEVICE Remote<U> remote_cast(Remote<T> p) {
  return Remote<U>(p.spot());
}

template <class T>
SEQATTN_DEVICE void store_remote(Remote<T> p, std::type_identity_t<T> x) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::write_shared(p.spot(), &x, sizeof(T), sizeof(T));
}
template <class T>
SEQATTN_DEVICE T load_remote(Remote<T> p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T x;
  emulator::read_shared(p.spot(), &x, sizeof(T), sizeof(T));
  return x;
}
template <class T>
SEQATTN_DEVICE void store_async(Remote<T> p, std::type_identity_t<T> x, Remote<Barrier> barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::store_async(p.spot(), &x, sizeof(T), barrier.spot());
}

template <class T, class U>
SEQATTN_DEVICE void bulk_copy_to_peer(Remote<T> to, detail::Pointer<U> from, uint32_t bytes, Remote<Barrier> barrier) {
  emulator::bulk_copy(to.spot(), from.spot(), bytes, barrier.spot());
}
template <class T, class U>
SEQATTN_DEVICE void bulk_load(detail::Pointer<T> to, const U* from, uint32_t bytes, Shared<Barrier> barrier) {
  emulator::bulk_load(to.spot(), from, bytes, barrier.spot());
}
SEQATTN_DEVICE void fence_async() { detail::self().fenced = detail::self().now++; }

template <int kBytes, class T>
SEQATTN_DEVICE void cp_async(detail::Pointer<T> to, const std::type_identity_t<T>* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(to.spot(), from, kBytes, valid);
}
SEQATTN_DEVICE void cp_async_commit() { ++detail::self().group; }
template <int kGroups = 0>
SEQATTN_DEVICE void cp_async_wait() {
  detail::machine().copies_done(kGroups);
}

// Checked: bounds, alignment, races between blocks. P is a pointer, or Global<T>.
template <class P>
SEQATTN_DEVICE auto load_coherent(P p) {
  std::remove_const_t<detail::Pointee<P>> x;
  emulator::read_global(p, &x, sizeof(x), alignof(decltype(x)));
  return x;
}
template <class P>
SEQATTN_DEVICE void store_coherent(P p, detail::Pointee<P> x) {
  emulator::write_global(p, &x, sizeof(x), alignof(decltype(x)));
}
template <class P>
SEQATTN_DEVICE auto load_readonly(P p) {
  return load_coherent(p);
}
template <class P>
SEQATTN_DEVICE auto load_streaming(P p) {
  return load_coherent(p);
}
template <class P>
SEQATTN_DEVICE void store_streaming(P p, detail::Pointee<P> x) {
  store_coherent(p, x);
}
SEQATTN_DEVICE void prefetch(const void*) {}

}  // namespace seqattn::gpu
