// The introspection module: what was built and what this machine uses. Importing it registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cells/registry.h"
#include "cpu/dispatch.h"
#include "cpu/gang.h"
#include "scores/registry.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the native part of seqattn_kernels was built with.";
  m.def(
      "active_instruction_set", [] { return std::string(seqattn::isa_name(seqattn::active_isa())); },
      "The instruction set whose kernels run on this machine: 'avx512', 'avx2' or 'baseline'.");
  m.def("has_bfloat16_instructions", &seqattn::has_bfloat16_instructions,
        "Whether products of bfloat16 weights use the processor's own instructions for them.");
  m.def("built_instruction_sets", [] {
#if defined(SEQATTN_HAVE_X86)
    return std::vector<std::string>{"avx512", "avx2", "baseline"};
#else
    return std::vector<std::string>{"baseline"};
#endif
  });
  m.def(
      "cells",
      [] {
        std::vector<std::string> names;
#define SEQATTN_NAME(Cell) names.emplace_back(seqattn::Cell::kName);
        SEQATTN_FOR_EACH_CELL(SEQATTN_NAME)
#undef SEQATTN_NAME
        return names;
      },
      "Names of the recurrent cells, in the order of the `cell` argument of the recurrence operators.");
  m.def(
      "scores",
      [] {
        std::vector<std::string> names;
#define SEQATTN_NAME(Score) names.emplace_back(seqattn::Score::kName);
        SEQATTN_SCORES(SEQATTN_NAME)
#undef SEQATTN_NAME
        return names;
      },
      "Names of the attention scores, as the `kind` argument of scores_fwd has them.");
  m.def(
      "gang_size",
      [](int threads) {
        int size = 0;
        seqattn::run_gang(threads, [&](seqattn::Gang& gang) {
          if (gang.rank == 0) size = gang.size;
          gang.barrier();
        });
        return size;
      },
      py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
      "How many of the threads asked for came in time to work together.");
}
