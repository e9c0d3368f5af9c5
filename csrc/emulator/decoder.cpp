// The kernels of the attentional decoder for Python.
#include "../cuda/decoder.h"

#include "bindings.h"
#include "fields.h"

void bind_decoder(pybind11::module_& m) {
  using namespace seqattn::gpu;
  m.def("decoder_forward", [](const py::dict& given, int64_t shared_limit) {
    const auto args = from_fields<DecoderForward>(given, [](Fields& f, DecoderForward& a) {
      f("cell", a.cell)("dtype", a.dtype)("batch", a.batch)("steps", a.steps)("source", a.source);
      f("hidden", a.hidden)("attention", a.attention)("value", a.value)("x_gates", a.x_gates);
      f("x_step", a.x_step)("x_batch", a.x_batch)("w_hh", a.w_hh)("w_context", a.w_context);
      f("ld_context", a.ld_context)("bias", a.bias)("w_query", a.w_query)("b_query", a.b_query)("v", a.v);
      f("keys", a.keys)("values", a.values)("lengths", a.lengths)("mask", a.mask)("h0", a.h0)("c0", a.c0);
      f("output", a.output)("contexts", a.contexts)("weights", a.weights)("hn", a.hn)("cn", a.cn)("saved", a.saved);
      f("cells", a.cells)("filters", a.filters)("channels", a.channels)("window", a.window);
      f("knows_last", a.knows_last)("knows_sum", a.knows_sum)("history0", a.history0)("w_conv", a.w_conv);
      f("w_feature", a.w_feature)("fertility", a.fertility);
    });
    raise(decoder_forward(args, shared_limit, nullptr));
  });
}
