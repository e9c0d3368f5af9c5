// What the operators of the attentional decoder are given, checked, and the problem made of it. For decoder.cpp alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "decoder.h"
#include "launch.h"
#include "workspace.h"

namespace seqattn {
namespace {

using MaybeTensor = std::optional<Tensor>;

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// v as the score kernels read it: in groups of four, scaled by a power of two so that the largest is at most 1.
template <class T>
struct ScoreVector {
  std::vector<T> padded_v, groups;
  T scale = 1;

  void read(const T* v, AttentionArgs<T>* args) {
    const int64_t rows = packed_rows(args->A) - 1;
    padded_v.assign(size_t(rows), T(0));
    groups.assign(size_t(2 * rows), T(0));
    std::copy_n(v, args->A, padded_v.begin());
    T largest = 0, zero = 0;  // x - x is 0 unless x is infinite or NaN
    for (const T x : padded_v) {
      zero += x - x;
      largest = std::max(largest, std::abs(x));
    }
    args->v_finite = zero == 0;
    int exponent = 1;
    if (args->v_finite) std::frexp(largest, &exponent);
    exponent = std::max(exponent, std::numeric_limits<T>::min_exponent + 2);  // so that 2^-exponent is finite
    scale = std::ldexp(T(1), exponent - 1);
    const T inverse = std::ldexp(T(1), 1 - exponent);
    for (int64_t g = 0; g < rows / 4; ++g) {
      T* group = groups.data() + 8 * g;
      for (int i = 0; i < 4; ++i) group[i] = padded_v[size_t(4 * g + i)] * inverse;
      group[4] = -((group[0] + group[1]) + (group[2] + group[3])) / 2;
    }
    args->v = padded_v.data();
    args->v_groups = groups.data();
    args->scales = &scale;
    args->v_stride = rows;
  }
};

// What every direction of the operator is given, checked and dense, and the problem made of it.
template <class T>
struct Arguments {
  DecoderProblem<T> p{};
  const CellInfo& cell;
  int64_t memory_rows = 0;   // of keys and values: B without owners
  std::vector<Tensor> kept;  // what the pointers point into
  std::vector<LayerWeights<T>> layers;
  std::vector<int64_t> lengths;
  ScoreVector<T> score_vector;

  explicit Arguments(int64_t number) : cell(cell_info(number)) {}

  const T* take(const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
    kept.push_back(dense(t));
    check_tensor(name, kept.back(), dtype_of<T>(), shape);
    return kept.back().template const_data_ptr<T>();
  }
  const T* take(const char* name, const MaybeTensor& t, const std::vector<int64_t>& shape) {
    return t ? take(name, *t, shape) : nullptr;
  }

  // options: order, score, activation, then where the input, the context and the attentional vector begin in w_ih, and
  // the context and h in w_output; history, history_gradient.
  void read_options(const std::vector<int64_t>& options, double scale) {
    if (options.size() != 10) fail("options: expected 10 numbers, got ", options.size());
    for (const auto& [i, most] : {std::pair<size_t, int64_t>{0, 2}, {1, 1}, {2, 1}, {8, 3}, {9, 1}}) {
      if (options[i] < 0 || options[i] > most) fail("options[", i, "]: expected 0 to ", most, ", got ", options[i]);
    }
    p.order = DecoderOrder(options[0]);
    p.score = DecoderScore(options[1]);
    p.activation = Activation(options[2]);
    p.input_at = options[3];
    p.context_at = options[4];
    p.attentional_at = options[5];
    p.output_context_at = options[6];
    p.output_hidden_at = options[7];
    p.history = DecoderHistory(options[8]);
    p.history_gradient = options[9] == 1;
    p.scale = T(scale);
  }

