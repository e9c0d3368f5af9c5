// The operator decoder_loop: checks and memory around the kernel of decoder_forward.cuh.
#include "decoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/launch.h"
#include "plan.h"
#include "stepwise.h"
#include "torch_device.h"

namespace seqattn::gpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check(const char* name, const Tensor& t, const Tensor& like, ScalarType type, std::vector<int64_t> shape) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  if (!same) {
    std::ostringstream expected;
    for (size_t i = 0; i < shape.size(); ++i) expected << (i ? ", " : "") << shape[i];
    fail(name, ": expected shape [", expected.str(), "], got ", shape_of(t));
  }
  if (t.scalar_type() != type) fail(name, ": expected another dtype");
  if (!on_device(t) || t.get_device_index() != like.get_device_index()) fail(name, ": expected the device of x_gates");
}

template <class P = void>
const P* whole(const char* name, const Tensor& t, const Tensor& like, ScalarType type, std::vector<int64_t> shape) {
  check(name, t, like, type, std::move(shape));
  if (!t.is_contiguous()) fail(name, ": expected a contiguous tensor");
  return static_cast<const P*>(t.const_data_ptr());
}

template <class P = void>
const P* whole(const char* name, const OptionalTensor& t, const Tensor& like, ScalarType type,
               std::vector<int64_t> shape) {
  return t ? whole<P>(name, *t, like, type, std::move(shape)) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decoder_loop_cuda(
    int64_t number, Tensor x_gates, Tensor w_hh, Tensor w_context, OptionalTensor b_ih, OptionalTensor b_hh,
    Tensor w_query, OptionalTensor b_query, Tensor v, Tensor keys, Tensor values, OptionalTensor lengths,
    OptionalTensor mask, OptionalTensor h0, OptionalTensor c0) {
  const CellInfo& cell = cell_info(number);
  const ScalarType type = x_gates.scalar_type();
  if (x_gates.dim() != 3 || keys.dim() != 3 || values.dim() != 3 || w_hh.dim() != 2) {
    fail("x_gates, keys, values: expected 3 dimensions and w_hh 2, got ", shape_of(x_gates), ", ", shape_of(keys), ", ",
         shape_of(values), ", ", shape_of(w_hh));
  }
  if (!on_device(x_gates)) fail("x_gates: expected a CUDA tensor");
  const int device = x_gates.get_device_index();
  const DeviceGuard guard(device);

  DecoderForward a{};
  a.cell = int(number);
  a.dtype = type == ScalarType::BFloat16 ? DType::kBFloat16
            : type == ScalarType::Half   ? DType::kFloat16
                                         : DType::kFloat32;
  a.batch = x_gates.size(0);
  a.steps = x_gates.size(1);
  a.source = keys.size(1);
  a.hidden = w_hh.size(1);
  a.attention = keys.size(2);
  a.value = values.size(2);
  const int64_t B = a.batch, T = a.steps, S = a.source, H = a.hidden, A = a.attention, D = a.value;
  const int64_t GH = cell.gates * H;
  a.x_gates = whole("x_gates", x_gates, x_gates, type, {B, T, GH});
  a.x_batch = T * GH;
  a.x_step = GH;
  a.w_hh = whole("w_hh", w_hh, x_gates, type, {GH, H});
  check("w_context", w_context, x_gates, type, {GH, D});
  a.w_context = w_context.const_data_ptr();
  a.ld_context = w_context.stride(0);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (w_context.stride(1) != 1 || a.ld_context % 8 || !aligned(a.w_context)) {
    fail("w_context: expected rows of stride 1 that begin at multiples of 16 bytes");
  }
  a.w_query = whole("w_query", w_query, x_gates, type, {A, H});
  a.b_query = whole<float>("b_query", b_query, x_gates, ScalarType::Float, {A});
  a.v = whole<float>("v", v, x_gates, ScalarType::Float, {A});
  a.keys = whole("keys", keys, x_gates, type, {B, S, A});
  a.values = whole("values", values, x_gates, type, {B, S, D});
  if (!aligned(a.keys) || !aligned(a.values)) fail("keys, values: expected data aligned to 16 bytes");
  a.lengths = whole<int64_t>("lengths", lengths, x_gates, ScalarType::Long, {B});
  a.mask = whole<bool>("mask", mask, x_gates, ScalarType::Bool, {B, S});
  a.h0 = whole("h0", h0, x_gates, type, {B, H});
  a.c0 = whole("c0", c0, x_gates, type, {B, H});
  const int64_t shared_limit = device_of(device).smem_per_block;
  const std::string reason = decoder_why_not({a.cell, a.dtype, S, H, A, D}, device_of(device));
  if (!reason.empty()) fail(reason);

  void* stream = current_stream(device);
  Tensor bias;
  if (b_ih && b_hh) {
    bias = torch::stable::new_empty(x_gates, {cell.slots * H}, ScalarType::Float);
    const void* ih = whole("b_ih", b_ih, x_gates, type, {GH});
    const void* hh = whole("b_hh", b_hh, x_gates, type, {GH});
    combine_bias(a.cell, a.dtype, H, 1, &ih, &hh, bias.mutable_data_ptr(), stream);
    a.bias = bias.const_data_ptr();
  }
  Tensor output = torch::stable::new_empty(x_gates, {B, T, H}), hn = torch::stable::new_empty(x_gates, {B, H});
  Tensor cn = torch::stable::new_empty(x_gates, cell.has_cell ? std::vector<int64_t>{B, H} : std::vector<int64_t>{0});
  Tensor contexts = torch::stable::new_empty(x_gates, {B, T, D}),
         weights = torch::stable::new_empty(x_gates, {B, T, S});
  a.output = output.mutable_data_ptr();
  a.hn = hn.mutable_data_ptr();
  a.cn = cell.has_cell ? cn.mutable_data_ptr() : nullptr;
  a.contexts = contexts.mutable_data_ptr();
  a.weights = weights.mutable_data_ptr();
  if (const char* error = decoder_forward(a, shared_limit, stream)) fail(error);
  return {output, hn, cn, contexts, weights};
}

STABLE_TORCH_LIBRARY_IMPL(SEQATTN_LIBRARY, SEQATTN_DISPATCH_KEY, m) {
  m.impl("decoder_loop", TORCH_BOX(&decoder_loop_cuda));
}

}  // namespace
}  // namespace seqattn::gpu
