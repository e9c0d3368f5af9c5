// Backward pass of the attentional decoder. For decoder_kernels.cpp alone.
//
// A reverse loop over a tile's steps, in chunks. What forward kept is h, contexts, weights and the cells' reserve;
// queries are projected again for a chunk and the scores' derivatives computed again at each step. The gradients of a
// chunk stay in scratch until its end and then are operands of the products that give the gradients of weights, values
// and input; only the gradients of additive keys are summed step by step. Weight gradients are shared out by their
// rows, tile after tile: each value is summed by one thread in an order that doesn't depend on how many there are.
#pragma once

#include "attention_backward.h"
#include "decoder_forward.h"
#include "recurrence_backward.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// Some columns of a matrix [K][..] as panels [group][K][vectors], to multiply rows of gradients with.
template <class T>
struct ColumnPanels {
  Groups groups{0};
  int64_t K = 0, N = 0;
  T* data = nullptr;

  ColumnPanels() = default;
  ColumnPanels(int64_t rows, int64_t columns, T** at) : groups(vectors_of<T>(columns)), K(rows), N(columns), data(*at) {
    *at += padded(columns) * rows;
  }

  // row_of(k): the first of the columns in row k, or null for zeros.
  template <class RowOf>
  void pack(RowOf&& row_of, Gang& gang) const {
    int64_t begin, end;
    gang.share(groups.groups, &begin, &end);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = groups.begin(g), n = groups.begin(g + 1) - first;
      pack_rows(data + first * kLanes<T> * K, row_of, K, first * kLanes<T>, N, n);
    }
  }

  // c[row][columns of this thread's groups] (+)= a[row][K] times the panel; writes whole vectors.
  void multiply(T* c, int64_t ldc, const T* a, int64_t lda, int64_t rows, bool add, const Gang& gang) const {
    int64_t begin, end;
    gang.share(groups.groups, &begin, &end);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = groups.begin(g), n = groups.begin(g + 1) - first, column = first * kLanes<T>;
      multiply_panel(c + column, ldc, a, lda, data + column * K, K, rows, int(n), add);
    }
  }
};

// c[row][column ..] (+)= a b for rows of c, ldc apart, of which N columns may be written; `product` holds a panel's
// product where its last vector reaches past them.
template <class T>
void multiply_within(T* c, int64_t ldc, int64_t N, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K,
                     int64_t rows, int64_t column, int64_t vectors, bool add, T* product) {
  constexpr int W = kLanes<T>;
  if (column + vectors * W <= N) {
    multiply_strided(c + column, ldc, a, lda, b, ldb, K, rows, int(vectors), add);
    return;
  }
  multiply_strided(product, vectors * W, a, lda, b, ldb, K, rows, int(vectors), false);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vectors; ++v) {
      T* out = c + r * ldc + column + v * W;
      const int64_t left = N - column - v * W;
      if (left <= 0) continue;
      Vec<T> value = load(product + (r * vectors + v) * W);
      if (add) value += load_partial(out, left);
      store_partial(out, value, left);
    }
  }
}

// Scratch that all tiles share: the weights as backward reads them, and a chunk's gradients transposed.
template <class Cell, class T>
struct BackwardWeights {
  struct Layer {
    ColumnPanels<T> below, hh;  // below: W_ih of a layer above the first
  };
  static constexpr int kMaxLayers = 16;
  Layer layers[kMaxLayers];
  ColumnPanels<T> input, context, attentional;  // parts of W_ih of the first layer
  ColumnPanels<T> second_context;               // of the second
  ColumnPanels<T> query, output_context, output_hidden;
  T *forward_query, *forward_query_bias;  // as forward multiplies it
  HistoryWeights<T> history;
  T *feature_t, *conv_t;  // U transposed [A][padded F], the convolution [F][padded C * window]
  // Gradients of a chunk, transposed: of the gates, the query and the output projection. Apart, since a thread's rows
  // of one are not its rows of another.
  T *gates, *queries, *outputs, *end;
  int64_t ld_t;