  // What earlier weights are read with; S, A and the score are known.
  void read_history(const MaybeTensor& history0, const MaybeTensor& w_conv, const MaybeTensor& w_feature,
                    const MaybeTensor& fertility) {
    if (!p.has_history()) {
      if (history0 || w_conv || w_feature || fertility) fail("history0, w_conv, w_feature, fertility: expected None");
      return;
    }
    if (p.score != DecoderScore::additive) fail("options: expected additive scores with a history");
    if (fertility && !p.knows_sum()) fail("fertility: expected None, as no sum of weights is kept");
    if (!w_conv || w_conv->dim() != 3) fail("w_conv: expected [F, C, window]");
    if (!w_feature) fail("w_feature: expected [A, F], got None");
    p.C = p.history == DecoderHistory::both ? 2 : 1;
    p.F = w_conv->size(0);
    p.window = w_conv->size(2);
    if (p.window % 2 == 0) fail("w_conv: expected an odd window, got ", shape_of(*w_conv));
    p.w_conv = take("w_conv", w_conv, {p.F, p.C, p.window});
    p.w_feature = take("w_feature", w_feature, {p.A, p.F});
    p.history0 = take("history0", history0, {p.B, p.C, p.S});
    p.fertility = take("fertility", fertility, {memory_rows, p.S});
  }

  void read_weights(const std::vector<Tensor>& weights, bool has_bias, const MaybeTensor& w_query,
                    const MaybeTensor& b_query, const MaybeTensor& w_output, const MaybeTensor& b_output) {
    const size_t each = has_bias ? 4 : 2;
    if (weights.empty() || weights.size() % each) {
      fail("weights: expected ", each, " tensors for each layer, got ", weights.size());
    }
    p.layers = int64_t(weights.size() / each);
    if (weights[1].dim() != 2) fail("w_hh: expected [G * H, H], got ", shape_of(weights[1]));
    p.H = weights[1].size(1);
    p.M = w_output ? w_output->size(0) : 0;
    p.width = p.I + (p.context_at >= 0 ? p.D : 0) + (p.attentional_at >= 0 ? p.M : 0);
    const int64_t rows = cell.gates * p.H;
    if (p.order == DecoderOrder::between && p.layers > 1) p.second_context = p.D;
    kept.reserve(kept.size() + weights.size() + 32);
    for (int64_t l = 0; l < p.layers; ++l) {
      const Tensor* w = &weights[size_t(l) * each];
      LayerWeights<T> layer{};
      layer.w_ih = take("w_ih", w[0], {rows, p.layer_width(l)});
      layer.w_hh = take("w_hh", w[1], {rows, p.H});
      if (has_bias) {
        layer.b_ih = take("b_ih", w[2], {rows});
        layer.b_hh = take("b_hh", w[3], {rows});
      }
      layers.push_back(layer);
    }
    p.weights = layers.data();
    if (!w_query && p.A != p.H) fail("keys: expected [B, S, A] with A=", p.H, " (H), as there is no w_query");
    p.w_query = take("w_query", w_query, {p.A, p.H});
    p.b_query = take("b_query", b_query, {p.A});
    p.w_output = take("w_output", w_output, {p.M, p.D + p.H});
    p.b_output = take("b_output", b_output, {p.M});
    if (p.layers > 16) fail("weights: expected at most 16 layers, got ", p.layers);
    if (b_query && !w_query) fail("b_query: expected None without w_query");
    check_places({{p.input_at, p.I}, {p.context_at, p.D}, {p.attentional_at, p.M}}, p.width, "w_ih");
    if (p.M) check_places({{p.output_context_at, p.D}, {p.output_hidden_at, p.H}}, p.D + p.H, "w_output");
    if (p.attentional_at >= 0 && !w_output) fail("w_output: expected a tensor, as its result is fed back");
  }

