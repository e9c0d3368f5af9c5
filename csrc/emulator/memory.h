// Global memory of the emulated GPU: buffers between inaccessible pages.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>

#include "shadow.h"

namespace seqattn::emulator {

// Bytes that end (or start: at_end false) next to an inaccessible page, aligned to 16. What is left between them and
// the pages is filled with a pattern, and so are the bytes: a read of it gives NaN, a write to it shows in damage().
class Buffer {
 public:
  Buffer(std::string name, size_t bytes, bool at_end);
  ~Buffer();
  Buffer(const Buffer&) = delete;

  const std::string& name() const { return name_; }
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Shadow& shadow();
  void forget();  // everything was written before

  // What was written outside, or nothing.
  std::string damage() const;
  // The buffer these bytes lie in, or nullptr.
  static Buffer* find(const void* address, size_t bytes);
  // "12 bytes past the end of x_gates", for an address near a buffer; else where it isn't.
  static std::string describe(const void* address);
  static std::map<const char*, Buffer*>& all();

 private:
  std::string name_;
  size_t bytes_, mapped_;
  char *map_, *begin_, *data_;  // begin_: of the accessible pages
  std::unique_ptr<Shadow> shadow_;
};

}  // namespace seqattn::emulator
