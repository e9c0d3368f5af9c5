// The attentional decoder on a CPU: checks, allocation and the number of threads. The loops are in decoder_forward.h
// and decoder_backward.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "decoder_arguments.h"

namespace seqattn {
namespace {

template <class T>
const DecoderKernels<T>& kernels() {
  const DecoderTable& table = SEQATTN_KERNELS(decoder_kernels);
  if constexpr (sizeof(T) == 4) {
    return table.f32;
  } else {
    return table.f64;
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(int64_t number, const Given& given,
                                                                   const MaybeTensor& packed_keys,
                                                                   const MaybeTensor& packed, bool save) {
  Arguments<T> a(number);
  DecoderProblem<T>& p = a.p;
  read(&a, given);
  const Tensor& input = given.input;
  a.read_packed_keys(packed_keys);

  auto make = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(input, shape); };
  Tensor hidden = make({p.layers, p.B, p.steps, p.H});
  Tensor c_n = make(a.cell.has_cell ? std::vector<int64_t>{p.layers, p.B, p.H} : std::vector<int64_t>{0});
  Tensor contexts = make({p.B, p.steps, p.D}), found = make({p.B, p.steps, p.S});
  Tensor attentional = make(p.M ? std::vector<int64_t>{p.B, p.steps, p.M} : std::vector<int64_t>{0});
  Tensor reserve =
      make(save ? std::vector<int64_t>{p.layers, p.B, p.steps, a.cell.saved * padded(p.H)} : std::vector<int64_t>{0});
  p.hidden = hidden.mutable_data_ptr<T>();
  p.c_n = c_n.mutable_data_ptr<T>();
  p.attention.context = contexts.mutable_data_ptr<T>();
  p.attention.weights = found.mutable_data_ptr<T>();
  p.attentional = attentional.mutable_data_ptr<T>();
  p.reserve = save ? reserve.mutable_data_ptr<T>() : nullptr;

  const DecoderKernels<T>& k = kernels<T>();
  const int64_t size = k.packed_size(int(number), p);
  p.packed_given = packed.has_value();
  if (packed) p.packed = const_cast<T*>(a.take("packed", *packed, {size}));
  if (p.steps == 1) p.tile_rows = kStepRows;
  a.plan(1);
  k.forward_scratch(int(number), &p);
  a.take_scratch(packed ? 0 : size);
  if (p.B) run_gang(p.threads, [&](Gang& gang) { k.forward(int(number), p, gang); });
  return {hidden, c_n, contexts, found, attentional, reserve};
}

// Running freely: words [B, T] and how many of them are each row's [B], sums of log-probabilities [B], weights [B, T,
// S]. What comes after a row's own words means nothing.
template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> generate(int64_t number, const Given& given, const MaybeTensor& packed_keys,
                                                    const MaybeTensor& packed, const MaybeTensor& w_predict,
                                                    const MaybeTensor& b_predict, int64_t end) {
  Arguments<T> a(number);
  DecoderProblem<T>& p = a.p;
  if (given.max_length < 0) fail("max_length: expected at least 0, got ", given.max_length);
  read(&a, given);
  a.read_packed_keys(packed_keys);
  p.end = end;
  p.chunk_steps = 1;  // the next input is known a step at a time
  p.w_predict = a.take("w_predict", w_predict, {p.vocabulary, p.M ? p.M : p.H});
  p.b_predict = a.take("b_predict", b_predict, {p.vocabulary});
  if (!w_predict && (p.M ? p.M : p.H) != p.vocabulary) {
    fail("w_predict: expected a tensor, as the output isn't the logits of V=", p.vocabulary, " words");
  }

  auto make = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(given.input, shape); };
  auto integers = [&](std::vector<int64_t> shape) {
    return torch::stable::new_zeros(given.input, shape, ScalarType::Long);
  };
  // h, contexts and attentional vectors of all steps are nobody's here.
  Tensor hidden = make({p.layers, p.B, p.steps, p.H}), contexts = make({p.B, p.steps, p.D});
  Tensor c_n = make(a.cell.has_cell ? std::vector<int64_t>{p.layers, p.B, p.H} : std::vector<int64_t>{0});
  Tensor attentional = make({p.B, p.steps, p.M}), found = make({p.B, p.steps, p.S}), log_probs = make({p.B});
  Tensor words = integers({p.B, p.steps}), counts = integers({p.B});
  p.hidden = hidden.mutable_data_ptr<T>();
  p.c_n = c_n.mutable_data_ptr<T>();
  p.attention.context = contexts.mutable_data_ptr<T>();
  p.attention.weights = found.mutable_data_ptr<T>();
  p.attentional = attentional.mutable_data_ptr<T>();
  p.log_probs = log_probs.mutable_data_ptr<T>();
  p.words = words.mutable_data_ptr<int64_t>();
  p.word_count = counts.mutable_data_ptr<int64_t>();
  int not_a_number = 0;
  p.not_a_number = &not_a_number;

  const DecoderKernels<T>& k = kernels<T>();
  const int64_t size = k.packed_size(int(number), p);
  p.packed_given = packed.has_value();
  if (packed) p.packed = const_cast<T*>(a.take("packed", *packed, {size}));
  a.plan(1);
  k.forward_scratch(int(number), &p);
  a.take_scratch(packed ? 0 : size);
  if (p.B) run_gang(p.threads, [&](Gang& gang) { k.forward(int(number), p, gang); });
  if (not_a_number) fail("logits: expected numbers, got NaN, or no finite one, in a step");
  return {words, counts, log_probs, found};
}

// Results: gradients of input (empty unless need_input), keys, values, h0, c0, context0, attentional0, w_query,
// b_query, v, w_output, b_output, history0, w_conv, w_feature, fertility (empty where not given) and of the weights.
template <class T>
std::vector<Tensor> backward(int64_t number, const Given& given, const Tensor& hidden, const Tensor& contexts,
                             const Tensor& found, const MaybeTensor& attentional, const Tensor& reserve,
                             const MaybeTensor& d_hidden, const MaybeTensor& d_c_n, const MaybeTensor& d_contexts,
                             const MaybeTensor& d_weights, const MaybeTensor& d_attentional, bool need_input) {
  Arguments<T> a(number);
  DecoderProblem<T>& p = a.p;
  read(&a, given);
  p.hidden = const_cast<T*>(a.take("hidden", hidden, {p.layers, p.B, p.steps, p.H}));
  p.attention.context = const_cast<T*>(a.take("contexts", contexts, {p.B, p.steps, p.D}));
  p.attention.weights = const_cast<T*>(a.take("weights", found, {p.B, p.steps, p.S}));
  p.attentional = const_cast<T*>(a.take("attentional", attentional, {p.B, p.steps, p.M}));
  p.reserve = const_cast<T*>(a.take("reserve", reserve, {p.layers, p.B, p.steps, a.cell.saved * padded(p.H)}));
  p.d_hidden = a.take("d_hidden", d_hidden, {p.layers, p.B, p.steps, p.H});
  p.d_c_n = a.take("d_c_n", d_c_n, {p.layers, p.B, p.H});
  p.d_contexts = a.take("d_contexts", d_contexts, {p.B, p.steps, p.D});
  p.d_weights = a.take("d_weights", d_weights, {p.B, p.steps, p.S});
  p.d_attentional = a.take("d_attentional", d_attentional, {p.B, p.steps, p.M});
  if (p.M && !attentional) fail("attentional: expected a tensor, as there is w_output");

  std::vector<Tensor> results;
  const auto zeros = [&](const MaybeTensor& like) {
    results.push_back(like ? torch::stable::new_zeros(given.input, like->sizes())
                           : torch::stable::new_empty(given.input, std::vector<int64_t>{0}));
    return like ? results.back().template mutable_data_ptr<T>() : nullptr;
  };
  p.d_input = zeros(need_input ? MaybeTensor(given.input) : MaybeTensor());
  p.d_keys = zeros(given.keys);
  p.d_values = zeros(given.values);
  p.d_h0 = zeros(given.h0);
  p.d_c0 = zeros(given.c0);
  p.d_context0 = zeros(given.context0);
  p.d_attentional0 = zeros(given.attentional0);
  p.d_w_query = zeros(given.w_query);
  p.d_b_query = zeros(given.b_query);
  T* d_v = zeros(given.v);
  p.d_w_output = zeros(given.w_output);
  p.d_b_output = zeros(given.b_output);
  p.d_history0 = zeros(given.history0);
  T* d_conv = zeros(given.w_conv);
  T* d_feature = zeros(given.w_feature);
  p.d_fertility = zeros(given.fertility);
  std::vector<LayerWeights<T>> layers;
  for (size_t i = 0; i < given.weights.size();) {
    LayerWeights<T> layer{};
    layer.w_ih = zeros(given.weights[i++]);
    layer.w_hh = zeros(given.weights[i++]);
    if (given.has_bias) {
      layer.b_ih = zeros(given.weights[i++]);
      layer.b_hh = zeros(given.weights[i++]);
    }
    layers.push_back(layer);
  }
  p.d_layers = layers.data();
  std::vector<T> per_row(size_t(p.B * p.A), T(0));
  p.d_v = per_row.data();
  const int64_t taps = p.C * p.window;
  std::vector<T> conv_rows(size_t(p.B * taps * padded(p.F)), T(0));
  std::vector<T> feature_rows(size_t(p.has_history() ? p.B * p.F * padded(p.A) : 0), T(0));
  p.d_conv = conv_rows.data();
  p.d_feature = feature_rows.data();

  const DecoderKernels<T>& k = kernels<T>();
  a.plan(2.5);
  k.backward_scratch(int(number), &p);
  a.take_scratch(0);
  if (p.B && p.steps) {
    run_gang(p.threads, [&](Gang& gang) { k.backward(int(number), p, gang); });
  } else if (p.d_c0 && p.d_c_n) {
    std::copy_n(p.d_c_n, p.layers * p.B * p.H, p.d_c0);
  }
  for (int64_t i = 0; d_v && i < p.B * p.A; ++i) d_v[i % p.A] += per_row[size_t(i)];
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t f = 0; f < p.F; ++f) {
      const T* conv = conv_rows.data() + b * taps * padded(p.F) + f;
      for (int64_t k = 0; k < taps; ++k) d_conv[f * taps + k] += conv[k * padded(p.F)];
      const T* feature = feature_rows.data() + (b * p.F + f) * padded(p.A);
      for (int64_t a = 0; a < p.A; ++a) d_feature[a * p.F + f] += feature[a];
    }
  }
  return results;
}

