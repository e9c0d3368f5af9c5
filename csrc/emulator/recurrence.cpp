// The kernels of recurrent layers for Python. A struct of arguments is a dict with its fields; pointers are addresses.
#include "../cuda/recurrence.h"

#include <pybind11/stl.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "../cells/registry.h"
#include "../cuda/persistent_shapes.h"
#include "../cuda/plan.h"
#include "../cuda/stepwise.h"
#include "bindings.h"
#include "fields.h"

namespace py = pybind11;

namespace seqattn::gpu {

// What device.cu does on a GPU.
void clear(void* to, int64_t bytes, void*) { std::memset(to, 0, static_cast<size_t>(bytes)); }

namespace {

void take(Fields& f, Rows& r) {
  f("steps", r.steps)("batch", r.batch)("rows", r.rows)("lengths", r.lengths)("offsets", r.offsets);
  f("out_step", r.out_step)("out_batch", r.out_batch);
}
void take(Fields& f, Forward& a) {
  take(f, a.rows);
  f("cell", a.cell)("dtype", a.dtype)("allow_tf32", a.allow_tf32)("hidden", a.hidden)("output", a.output);
  f("directions", a.directions)("x_gates", a.x_gates)("w_hh", a.w_hh)("bias", a.bias)("h0", a.h0)("c0", a.c0);
  f("output_rows", a.output_rows)("cell_rows", a.cell_rows)("ld_output", a.ld_output)("ld_cell", a.ld_cell);
  f("hn", a.hn)("cn", a.cn)("saved", a.saved)("cells", a.cells)("h_prev", a.h_prev);
}
void take(Fields& f, Backward& a) {
  take(f, a.rows);
  f("cell", a.cell)("dtype", a.dtype)("allow_tf32", a.allow_tf32)("hidden", a.hidden)("output", a.output);
  f("directions", a.directions)("w_hh", a.w_hh)("saved", a.saved)("cells", a.cells)("h_prev", a.h_prev)("c0", a.c0);
  f("d_output", a.d_output)("d_cell_rows", a.d_cell_rows)("ld_output", a.ld_output)("ld_cell", a.ld_cell);
  f("d_hn", a.d_hn)("d_cn", a.d_cn)("d_gates", a.d_gates)("d_h0", a.d_h0)("d_c0", a.d_c0);
}
void take(Fields& f, ForwardStep& s) {
  take(f, s.args);
  f("h_gates", s.h_gates)("h", s.h)("c", s.c)("unprojected", s.unprojected)("unprojected_rows", s.unprojected_rows);
  f("projected", s.projected);
}
void take(Fields& f, BackwardStep& s) {
  take(f, s.args);
  f("dh_product", s.dh_product)("dh_carry", s.dh_carry)("dc", s.dc)("d_step", s.d_step)("d_projected", s.d_projected);
  f("d_projected_rows", s.d_projected_rows)("d_unprojected", s.d_unprojected);
}
void take(Fields& f, PlanRequest& r) {
  f("cell", r.cell)("hidden", r.hidden)("batch", r.batch)("directions", r.directions)("dtype", r.dtype);
  f("backward", r.backward)("projected", r.projected)("allow_tf32", r.allow_tf32);
}
void take(Fields& f, Device& d) {
  f("sm", d.sm)("sm_count", d.sm_count)("smem_per_block", d.smem_per_block)("max_cluster", d.max_cluster);
}

template <class S>
S from(const py::dict& given) {
  return from_fields<S>(given, [](Fields& f, S& s) { take(f, s); });
}

// The plan that has one team of this size and so many tiles of columns serve a whole batch, whatever device would
// choose it. why_not where there is no such kernel.
Plan plan_of_team(const PlanRequest& request, bool grid, TeamSize size, int tiles) {
  CellSize cell{};
  int number = 0;
#define SEQATTN_CELL_SIZE(Cell) \
  if (request.cell == number++) cell = {Cell::kGates, Cell::kSlots, kept(Cell::kSaved, Cell::kHasCell), Cell::kHasCell};
  SEQATTN_FOR_EACH_CELL(SEQATTN_CELL_SIZE)
#undef SEQATTN_CELL_SIZE
  const TeamShape shape{cell, request.dtype == DType::kFloat32 ? 4 : 2, size.padded, size.blocks, tiles, grid};
  Plan plan;
  if (!shape.fits()) {
    plan.why_not = "no block has room for it";
    return plan;
  }
  plan.kernel = grid ? Kernel::kCooperative : Kernel::kCluster;
  plan.cluster = size.blocks;
  plan.rows_per_block = shape.units();
  plan.batch_columns = static_cast<int>((request.batch + tiles - 1) / tiles) * tiles;
  if (grid) {
    plan.workspace_bytes =
        GridWorkspace(request.directions, tiles, 1).counter_bytes +
        request.directions * (request.backward ? shape.backward_exchange_bytes() : shape.forward_exchange_bytes());
  }
  return plan;
}

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* to(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace
}  // namespace seqattn::gpu

void bind_recurrence(py::module_& m) {
  using namespace seqattn::gpu;
  py::list cells;
#define SEQATTN_CELL_INFO(Cell)                                                                               \
  {                                                                                                           \
    py::list x_gates, h_gates;                                                                                \
    for (int s = 0; s < Cell::kGates; ++s) {                                                                  \
      x_gates.append(Cell::x_gate(s));                                                                        \
      h_gates.append(Cell::h_gate(s + Cell::kSlots - Cell::kGates));                                          \
    }                                                                                                         \
    cells.append(py::dict(py::arg("name") = Cell::kName, py::arg("gates") = Cell::kGates,                     \
                          py::arg("slots") = Cell::kSlots, py::arg("has_cell") = Cell::kHasCell,              \
                          py::arg("kept") = kept(Cell::kSaved, Cell::kHasCell), py::arg("x_gates") = x_gates, \
                          py::arg("h_gates") = h_gates));                                                     \
  }
  using namespace seqattn;
  SEQATTN_FOR_EACH_CELL(SEQATTN_CELL_INFO)
#undef SEQATTN_CELL_INFO
  m.attr("CELLS") = cells;
  // Sizes that the persistent kernels are compiled for: units, blocks.
  py::dict teams;
  const auto sizes = [](const auto& all) {
    py::list found;
    for (const TeamSize& size : all) found.append(py::make_tuple(size.padded, size.blocks));
    return found;
  };
  teams["cluster"] = sizes(kClusterSizes);
  teams["cooperative"] = sizes(kGridSizes);
  m.attr("TEAM_SIZES") = teams;

  m.def("combine_bias", [](int cell, int dtype, int64_t hidden, const std::vector<uintptr_t>& b_ih,
                           const std::vector<uintptr_t>& b_hh, uintptr_t bias) {
    const void *ih[2] = {}, *hh[2] = {};
    for (size_t d = 0; d < b_ih.size(); ++d) ih[d] = at(b_ih[d]), hh[d] = at(b_hh[d]);
    combine_bias(cell, static_cast<DType>(dtype), hidden, static_cast<int>(b_ih.size()), ih, hh, to(bias), nullptr);
  });
  m.def("split_bias", [](int cell, int dtype, int64_t hidden, uintptr_t sums, uintptr_t d_b_ih, uintptr_t d_b_hh) {
    split_bias(cell, static_cast<DType>(dtype), hidden, at(sums), to(d_b_ih), to(d_b_hh), nullptr);
  });
  m.def("convert", [](int from_type, uintptr_t source, int to_type, uintptr_t target, int64_t count) {
    convert(static_cast<DType>(from_type), at(source), static_cast<DType>(to_type), to(target), count, nullptr);
  });
  m.def("gather_rows", [](int dtype, const py::dict& rows, uintptr_t source, uintptr_t target, int64_t width) {
    gather_rows(static_cast<DType>(dtype), from<Rows>(rows), at(source), to(target), width, nullptr);
  });
  m.def("scatter_rows", [](int dtype, const py::dict& rows, uintptr_t source, uintptr_t target, int64_t width) {
    scatter_rows(static_cast<DType>(dtype), from<Rows>(rows), at(source), to(target), width, nullptr);
  });
  m.def("column_chunks", &column_chunks);
  m.def("column_sums",
        [](int dtype, uintptr_t source, int64_t rows, int64_t columns, uintptr_t partial, uintptr_t sums) {
          column_sums(static_cast<DType>(dtype), at(source), rows, columns, to(partial), to(sums), nullptr);
        });
  m.def("split", [](uintptr_t source, int64_t rows, int64_t columns, int64_t ld, uintptr_t target, int64_t depth,
                    int64_t begin, bool stacked, bool second_low) {
    split(at(source), rows, columns, ld, to(target), depth, begin, stacked, second_low, nullptr);
  });
  m.def("write_values", [](const std::vector<int64_t>& values, uintptr_t target) {
    write_values(values.data(), static_cast<int64_t>(values.size()), reinterpret_cast<int64_t*>(target), nullptr);
  });
  m.def("step_forward", [](const py::dict& a, int64_t t) { step_forward(from<ForwardStep>(a), t, nullptr); });
  m.def("project_forward", [](const py::dict& a, int64_t t) { project_forward(from<ForwardStep>(a), t, nullptr); });
  m.def("project_backward", [](const py::dict& a, int64_t t) { project_backward(from<BackwardStep>(a), t, nullptr); });
  m.def("step_backward", [](const py::dict& a, int64_t t) { step_backward(from<BackwardStep>(a), t, nullptr); });
  m.def("finish_backward", [](const py::dict& a) { finish_backward(from<BackwardStep>(a), nullptr); });

  py::class_<Plan>(m, "Plan", py::module_local())  // _C has its own
      .def_property_readonly("kernel", [](const Plan& p) { return static_cast<int>(p.kernel); })
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("clusters", &Plan::clusters)
      .def_readonly("batch_columns", &Plan::batch_columns)
      .def_readonly("rows_per_block", &Plan::rows_per_block)
      .def_readonly("warps", &Plan::warps)
      .def_readonly("smem_bytes", &Plan::smem_bytes)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("why_not", &Plan::why_not);
  m.def("plan_cluster", [](const py::dict& request, const py::dict& device) {
    return plan_cluster(from<PlanRequest>(request), from<Device>(device));
  });
  m.def("plan_cooperative", [](const py::dict& request, const py::dict& device) {
    return plan_cooperative(from<PlanRequest>(request), from<Device>(device));
  });
  m.def("plan_of_team", [](const py::dict& request, bool grid, int padded, int blocks, int tiles) {
    return plan_of_team(from<PlanRequest>(request), grid, {padded, blocks}, tiles);
  });
  m.def("persistent_forward", [](const Plan& plan, const py::dict& a, uintptr_t workspace) {
    raise(persistent_forward(plan, from<Forward>(a), to(workspace), nullptr));
  });
  m.def("persistent_backward", [](const Plan& plan, const py::dict& a, uintptr_t workspace) {
    raise(persistent_backward(plan, from<Backward>(a), to(workspace), nullptr));
  });
}
