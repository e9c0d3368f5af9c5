// What is remembered of each two bytes of checked memory: who wrote them last and who read them since.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "clock.h"

namespace seqattn::emulator {

inline constexpr size_t kGranule = 2;
inline constexpr Id kUnallocated = ~Id{0}, kUninitialised = kUnallocated - 1, kBefore = kUnallocated - 2;

// An address in the code in four bytes, as its distance from another.
class Pc {
 public:
  Pc(const void* pc = nullptr) : from_anchor_(pc ? static_cast<int32_t>(static_cast<const char*>(pc) - &kAnchor) : 0) {}
  operator const void*() const { return from_anchor_ ? &kAnchor + from_anchor_ : nullptr; }

 private:
  static inline const char kAnchor = 0;
  int32_t from_anchor_;
};

// Who makes an access: its number (of a thread, or of an engine that copies behind a thread's back) and time, and where
// in the code.
struct Access {
  Id id;
  Time time;
  Pc pc;
};

// The one whose knowledge decides whether earlier accesses are ordered before the new one.
struct Witness {
  Id id;
  const Known* known;
  bool knows(Id other, Time time) const { return other == id || time_of(*known, other) >= time; }
};

enum class Problem { none, unallocated, uninitialised, read_of_write, write_of_read, write_of_write };

class Shadow {
 public:
  // Numbers from here on are engines'; smaller ones are threads', 32 to a warp.
  static inline Id first_engine = 0;

  Shadow(size_t bytes, Id writer) { grow(bytes, writer); }

  size_t bytes() const { return cells_.size() * kGranule; }
  void grow(size_t bytes, Id writer) { cells_.resize((bytes + kGranule - 1) / kGranule, Cell{{writer, 0, nullptr}}); }
  void set(size_t begin, size_t end, Id writer);
  const Access& writer(size_t at) const { return cells_[at / kGranule].writer; }

  // The earlier access that is in the way goes into *other, its place into *at.
  Problem read(size_t begin, size_t bytes, const Access& access, const Witness& witness, Access* other, size_t* at);
  Problem write(size_t begin, size_t bytes, const Access& access, const Witness& witness, Access* other, size_t* at);

 private:
  static constexpr Id kNobody = ~Id{0};

  // Lanes of a warp that read at the same time of theirs.
  struct Readers {
    Id first_lane;
    uint32_t lanes;
    Time time;
    Pc pc;
  };
  struct Cell {
    Access writer;
    Access reader{kNobody, 0, nullptr};
    int32_t many = -1;  // index into many_ when there are several readers
  };

  void add_reader(Cell& cell, const Access& access, const Witness& witness);
  void add_to_many(std::vector<Readers>& readers, const Access& access);

  std::vector<Cell> cells_;
  std::vector<std::vector<Readers>> many_;
  std::vector<int32_t> free_;
};

}  // namespace seqattn::emulator