  BackwardWeights(const DecoderProblem<T>& p, T* data) {
    T* at = data;
    const int64_t depth = Cell::kGates * padded(p.H);
    for (int64_t l = 0; l < p.layers; ++l) {
      layers[l].hh = ColumnPanels<T>(depth, p.H, &at);
      if (l) layers[l].below = ColumnPanels<T>(depth, p.H, &at);
    }
    if (p.d_input) input = ColumnPanels<T>(depth, p.I, &at);
    if (p.context_at >= 0) context = ColumnPanels<T>(depth, p.D, &at);
    if (p.attentional_at >= 0) attentional = ColumnPanels<T>(depth, p.M, &at);
    if (p.second_context) second_context = ColumnPanels<T>(depth, p.D, &at);
    if (p.w_query) query = ColumnPanels<T>(p.A, p.H, &at);
    if (p.M) {
      output_context = ColumnPanels<T>(p.M, p.D, &at);
      output_hidden = ColumnPanels<T>(p.M, p.H, &at);
    }
    forward_query = at;
    forward_query_bias = forward_query + (p.w_query ? padded(p.A) * p.H : 0);
    ld_t = row_stride(kDecoderRows * p.chunk_steps);
    history = HistoryWeights<T>(p, forward_query_bias + (p.w_query ? padded(p.A) : 0));
    feature_t = history.end;
    conv_t = feature_t + (p.has_history() ? p.A * padded(p.F) : 0);
    gates = conv_t + p.F * padded(p.C * p.window);
    queries = gates + Cell::kSlots * padded(p.H) * ld_t;
    outputs = queries + (p.w_query ? padded(p.A) * ld_t : 0);
    end = outputs + padded(p.M) * ld_t;
  }

  void pack(const DecoderProblem<T>& p, Gang& gang) const {
    constexpr int kHSlot = Cell::kSlots - Cell::kGates;
    // Row k of [slot][padded unit] in torch's w[gate * H + unit][ld], from `column` on; null in the padding.
    const auto slot_row = [&](const T* w, int64_t ld, int64_t column, int64_t k, int (*gate_of)(int), int first) {
      const int64_t width = padded(p.H), unit = k % width;
      return unit < p.H ? w + (gate_of(first + int(k / width)) * p.H + unit) * ld + column : nullptr;
    };
    for (int64_t l = 0; l < p.layers; ++l) {
      const LayerWeights<T>& w = p.weights[l];
      layers[l].hh.pack([&](int64_t k) { return slot_row(w.w_hh, p.H, 0, k, &Cell::h_gate, kHSlot); }, gang);
      const int64_t ld = p.layer_width(l);
      if (l) layers[l].below.pack([&](int64_t k) { return slot_row(w.w_ih, ld, 0, k, &Cell::x_gate, 0); }, gang);
    }
    if (p.second_context) {
      const int64_t ld = p.layer_width(1);
      second_context.pack([&](int64_t k) { return slot_row(p.weights[1].w_ih, ld, p.H, k, &Cell::x_gate, 0); }, gang);
    }
    if (p.has_history() && gang.rank == 0) pack_history(p);
    const auto first_layer = [&](const ColumnPanels<T>& panels, int64_t column) {
      if (panels.data == nullptr) return;
      panels.pack([&](int64_t k) { return slot_row(p.weights[0].w_ih, p.width, column, k, &Cell::x_gate, 0); }, gang);
    };
    first_layer(input, p.input_at);
    first_layer(context, p.context_at);
    first_layer(attentional, p.attentional_at);
    if (p.w_query) {
      query.pack([&](int64_t k) { return p.w_query + k * p.H; }, gang);
      pack_projection(Groups(vectors_of<T>(p.A)), forward_query, forward_query_bias, p.w_query, p.b_query, p.A, p.H,
                      gang);
    }
    if (p.M) {
      const int64_t ld = p.D + p.H;
      output_context.pack([&](int64_t k) { return p.w_output + k * ld + p.output_context_at; }, gang);
      output_hidden.pack([&](int64_t k) { return p.w_output + k * ld + p.output_hidden_at; }, gang);
    }
  }

 private:
  void pack_history(const DecoderProblem<T>& p) const {
    history.pack(p);
    const int64_t taps = p.C * p.window, ld_taps = padded(taps), ld = history.ld_conv;
    __builtin_memset(feature_t, 0, std::size_t(gates - feature_t) * sizeof(T));
    for (int64_t f = 0; f < p.F; ++f) {
      for (int64_t a = 0; a < p.A; ++a) feature_t[a * ld + f] = p.w_feature[a * p.F + f];
      for (int64_t k = 0; k < taps; ++k) conv_t[f * ld_taps + k] = p.w_conv[f * taps + k];
    }
  }
};

