// Checked pointers: shared memory of this block and of peers, and global memory that blocks exchange.
#pragma once

#include <cstring>
#include <type_traits>

#include "types.h"

namespace seqattn::emulator {

// A place in a block's shared memory.
struct Spot {
  Block* block = nullptr;
  int64_t offset = 0;
};

// Not inlined: the address they return to is the kernel's line.
__attribute__((noinline)) void read_shared(const Spot& spot, void* to, size_t bytes, size_t align);
__attribute__((noinline)) void write_shared(const Spot& spot, const void* from, size_t bytes, size_t align);
__attribute__((noinline)) void check_shared(const Spot& spot, size_t bytes, size_t align, bool write);
__attribute__((noinline)) void read_global(const void* from, void* to, size_t bytes, size_t align);
__attribute__((noinline)) void write_global(void* to, const void* from, size_t bytes, size_t align);

}  // namespace seqattn::emulator

namespace seqattn::gpu::detail {

// A number in checked memory: reads as its value, takes assignments.
template <class P>
class Reference {
 public:
  using Value = typename P::Value;
  explicit Reference(const P& place) : place_(place) {}
  Reference(const Reference&) = default;
  SEQATTN_DEVICE operator Value() const { return place_.get(); }
  SEQATTN_DEVICE const Reference& operator=(const Value& x) const {
    place_.set(x);
    return *this;
  }
  SEQATTN_DEVICE const Reference& operator=(const Reference& x) const { return *this = Value(x); }
  SEQATTN_DEVICE const Reference& operator+=(const Value& x) const { return *this = Value(*this) + x; }
  SEQATTN_DEVICE const Reference& operator-=(const Value& x) const { return *this = Value(*this) - x; }
  SEQATTN_DEVICE const Reference& operator*=(const Value& x) const { return *this = Value(*this) * x; }

 private:
  P place_;
};

// What pointers do, for a pointer P to T whose place has `offset` bytes.
template <template <class> class P, class T>
class Arithmetic {
 public:
  using Value = std::remove_const_t<T>;
  SEQATTN_DEVICE P<T> operator+(int64_t n) const { return self().moved(n * static_cast<int64_t>(sizeof(T))); }
  SEQATTN_DEVICE P<T> operator-(int64_t n) const { return *this + -n; }
  SEQATTN_DEVICE P<T>& operator+=(int64_t n) { return static_cast<P<T>&>(*this) = *this + n; }
  SEQATTN_DEVICE P<T>& operator-=(int64_t n) { return *this += -n; }
  SEQATTN_DEVICE P<T>& operator++() { return *this += 1; }
  SEQATTN_DEVICE auto operator[](int64_t n) const { return *(*this + n); }
  SEQATTN_DEVICE auto operator*() const {
    if constexpr (std::is_const_v<T>) {
      return self().get();
    } else {
      return Reference<P<T>>(self());
    }
  }

 private:
  const P<T>& self() const { return static_cast<const P<T>&>(*this); }
};

// In shared memory of this block, or of a peer.
template <class T>
class Pointer : public Arithmetic<Pointer, T> {
 public:
  using Value = std::remove_const_t<T>;

  Pointer(std::nullptr_t = nullptr) {}
  explicit Pointer(const emulator::Spot& spot) : spot_(spot) {}
  Pointer(const Pointer<Value>& other)
    requires std::is_const_v<T>
      : spot_(other.spot()) {}
  Pointer(const Pointer&) = default;
  Pointer& operator=(const Pointer&) = default;

  const emulator::Spot& spot() const { return spot_; }
  Pointer moved(int64_t bytes) const { return Pointer(emulator::Spot{spot_.block, spot_.offset + bytes}); }
  explicit operator bool() const { return spot_.block != nullptr; }
  bool operator==(const Pointer& other) const {
    return spot_.block == other.spot_.block && spot_.offset == other.spot_.offset;
  }
  int64_t operator-(const Pointer& other) const {
    return (spot_.offset - other.spot_.offset) / static_cast<int64_t>(sizeof(T));
  }
  using Arithmetic<seqattn::gpu::detail::Pointer, T>::operator-;

  SEQATTN_DEVICE Value get() const {
    static_assert(sizeof(T) % emulator::kGranule == 0, "bytes are not followed one by one");
    Value x;
    emulator::read_shared(spot_, &x, sizeof(T), alignof(T));
    return x;
  }
  SEQATTN_DEVICE void set(const Value& x) const {
    static_assert(std::is_trivially_copyable_v<Value> && sizeof(T) % emulator::kGranule == 0);
    emulator::write_shared(spot_, &x, sizeof(T), alignof(T));
  }
  SEQATTN_DEVICE void check(bool write) const { emulator::check_shared(spot_, sizeof(T), alignof(T), write); }

 private:
  emulator::Spot spot_;
};

// In global memory: bounds, alignment, races.
template <class T>
class GlobalPointer : public Arithmetic<GlobalPointer, T> {
 public:
  using Value = std::remove_const_t<T>;

  GlobalPointer(T* p = nullptr) : p_(p) {}
  GlobalPointer moved(int64_t bytes) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p_) + static_cast<uintptr_t>(bytes));
  }
  operator T*() const { return p_; }

  SEQATTN_DEVICE Value get() const {
    Value x;
    emulator::read_global(p_, &x, sizeof(T), alignof(T));
    return x;
  }
  SEQATTN_DEVICE void set(const Value& x) const { emulator::write_global(p_, &x, sizeof(T), alignof(T)); }

 private:
  T* p_;
};

}  // namespace seqattn::gpu::detail

namespace seqattn::gpu {

template <class T>
using Shared = detail::Pointer<T>;
template <class T>
using Global = detail::GlobalPointer<T>;

// A pointer that only the functions of remote memory follow.
template <class T>
class Remote {
 public:
  Remote() = default;
  explicit Remote(const emulator::Spot& spot) : spot_(spot) {}
  const emulator::Spot& spot() const { return spot_; }
  Remote operator+(int64_t n) const {
    return Remote(emulator::Spot{spot_.block, spot_.offset + n * static_cast<int64_t>(sizeof(T))});
  }

 private:
  emulator::Spot spot_;
};

}  // namespace seqattn::gpu
