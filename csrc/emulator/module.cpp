// The extension module of the tests: the emulator, its samples, and every CUDA kernel through the functions that the
// launcher calls. Tensors are buffers of emulated global memory, given by address.
#include <pybind11/pybind11.h>

#include <iterator>

#include "bindings.h"
#include "machine.h"
#include "memory.h"
#include "samples.h"

namespace py = pybind11;
using namespace seqattn::gpu;
using seqattn::emulator::Buffer;
using seqattn::emulator::Machine;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void sum(const std::string& dtype, uintptr_t in, uintptr_t out, int blocks, int threads) {
  const Launch shape{.grid = blocks, .block = threads};
  if (dtype == "float32")
    return launch(samples::sum_kernel<float>, shape, nullptr, at<const float>(in), at<float>(out));
  if (dtype == "float16") return launch(samples::sum_kernel<half>, shape, nullptr, at<const half>(in), at<float>(out));
  launch(samples::sum_kernel<bfloat16>, shape, nullptr, at<const bfloat16>(in), at<float>(out));
}

template <class T>
void product_of(uintptr_t a, uintptr_t b, uintptr_t d, int k) {
  launch(samples::product_kernel<T>, Launch{.block = 32, .shared_bytes = 768}, nullptr, at<const T>(a), at<const T>(b),
         at<float>(d), k);
}
void product(const std::string& dtype, uintptr_t a, uintptr_t b, uintptr_t d, int k) {
  if (dtype == "float32") return product_of<float>(a, b, d, k);
  if (dtype == "float16") return product_of<half>(a, b, d, k);
  product_of<bfloat16>(a, b, d, k);
}

void planted(uintptr_t in, uintptr_t out, uintptr_t counter, int number) {
  const auto plant = static_cast<samples::Plant>(number);
  const int blocks = plant == samples::Plant::global_race ? 2 : 1;
  launch(samples::planted_kernel, Launch{.grid = blocks, .block = 64, .shared_bytes = 256}, nullptr,
         at<const float>(in), at<float>(out), at<uint32_t>(counter), plant);
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  py::register_exception<seqattn::emulator::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("set_seed", [](uint32_t seed) { Machine::get().set_seed(seed); });
  m.def("set_device", [](int device) {
    if (device < 0 || device >= static_cast<int>(std::size(kResidentClusters))) throw py::index_error("no such device");
    Machine::get().device = device;
  });

  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), py::module_local())
      .def(py::init<std::string, size_t, bool>(), py::arg("name"), py::arg("bytes"), py::arg("at_end") = true)
      .def_property_readonly("address", [](const Buffer& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def_buffer([](Buffer& b) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(b.data()), static_cast<py::ssize_t>(b.bytes()));
      });

  // Names and what they mean; the number of a fault is its place.
  py::list exchange_faults, plants;
#define SEQATTN_EXCHANGE_FAULT(name, text) exchange_faults.append(py::make_tuple(#name, text));
#define SEQATTN_PLANT(name, text) plants.append(py::make_tuple(#name, text));
  SEQATTN_EXCHANGE_FAULTS(SEQATTN_EXCHANGE_FAULT)
  SEQATTN_PLANTS(SEQATTN_PLANT)
#undef SEQATTN_EXCHANGE_FAULT
#undef SEQATTN_PLANT
  m.attr("EXCHANGE_FAULTS") = exchange_faults;
  m.attr("PLANTS") = plants;
  m.def("sum", &sum);
  m.def("product", &product);
  m.def("exchange", [](uintptr_t out, int blocks, int cluster, int steps, int fault) {
    const Launch shape{
        .grid = blocks, .block = 64, .cluster = cluster, .shared_bytes = static_cast<size_t>(2 * cluster * 64 * 16)};
    launch(samples::exchange_kernel, shape, nullptr, at<float>(out), steps, static_cast<samples::Fault>(fault));
  });
  m.def("remote", [](uintptr_t out, int blocks, int cluster, int steps) {
    launch(samples::remote_kernel, Launch{.grid = blocks, .block = 32, .cluster = cluster}, nullptr, at<float>(out),
           steps);
  });
  m.def("bulk", [](uintptr_t in, uintptr_t out, int blocks, bool fenced) {
    launch(samples::bulk_kernel, Launch{.grid = blocks, .block = 64, .cluster = blocks}, nullptr, at<const float>(in),
           at<float>(out), fenced);
  });
  m.def("grid", [](uintptr_t exchange, uintptr_t counter, uintptr_t out, int blocks, int steps, bool barrier,
                   bool cooperative) {
    launch(samples::grid_kernel, Launch{.grid = blocks, .block = 32, .cooperative = cooperative}, nullptr,
           at<float>(exchange), at<uint32_t>(counter), at<float>(out), steps, barrier);
  });
  m.def("warps", [](uintptr_t in, uintptr_t out, uintptr_t total) {
    launch(samples::warps_kernel, Launch{.block = 128}, nullptr, at<const int32_t>(in), at<int32_t>(out),
           at<int32_t>(total));
  });
  m.def("launch_of", [](int grid, int block, int cluster, size_t shared_bytes) {
    launch(samples::sum_kernel<float>,
           Launch{.grid = grid, .block = block, .cluster = cluster, .shared_bytes = shared_bytes}, nullptr,
           at<const float>(0), at<float>(0));
  });
  m.def("planted", &planted);

  bind_recurrence(m);
  bind_decoder(m);
}
