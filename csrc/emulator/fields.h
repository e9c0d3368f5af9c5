// From Python to the structs of arguments that the launcher hands to kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace seqattn::gpu {

namespace py = pybind11;

// Takes fields out of a dict; what is not there stays zero, what is left over is a mistake.
class Fields {
 public:
  explicit Fields(const py::dict& given) : left_(py::reinterpret_steal<py::dict>(PyDict_Copy(given.ptr()))) {}

  template <class V>
  Fields& operator()(const char* name, V& value) {
    if (!left_.contains(name)) return *this;
    const py::object given = left_[name];
    if constexpr (std::is_pointer_v<V>) {
      value = reinterpret_cast<V>(given.cast<uintptr_t>());
    } else if constexpr (std::is_enum_v<V>) {
      value = static_cast<V>(given.cast<int>());
    } else if constexpr (std::is_array_v<V>) {
      for (size_t i = 0; i < py::len(given); ++i) {
        value[i] = reinterpret_cast<std::remove_extent_t<V>>(given[py::int_(i)].cast<uintptr_t>());
      }
    } else {
      value = given.cast<V>();
    }
    PyDict_DelItemString(left_.ptr(), name);
    return *this;
  }
  void end() const {
    if (py::len(left_)) throw py::key_error("no such field: " + py::str(left_).cast<std::string>());
  }

 private:
  py::dict left_;
};

// A struct whose fields `take(fields, struct)` names.
template <class S, class Take>
S from_fields(const py::dict& given, Take take) {
  S s{};
  Fields fields(given);
  take(fields, s);
  fields.end();
  return s;
}

inline void raise(const char* error) {
  if (error) throw std::runtime_error(error);
}

}  // namespace seqattn::gpu