  // Parts of a matrix must lie side by side, in any order.
  static void check_places(std::vector<std::pair<int64_t, int64_t>> parts, int64_t width, const char* name) {
    std::sort(parts.begin(), parts.end());
    int64_t at = 0;
    for (const auto& [begin, size] : parts) {
      if (begin < 0) continue;
      if (begin != at) fail("options: expected a part of ", name, " at column ", at, ", got ", begin);
      at += size;
    }
    if (at != width) fail("options: expected parts of ", name, " that make ", width, " columns, got ", at);
  }

  void read_memory(const Tensor& keys, const Tensor& values, const MaybeTensor& v, const MaybeTensor& given_lengths,
                   const MaybeTensor& mask) {
    AttentionArgs<T>& args = p.attention;
    args.heads = 1;
    args.B = p.B;
    args.T_ = p.steps;
    args.S = p.S;
    args.A = p.A;
    args.D = p.D;
    args.keys = take("keys", keys, {memory_rows, p.S, p.A});
    args.values = take("values", values, {memory_rows, p.S, p.D});
    if (p.score == DecoderScore::additive) {
      if (!v) fail("v: expected [A] for additive scores, got None");
      score_vector.read(take("v", *v, {p.A}), &args);
    }
    if (given_lengths) read_lengths(*given_lengths);
    if (mask) {
      check_tensor("mask", *mask, ScalarType::Bool, {memory_rows, p.S});
      kept.push_back(dense(*mask));
      args.mask_bool = static_cast<const uint8_t*>(kept.back().data_ptr());
      args.mask_b = p.S;
    }
  }

  void read_lengths(const Tensor& given) {
    check_tensor("lengths", given, ScalarType::Long, {memory_rows});
    const Tensor t = dense(given);
    lengths.assign(t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + memory_rows);
    for (int64_t b = 0; b < memory_rows; ++b) {
      if (lengths[size_t(b)] < 0 || lengths[size_t(b)] > p.S) {
        fail("lengths: expected values in [0, ", p.S, "] (S of keys), got ", lengths[size_t(b)], " at [", b, "]");
      }
    }
    p.attention.lengths = lengths.data();
  }

  void read_packed_keys(const MaybeTensor& packed) {
    if (p.score != DecoderScore::additive || p.has_history()) return;
    if (!packed) fail("packed_keys: expected what additive_pack made of keys, got None");
    p.attention.packed = take("packed_keys", *packed, {memory_rows, p.attention.blocks(), packed_rows(p.A), kKeyBlock});
  }

  void read_owners(const Tensor& given) {
    check_tensor("owners", given, ScalarType::Long, {-1});
    kept.push_back(dense(given));
    p.owners = kept.back().const_data_ptr<int64_t>();
    p.B = given.size(0);
    for (int64_t b = 0; b < p.B; ++b) {
      if (p.owners[b] < 0 || p.owners[b] >= memory_rows) {
        fail("owners: expected values in [0, ", memory_rows, ") (rows of keys), got ", p.owners[b], " at [", b, "]");
      }
    }
  }

  const int64_t* take_words(const char* name, const Tensor& given) {
    check_tensor(name, given, ScalarType::Long, {p.B});
    kept.push_back(dense(given));
    const int64_t* words = kept.back().const_data_ptr<int64_t>();
    for (int64_t b = 0; b < p.B; ++b) {
      if (words[b] < 0 || words[b] >= p.vocabulary) {
        fail(name, ": expected words in [0, ", p.vocabulary, ") (V of embedding), got ", words[b], " at [", b, "]");
      }
    }
    return words;
  }

  // Threads by the work there is; tiles are split among them where that leaves none idle for long.
  void plan(double passes) {
    const double dense_products = double(cell.gates * p.H) * double(p.width + p.H + (p.layers - 1) * 2 * p.H) +
                                  double(p.w_query ? p.A * p.H : 0) + double(p.M * (p.D + p.H)) +
                                  double(p.vocabulary * (p.M ? p.M : p.H));
    const double row = dense_products + double(p.S) * double((4 + p.F) * p.A + p.D + p.F * p.C * p.window);
    const double step = passes * row * double(p.B), total = step * double(p.steps);
    const int64_t most = torch::stable::get_num_threads(), tiles = p.tiles();
    const int64_t useful = std::clamp<int64_t>(int64_t(total / 2e5), 1, most);
    p.split = useful > 1 && (tiles % useful == 0 || tiles >= 3 * useful);
    p.threads = int(p.split ? useful : std::clamp<int64_t>(int64_t(step / 6e3), 1, useful));
  }

