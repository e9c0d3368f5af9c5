// The operators decoder_loop and decoder_loop_bwd: checks, memory and products around the kernels.
#include "decoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "plan.h"
#include "products.h"
#include "stepwise.h"
#include "tensors.h"

namespace seqattn::gpu {
namespace {

DType number_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? DType::kBFloat16 : type == ScalarType::Half ? DType::kFloat16 : DType::kFloat32;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// W_context, and how far its rows are apart.
int64_t check_context_weight(const Tensor& w, const Tensor& like, ScalarType type, int64_t rows, int64_t columns) {
  check("w_context", w, like, type, {rows, columns});
  if (w.stride(1) != 1 || w.stride(0) % 8 || !aligned(w.const_data_ptr())) {
    fail("w_context: expected rows of stride 1 that begin at multiples of 16 bytes");
  }
  return w.stride(0);
}

// Weights of a history as the kernel reads them; to be kept until it was launched.
struct HistoryWeights {
  Tensor conv, feature;
};

// What scores know of earlier weights, if they do; the rest of `a` is filled in.
HistoryWeights take_history(DecoderForward& a, const Tensor& like, bool save, int64_t history,
                            const OptionalTensor& history0, const OptionalTensor& w_conv,
                            const OptionalTensor& w_feature, const OptionalTensor& fertility) {
  const ScalarType type = like.scalar_type();
  if (history < 0 || history > 3) fail("history: expected 0 (none), 1 (last), 2 (sum) or 3 (both), got ", history);
  if (!history) {
    if (history0 || w_conv || w_feature || fertility) {
      fail("history0, w_conv, w_feature, fertility: expected None with history=0");
    }
    return {};
  }
  if (save) fail("save: expected false with a history, whose gradients the kernel doesn't have");
  if (!w_conv || !w_feature) fail("w_conv, w_feature: expected tensors with history=", history, ", got None");
  a.knows_last = history & 1;
  a.knows_sum = history & 2;
  a.channels = a.knows_last + a.knows_sum;
  if (w_conv->dim() != 3) fail("w_conv: expected [F, C, W], got ", shape_of(*w_conv));
  a.filters = w_conv->size(0);
  a.window = w_conv->size(2);
  if (a.filters < 1 || a.window % 2 == 0 || w_conv->size(1) != a.channels) {
    fail("w_conv: expected [F, C, W] with F at least 1, C=", a.channels, " (from history) and W odd, got ",
         shape_of(*w_conv));
  }
  check("w_conv", *w_conv, like, type, {a.filters, a.channels, a.window});
  check("w_feature", *w_feature, like, type, {a.attention, a.filters});
  if (fertility && !a.knows_sum) fail("fertility: expected None without a sum of weights");
  a.history0 = whole("history0", history0, like, type, {a.batch, a.channels, a.source});
  a.fertility = whole("fertility", fertility, like, type, {a.batch, a.source});
  HistoryWeights prepared{
      torch::stable::new_zeros(like, {a.filters, a.channels, (a.window + 3) / 4 * 4}),
      torch::stable::new_empty(like, {a.filters, a.attention}),
  };
  Tensor taps = torch::stable::narrow(prepared.conv, 2, 0, a.window);
  torch::stable::copy_(taps, *w_conv);
  torch::stable::copy_(prepared.feature, torch::stable::transpose(*w_feature, 0, 1));
  a.w_conv = prepared.conv.const_data_ptr();
  a.w_feature = prepared.feature.const_data_ptr();
  return prepared;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decoder_loop_cuda(
    int64_t number, Tensor x_gates, Tensor w_hh, Tensor w_context, OptionalTensor b_ih, OptionalTensor b_hh,
    Tensor w_query, OptionalTensor b_query, Tensor v, Tensor keys, Tensor values, OptionalTensor lengths,
    OptionalTensor mask, OptionalTensor h0, OptionalTensor c0, bool save, int64_t history, OptionalTensor history0,
    OptionalTensor w_conv, OptionalTensor w_feature, OptionalTensor fertility) {
  const CellInfo& cell = cell_info(number);
  const ScalarType type = x_gates.scalar_type();
  if (x_gates.dim() != 3 || keys.dim() != 3 || values.dim() != 3 || w_hh.dim() != 2) {
    fail("x_gates, keys, values: expected 3 dimensions and w_hh 2, got ", shape_of(x_gates), ", ", shape_of(keys), ", ",
         shape_of(values), ", ", shape_of(w_hh));
  }
  check_device("x_gates", x_gates);
  const int device = x_gates.get_device_index();
  const DeviceGuard guard(device);

  DecoderForward a{};
  a.cell = int(number);
  a.dtype = number_of(type);
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
  a.ld_context = check_context_weight(w_context, x_gates, type, GH, D);
  a.w_context = w_context.const_data_ptr();
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
  const HistoryWeights prepared = take_history(a, x_gates, save, history, history0, w_conv, w_feature, fertility);
  const int64_t shared_limit = device_of(device).smem_per_block;
  const std::string reason =
      decoder_why_not({a.cell, a.dtype, S, H, A, D, a.filters, a.channels, a.window}, device_of(device));
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
  const std::vector<int64_t> none{0};
  Tensor saved =
      torch::stable::new_empty(x_gates, save ? std::vector{B, T, H, int64_t(kept(cell.saved, cell.has_cell))} : none);
  Tensor cells =
      torch::stable::new_empty(x_gates, save && cell.has_cell ? std::vector{B, T, H} : none, ScalarType::Float);
  if (save) {
    a.saved = saved.mutable_data_ptr();
    a.cells = cell.has_cell ? static_cast<float*>(cells.mutable_data_ptr()) : nullptr;
  }
  if (const char* error = decoder_forward(a, shared_limit, stream)) fail(error);
  return {output, hn, cn, contexts, weights, saved, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decoder_loop_bwd_cuda(
    int64_t number, Tensor w_recurrent, Tensor w_context, Tensor v, Tensor keys, Tensor values, OptionalTensor lengths,
    OptionalTensor h0, OptionalTensor c0, Tensor output, Tensor weights, Tensor queries, Tensor saved, Tensor cells,
    OptionalTensor d_output, OptionalTensor d_cn, OptionalTensor d_contexts, OptionalTensor d_weights) {
  const CellInfo& cell = cell_info(number);
  const ScalarType type = output.scalar_type();
  if (output.dim() != 3 || keys.dim() != 3 || values.dim() != 3) {
    fail("output, keys, values: expected 3 dimensions, got ", shape_of(output), ", ", shape_of(keys), ", ",
         shape_of(values));
  }
  check_device("output", output);
  const int device = output.get_device_index();
  const DeviceGuard guard(device);

  DecoderBackward a{};
  a.cell = int(number);
  a.dtype = number_of(type);
  const int64_t B = a.batch = output.size(0), T = a.steps = output.size(1), S = a.source = keys.size(1);
  const int64_t H = a.hidden = output.size(2), A = a.attention = keys.size(2), D = a.value = values.size(2);
  const int64_t GH = cell.gates * H, W = a.step_width = GH + A;
  const std::string reason = decoder_why_not({a.cell, a.dtype, S, H, A, D}, device_of(device));
  if (!reason.empty()) fail(reason);
  whole("w_recurrent", w_recurrent, output, type, {W, H});
  check_context_weight(w_context, output, type, GH, D);
  a.v = whole<float>("v", v, output, ScalarType::Float, {A});
  a.keys = whole("keys", keys, output, type, {B, S, A});
  a.values = whole("values", values, output, type, {B, S, D});
  a.lengths = whole<int64_t>("lengths", lengths, output, ScalarType::Long, {B});
  a.h0 = whole("h0", h0, output, type, {B, H});
  a.c0 = whole("c0", c0, output, type, {B, H});
  a.output = whole("output", output, output, type, {B, T, H});
  a.weights = whole("weights", weights, output, type, {B, T, S});
  a.queries = whole("queries", queries, output, type, {B, T, A});
  a.saved = whole("saved", saved, output, type, {B, T, H, int64_t(kept(cell.saved, cell.has_cell))});
  if (cell.has_cell) a.cells = whole<float>("cells", cells, output, ScalarType::Float, {B, T, H});
  a.d_output = whole("d_output", d_output, output, type, {B, T, H});
  a.d_cn = whole("d_cn", d_cn, output, type, {B, H});
  a.d_contexts = whole("d_contexts", d_contexts, output, type, {B, T, D});
  a.d_weights = whole("d_weights", d_weights, output, type, {B, T, S});
  if (!aligned(a.keys) || !aligned(a.values) || !aligned(a.queries) || !aligned(a.d_contexts)) {
    fail("keys, values, queries, d_contexts: expected data aligned to 16 bytes");
  }

  const auto make = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(output, std::move(shape)); };
  const auto make_float = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(output, std::move(shape), ScalarType::Float);
  };
  const std::vector<int64_t> none{0}, state{B, H};
  Tensor d_x_gates = make({B, T, GH}), d_step = make({B, T, W}), d_context = make({B, T, D});
  Tensor d_scores = make_float({B, T, S}), d_h0 = make(h0 ? state : none), d_c0 = make(c0 ? state : none);
  Tensor h_product = make_float(state), context_product = make_float({B, D});
  Tensor dh = make_float(state), dc = make_float(cell.has_cell ? state : none);
  a.h_product = static_cast<const float*>(h_product.const_data_ptr());
  a.context_product = static_cast<const float*>(context_product.const_data_ptr());
  a.dh = static_cast<float*>(dh.mutable_data_ptr());
  a.dc = static_cast<float*>(dc.mutable_data_ptr());
  a.d_x_gates = d_x_gates.mutable_data_ptr();
  a.d_step = d_step.mutable_data_ptr();
  a.d_context = d_context.mutable_data_ptr();
  a.d_scores = static_cast<float*>(d_scores.mutable_data_ptr());
  a.d_h0 = h0 ? d_h0.mutable_data_ptr() : nullptr;
  a.d_c0 = c0 ? d_c0.mutable_data_ptr() : nullptr;

  void* stream = current_stream(device);
  const Products products(output.device(), type, ScalarType::Float);
  const int64_t item = 2;
  for (int64_t t = B ? T - 1 : -1; t >= 0; --t) {
    decoder_backward_cell(a, t, stream);
    const Tensor gates = products.view({static_cast<char*>(a.d_x_gates) + t * GH * item, B, GH, T * GH});
    products.multiply_to_sum(context_product, gates, w_context);
    decoder_backward_attention(a, t, device_of(device).sm_count, stream);
    const Tensor step = products.view({static_cast<char*>(a.d_step) + t * W * item, B, W, T * W});
    products.multiply_to_sum(h_product, step, w_recurrent);
  }
  if (B) decoder_backward_finish(a, stream);
  return {d_x_gates, d_step, d_context, d_scores, d_h0, d_c0};
}

STABLE_TORCH_LIBRARY_IMPL(SEQATTN_LIBRARY, SEQATTN_DISPATCH_KEY, m) {
  m.impl("decoder_loop", TORCH_BOX(&decoder_loop_cuda));
  m.impl("decoder_loop_bwd", TORCH_BOX(&decoder_loop_bwd_cuda));
}

}  // namespace
}  // namespace seqattn::gpu
