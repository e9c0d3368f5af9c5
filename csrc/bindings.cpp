// The introspection module: what was built and what this machine uses. Importing it registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cells/registry.h"
#include "cpu/allocate.h"
#include "cpu/cell_direct.h"
#include "cpu/dispatch.h"
#include "cpu/gang.h"
#include "cuda/plan.h"
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
      "poison_allocations", [](bool on) { seqattn::poison_allocations = on; }, py::arg("on"),
      "Fill results with NaN before kernels write them, so that a value left out shows: for tests.");
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
  if (PyModule_AddFunctions(m.ptr(), seqattn::cell_direct_methods) != 0) throw py::error_already_set();
  using seqattn::gpu::Plan;
  py::class_<Plan>(m, "Plan", "Which CUDA kernel runs a recurrence, and with what shape; see csrc/cuda/plan.h.")
      .def_property_readonly("kernel", [](const Plan& p) { return seqattn::gpu::name_of(p.kernel); })
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("clusters", &Plan::clusters)
      .def_readonly("rows_per_block", &Plan::rows_per_block)
      .def_readonly("warps", &Plan::warps)
      .def_readonly("batch_columns", &Plan::batch_columns)
      .def_readonly("smem_bytes", &Plan::smem_bytes)
      .def_readonly("weight_registers", &Plan::weight_registers)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("why_not", &Plan::why_not);
  m.def(
      "plan_recurrence",
      [](const std::string& cell, int64_t hidden, int64_t batch, int directions, const std::string& dtype, int sm,
         int sm_count, int smem_per_block, int max_cluster, bool backward, bool projected, bool allow_tf32) {
        const seqattn::gpu::PlanRequest request{seqattn::gpu::cell_number(cell),   hidden,   batch,     directions,
                                                seqattn::gpu::dtype_number(dtype), backward, projected, allow_tf32};
        return seqattn::gpu::plan_recurrence(request, {sm, sm_count, smem_per_block, max_cluster});
      },
      py::arg("cell"), py::arg("hidden"), py::arg("batch"), py::arg("directions"), py::arg("dtype"), py::arg("sm"),
      py::arg("sm_count"), py::arg("smem_per_block"), py::arg("max_cluster"), py::arg("backward") = false,
      py::arg("projected") = false, py::arg("allow_tf32") = true,
      "The plan for a device of compute capability sm (90 for 9.0), its multiprocessors, the bytes of shared memory a "
      "block can have, and the blocks of its largest cluster (1: none). dtype: 'float32', 'bfloat16'...");
  m.def(
      "decoder_why_not",
      [](const std::string& cell, const std::string& dtype, int64_t source, int64_t hidden, int64_t attention,
         int64_t value, int sm, int sm_count, int smem_per_block, int max_cluster, int64_t filters, int64_t channels,
         int64_t window) {
        return seqattn::gpu::decoder_why_not({seqattn::gpu::cell_number(cell), seqattn::gpu::dtype_number(dtype),
                                              source, hidden, attention, value, filters, channels, window},
                                             {sm, sm_count, smem_per_block, max_cluster});
      },
      py::arg("cell"), py::arg("dtype"), py::arg("source"), py::arg("hidden"), py::arg("attention"), py::arg("value"),
      py::arg("sm"), py::arg("sm_count"), py::arg("smem_per_block"), py::arg("max_cluster"), py::arg("filters") = 0,
      py::arg("channels") = 0, py::arg("window") = 0,
      "Why no cluster of this device can run an attentional decoder of S, H, A and D, with a convolution [F, C, W] of "
      "earlier weights in its scores where F isn't 0; empty where one can.");
}