  void take_scratch(int64_t pack_values) {
    p.tile_scratch = padded(p.tile_scratch);
    p.thread_scratch = padded(p.thread_scratch);
    p.common_scratch = padded(p.common_scratch);
    const int64_t values = p.common_scratch + (p.split ? p.threads : 1) * p.tile_scratch + p.threads * p.thread_scratch;
    p.scratch = static_cast<T*>(workspace(size_t(values + pack_values) * sizeof(T)));
    if (pack_values) p.packed = p.scratch + values;
  }
};

// What forward and backward are given alike.
struct Given {
  const std::vector<int64_t>& options;
  double scale;
  const Tensor &input, &keys, &values;  // input: [B, T, I], or, running freely, the embeddings [V, I]
  const MaybeTensor &lengths, &mask, &h0, &c0, &context0, &attentional0;
  const std::vector<Tensor>& weights;
  bool has_bias;
  const MaybeTensor &w_query, &b_query, &v, &w_output, &b_output;
  const MaybeTensor &history0, &w_conv, &w_feature, &fertility;
  const MaybeTensor *owners = nullptr, *start = nullptr;
  int64_t max_length = 0;  // running freely
};

template <class T>
void read(Arguments<T>* a, const Given& g) {
  DecoderProblem<T>& p = a->p;
  a->read_options(g.options, g.scale);
  if (g.keys.dim() != 3) fail("keys: expected [B, S, A], got ", shape_of(g.keys));
  if (g.values.dim() != 3) fail("values: expected [B, S, D], got ", shape_of(g.values));
  p.B = a->memory_rows = g.keys.size(0);
  p.S = g.keys.size(1);
  p.A = g.keys.size(2);
  p.D = g.values.size(2);
  if (g.owners && *g.owners) a->read_owners(**g.owners);
  p.end = -1;
  if (g.start) {
    if (g.input.dim() != 2) fail("embedding: expected [V, I], got ", shape_of(g.input));
    p.vocabulary = g.input.size(0);
    p.I = g.input.size(1);
    p.steps = g.max_length;
    p.embedding = a->take("embedding", g.input, {p.vocabulary, p.I});
    p.start = a->take_words("start", **g.start);
  } else {
    if (g.input.dim() != 3) fail("input: expected [B, T, I], got ", shape_of(g.input));
    p.steps = g.input.size(1);
    p.I = g.input.size(2);
    p.input = a->take("input", g.input, {p.B, p.steps, p.I});
  }
  a->read_weights(g.weights, g.has_bias, g.w_query, g.b_query, g.w_output, g.b_output);
  a->read_memory(g.keys, g.values, g.v, g.lengths, g.mask);
  a->read_history(g.history0, g.w_conv, g.w_feature, g.fertility);
  p.h0 = a->take("h0", g.h0, {p.layers, p.B, p.H});
  p.c0 = a->take("c0", g.c0, {p.layers, p.B, p.H});
  p.context0 = a->take("context0", g.context0, {p.B, p.D});
  p.attentional0 = a->take("attentional0", g.attentional0, {p.B, p.M});
  // Some hundred rows at a time: what is kept of them stays in the second-level cache.
  p.chunk_steps =
      std::clamp<int64_t>(256 / std::clamp<int64_t>(p.B, 1, kDecoderRows), 1, std::max<int64_t>(p.steps, 1));
}

}  // namespace
}  // namespace seqattn