template <class T>
Tensor pack(int64_t number, const std::vector<Tensor>& weights, bool has_bias, const MaybeTensor& w_query,
            const MaybeTensor& b_query, const MaybeTensor& w_output, const MaybeTensor& b_output,
            const MaybeTensor& w_conv, const MaybeTensor& w_feature) {
  Arguments<T> a(number);
  DecoderProblem<T>& p = a.p;
  if (weights.size() < 2 || weights[0].dim() != 2 || weights[1].dim() != 2) {
    fail("weights: expected w_ih [G * H, I] and w_hh [G * H, H] first");
  }
  // As far as packing goes, all columns of w_ih are alike.
  p.I = weights[0].size(1);
  p.H = weights[1].size(1);
  p.A = w_query ? w_query->size(0) : p.H;
  p.D = w_output ? w_output->size(1) - p.H : 0;
  p.context_at = p.attentional_at = -1;
  p.output_hidden_at = p.D;
  const size_t each = has_bias ? 4 : 2;
  if (weights.size() > each && weights[each].dim() == 2 && weights[each].size(1) > p.H) {
    p.order = DecoderOrder::between;
    p.D = weights[each].size(1) - p.H;
  }
  a.read_weights(weights, has_bias, w_query, b_query, w_output, b_output);
  if (w_conv && w_conv->dim() == 3) {
    p.history = w_conv->size(1) == 2 ? DecoderHistory::both : DecoderHistory::last;
    a.read_history({}, w_conv, w_feature, {});
  }
  const DecoderKernels<T>& k = kernels<T>();
  const int64_t size = k.packed_size(int(number), p);
  Tensor packed = torch::stable::new_empty(weights[0], {size});
  p.packed = packed.mutable_data_ptr<T>();
  want_huge_pages(p.packed, size_t(size) * sizeof(T));
  run_gang(int(torch::stable::get_num_threads()), [&](Gang& gang) { k.pack(int(number), p, gang); });
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decoder_fwd_cpu(
    int64_t cell, std::vector<int64_t> options, double scale, Tensor input, Tensor keys, MaybeTensor packed_keys,
    Tensor values, MaybeTensor lengths, MaybeTensor mask, MaybeTensor h0, MaybeTensor c0, MaybeTensor context0,
    MaybeTensor attentional0, std::vector<Tensor> weights, bool has_bias, MaybeTensor w_query, MaybeTensor b_query,
    MaybeTensor v, MaybeTensor w_output, MaybeTensor b_output, MaybeTensor history0, MaybeTensor w_conv,
    MaybeTensor w_feature, MaybeTensor fertility, MaybeTensor packed, MaybeTensor owners, bool save) {
  const Given given{options,  scale,    input,        keys,    values,    lengths,   mask,    h0,
                    c0,       context0, attentional0, weights, has_bias,  w_query,   b_query, v,
                    w_output, b_output, history0,     w_conv,  w_feature, fertility, &owners};
  if (owners && save) fail("owners: expected None with save, as backward has none");
  return with_dtype(input, [&](auto t) { return forward<decltype(t)>(cell, given, packed_keys, packed, save); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decoder_generate_cpu(
    int64_t cell, std::vector<int64_t> options, double scale, Tensor embedding, Tensor keys, MaybeTensor packed_keys,
    Tensor values, MaybeTensor lengths, MaybeTensor mask, MaybeTensor h0, MaybeTensor c0, MaybeTensor context0,
    MaybeTensor attentional0, std::vector<Tensor> weights, bool has_bias, MaybeTensor w_query, MaybeTensor b_query,
    MaybeTensor v, MaybeTensor w_output, MaybeTensor b_output, MaybeTensor history0, MaybeTensor w_conv,
    MaybeTensor w_feature, MaybeTensor fertility, MaybeTensor packed, MaybeTensor owners, MaybeTensor w_predict,
    MaybeTensor b_predict, Tensor start, int64_t end, int64_t max_length) {
  const MaybeTensor first = start;
  const Given given{options,  scale,        embedding, keys,      values,  lengths, mask,      h0,       c0,
                    context0, attentional0, weights,   has_bias,  w_query, b_query, v,         w_output, b_output,
                    history0, w_conv,       w_feature, fertility, &owners, &first,  max_length};
  return with_dtype(embedding, [&](auto t) {
    return generate<decltype(t)>(cell, given, packed_keys, packed, w_predict, b_predict, end);
  });
}

std::vector<Tensor> decoder_bwd_cpu(int64_t cell, std::vector<int64_t> options, double scale, Tensor input, Tensor keys,
                                    Tensor values, MaybeTensor lengths, MaybeTensor mask, MaybeTensor h0,
                                    MaybeTensor c0, MaybeTensor context0, MaybeTensor attentional0,
                                    std::vector<Tensor> weights, bool has_bias, MaybeTensor w_query,
                                    MaybeTensor b_query, MaybeTensor v, MaybeTensor w_output, MaybeTensor b_output,
                                    MaybeTensor history0, MaybeTensor w_conv, MaybeTensor w_feature,
                                    MaybeTensor fertility, Tensor hidden, Tensor contexts, Tensor found,
                                    MaybeTensor attentional, Tensor reserve, MaybeTensor d_hidden, MaybeTensor d_c_n,
                                    MaybeTensor d_contexts, MaybeTensor d_weights, MaybeTensor d_attentional,
                                    bool need_input) {
  const Given given{options,  scale,    input,        keys,    values,    lengths,  mask,    h0,
                    c0,       context0, attentional0, weights, has_bias,  w_query,  b_query, v,
                    w_output, b_output, history0,     w_conv,  w_feature, fertility};
  return with_dtype(input, [&](auto t) {
    return backward<decltype(t)>(cell, given, hidden, contexts, found, attentional, reserve, d_hidden, d_c_n,
                                 d_contexts, d_weights, d_attentional, need_input);
  });
}

Tensor decoder_pack_cpu(int64_t cell, std::vector<Tensor> weights, bool has_bias, MaybeTensor w_query,
                        MaybeTensor b_query, MaybeTensor w_output, MaybeTensor b_output, MaybeTensor w_conv,
                        MaybeTensor w_feature) {
  if (weights.empty()) fail("weights: expected tensors, got an empty list");
  return with_dtype(weights[0], [&](auto t) {
    return pack<decltype(t)>(cell, weights, has_bias, w_query, b_query, w_output, b_output, w_conv, w_feature);
  });
}

STABLE_TORCH_LIBRARY_IMPL(seqattn, CPU, m) {
  m.impl("decoder_fwd", TORCH_BOX(&decoder_fwd_cpu));
  m.impl("decoder_generate", TORCH_BOX(&decoder_generate_cpu));
  m.impl("decoder_bwd", TORCH_BOX(&decoder_bwd_cpu));
  m.impl("decoder_pack", TORCH_BOX(&decoder_pack_cpu));
}

}  // namespace
}  // namespace seqattn