// Scratch of one tile. Rows of a chunk are numbered [batch row][step of the chunk].
template <class Cell, class T>
struct BackwardTile {
  static constexpr int W = kLanes<T>;
  int64_t columns, ld_grad, ld_h, ld_c, ld_context, ld_output, ld_query, ld_source;
  T *grad, *d_query, *query, *d_context, *d_output;  // rows of a chunk; grad [layer][row][slot][unit]
  T *dh, *dc, *fed_context, *fed_output;             // [layer][batch row], then what the step after passes back
  T *d_weights, *d_scores;                           // [batch row]; rows of a chunk
  // Additive scores, by batch row and column block: e^2x, tanh x or x of queries and keys, sums of gradients.
  T *q, *k, *dk, *dv;
  int8_t* slope;
  // Scores that know of earlier weights: channels of a chunk's rows; of a step, by batch row and key: features,
  // gradients of the sums under tanh, of features, of what the convolution multiplied; then what the steps after pass
  // back.
  T *channels, *features, *d_sums, *d_features, *d_taps, *d_channels, *passed;
  int64_t ld_channels, ld_features, ld_sums, ld_taps;
  T* end;

  BackwardTile(const DecoderProblem<T>& p, T* data) {
    const int64_t n = kDecoderRows < p.B ? kDecoderRows : p.B, rows = n * p.chunk_steps;
    columns = ceil_div(p.A, W);
    ld_grad = Cell::kSlots * padded(p.H) + kUnitPad;
    ld_h = row_stride(p.H);
    ld_c = padded(p.H);
    ld_context = row_stride(p.D);
    ld_output = row_stride(p.M);
    ld_query = row_stride(p.A);
    ld_source = round_up(p.S, kKeyBlock) + kKeyBlock;
    const bool additive = p.score == DecoderScore::additive && !p.has_history();
    ld_channels = p.C * channel_stride(p);
    ld_features = padded(p.F);
    ld_sums = padded(p.A);
    ld_taps = padded(p.C * p.window);
    T* at = data;
    auto take = [&](int64_t values) {
      T* start = at;
      at += padded(values);
      return start;
    };
    grad = take(p.layers * rows * ld_grad);
    d_query = take(rows * ld_query);
    query = take(rows * ld_query);
    d_context = take(rows * ld_context);
    d_output = take(p.M ? rows * ld_output : 0);
    dh = take(p.layers * n * ld_h);
    dc = take(Cell::kHasCell ? p.layers * n * ld_c : 0);
    fed_context = take(n * ld_context);
    fed_output = take(n * ld_output);
    d_weights = take(n * ld_source);
    d_scores = take(p.score == DecoderScore::dot ? rows * ld_source : 0);
    q = take(additive ? n * columns * p.chunk_steps * W : 0);
    k = take(additive ? n * columns * p.S * W : 0);
    dk = take(additive ? n * columns * p.S * W : 0);
    dv = take(additive ? n * columns * W : 0);
    slope = reinterpret_cast<int8_t*>(take(additive ? ceil_div(n * columns, int64_t(sizeof(T))) : 0));
    const int64_t keys = p.has_history() ? n * p.S : 0;
    channels = take(rows * ld_channels);
    features = take(keys * ld_features);
    d_sums = take(keys * ld_sums);
    d_features = take(keys * ld_features);
    d_taps = take(p.history_gradient ? keys * ld_taps : 0);
    d_channels = take(n * ld_channels);
    passed = take(p.has_history() ? n * 2 * ld_source : 0);
    end = at;
  }
};

// Scratch of one thread: a row of gradients of scores, the weights of a chunk transposed, operands of products.
template <class T>
struct BackwardThread {
  T *scores, *transposed, *panel, *product, *end;
  int64_t ld_t;

  BackwardThread(const DecoderProblem<T>& p, T* data) {
    const int64_t source = round_up(p.S, kKeyBlock) + kKeyBlock, width = kMaxPanel * kLanes<T>;
    int64_t most = kDecoderRows * p.chunk_steps;
    for (const int64_t rows : {p.H, p.A, p.M, p.S}) most = most < rows ? rows : most;
    ld_t = row_stride(p.chunk_steps);
    scores = data;
    transposed = scores + source;
    panel = transposed + source * ld_t;
    product = panel + kDecoderRows * p.chunk_steps * width;
    end = product + padded(most) * width;
  }
};

template <class Cell, class T>
void decoder_backward_scratch(DecoderProblem<T>* p) {
  T* const none = nullptr;
  p->common_scratch = BackwardWeights<Cell, T>(*p, none).end - none;
  p->tile_scratch = BackwardTile<Cell, T>(*p, none).end - none;
  p->thread_scratch = BackwardThread<T>(*p, none).end - none;
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA

#include "decoder_backward_history.h"
#include "decoder_backward_rows.h"
#include "decoder_backward_step.h"
#include "decoder_backward_weights.h"
