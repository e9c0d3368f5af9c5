#include "shadow.h"

namespace seqattn::emulator {

void Shadow::set(size_t begin, size_t end, Id writer) {
  for (size_t i = begin / kGranule; i < (end + kGranule - 1) / kGranule; ++i) cells_[i] = Cell{{writer, 0, nullptr}};
}

Problem Shadow::read(size_t begin, size_t bytes, const Access& access, const Witness& witness, Access* other,
                     size_t* at) {
  for (size_t i = begin / kGranule; i < (begin + bytes + kGranule - 1) / kGranule; ++i) {
    Cell& cell = cells_[i];
    *other = cell.writer;
    *at = i * kGranule;
    if (cell.writer.id == kUnallocated) return Problem::unallocated;
    if (cell.writer.id == kUninitialised) return Problem::uninitialised;
    if (cell.writer.id != kBefore && !witness.knows(cell.writer.id, cell.writer.time)) return Problem::read_of_write;
    add_reader(cell, access, witness);
  }
  return Problem::none;
}

Problem Shadow::write(size_t begin, size_t bytes, const Access& access, const Witness& witness, Access* other,
                      size_t* at) {
  for (size_t i = begin / kGranule; i < (begin + bytes + kGranule - 1) / kGranule; ++i) {
    Cell& cell = cells_[i];
    *other = cell.writer;
    *at = i * kGranule;
    if (cell.writer.id == kUnallocated) return Problem::unallocated;
    const bool written = cell.writer.id != kUninitialised && cell.writer.id != kBefore;
    if (written && !witness.knows(cell.writer.id, cell.writer.time)) return Problem::write_of_write;
    if (cell.reader.id != kNobody && !witness.knows(cell.reader.id, cell.reader.time)) {
      *other = cell.reader;
      return Problem::write_of_read;
    }
    if (cell.many >= 0) {
      for (const Readers& readers : many_[cell.many]) {
        for (Id lane = 0; lane < 32; ++lane) {
          if ((readers.lanes >> lane & 1) == 0 || witness.knows(readers.first_lane + lane, readers.time)) continue;
          *other = {readers.first_lane + lane, readers.time, readers.pc};
          return Problem::write_of_read;
        }
      }
      many_[cell.many].clear();
      free_.push_back(cell.many);
      cell.many = -1;
    }
    cell.writer = access;
    cell.reader.id = kNobody;
  }
  return Problem::none;
}

void Shadow::add_reader(Cell& cell, const Access& access, const Witness& witness) {
  if (cell.many >= 0) {
    add_to_many(many_[cell.many], access);
  } else if (cell.reader.id == kNobody || witness.knows(cell.reader.id, cell.reader.time)) {
    cell.reader = access;
  } else {
    if (free_.empty()) {
      free_.push_back(static_cast<int32_t>(many_.size()));
      many_.emplace_back();
    }
    cell.many = free_.back();
    free_.pop_back();
    add_to_many(many_[cell.many], cell.reader);
    add_to_many(many_[cell.many], access);
    cell.reader.id = kNobody;
  }
}

void Shadow::add_to_many(std::vector<Readers>& readers, const Access& access) {
  const Id first = access.id >= first_engine ? access.id : access.id / 32 * 32;
  const uint32_t lane = 1u << (access.id - first);
  for (Readers& r : readers) {
    if (r.first_lane != first || r.time > access.time) continue;
    r = {first, r.time == access.time ? r.lanes | lane : lane, access.time, access.pc};
    return;
  }
  readers.push_back({first, lane, access.time, access.pc});
}

}  // namespace seqattn::emulator
