// Forward pass of the attentional decoder. For decoder_kernels.cpp alone.
#pragma once

#include "decoder_look.h"
#include "decoder_words.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class Cell, class T>
class DecoderForward : DecoderLook<Cell, T> {
 public:
  DecoderForward(const DecoderProblem<T>& problem, int64_t tile, T* shared, T* own, Gang& gang)
      : Look(problem, tile, shared, own, gang) {
    gang_.share(weights_.outputs.groups, &output_begin_, &output_end_);
  }

  void run() {
    gang_.barrier();  // weights are packed, and the tile before is done
    begin();
    gang_.barrier();
    if (p_.folds()) this->fold_values();
    for (int64_t t = 0; t < p_.steps; ++t) {
      if (t % p_.chunk_steps == 0) project_inputs(t);
      if (p_.order == DecoderOrder::bahdanau) this->attend(t, before(p_.layers - 1, 0));
      for (int64_t l = 0; l < p_.layers; ++l) {
        update(l, t);
        if (p_.order != DecoderOrder::bahdanau && l == p_.query_layer()) this->attend(t, after(l, 0));
      }
      if (p_.M) project_output(t);
      if (p_.embedding && predict(t)) break;
      now_ = 1 - now_;
    }
    if (p_.folds()) this->unfold_contexts();
    finish();
  }

 private:
  using Look = DecoderLook<Cell, T>;
  using Layer = typename Look::Layer;
  using Look::b0_, Look::gang_, Look::multiply, Look::n_, Look::own_, Look::p_, Look::panel_begin_, Look::panel_end_,
      Look::s_, Look::W, Look::weights_;
  static constexpr int kHSlot = Cell::kSlots - Cell::kGates;

  static void set_row(T* out, const T* in, int64_t n, int64_t ld) {
    __builtin_memset(out, 0, std::size_t(ld) * sizeof(T));
    if (in) __builtin_memcpy(out, in, std::size_t(n) * sizeof(T));
  }

  // h of a layer: of the step before, and of this one once `update` is done.
  T* before(int64_t l, int64_t i) const { return s_.h + ((l * 2 + now_) * n_ + i) * s_.ld_h; }
  T* after(int64_t l, int64_t i) const { return s_.h + ((l * 2 + 1 - now_) * n_ + i) * s_.ld_h; }

  void begin() {
    int64_t begin, end;
    gang_.share(n_, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = b0_ + i;
      for (int64_t l = 0; l < p_.layers; ++l) {
        set_row(before(l, i), p_.h0 ? p_.h0 + (l * p_.B + b) * p_.H : nullptr, p_.H, s_.ld_h);
        set_row(after(l, i), nullptr, 0, s_.ld_h);
        if constexpr (Cell::kHasCell) {
          set_row(s_.c + (l * n_ + i) * s_.ld_c, p_.c0 ? p_.c0 + (l * p_.B + b) * p_.H : nullptr, p_.H, s_.ld_c);
        }
      }
      set_row(s_.context + i * s_.ld_context, p_.context0 ? p_.context0 + b * p_.D : nullptr, p_.D, s_.ld_context);
      set_row(s_.attentional + i * s_.ld_attentional, p_.attentional0 ? p_.attentional0 + b * p_.M : nullptr, p_.M,
              s_.ld_attentional);
      if (p_.has_history()) begin_channels(p_, b, s_.channels + i * s_.ld_channels);
      if (p_.embedding) {
        s_.words[i] = p_.start[b];
        p_.word_count[b] = 0;
        p_.log_probs[b] = 0;
      }
    }
  }

  T* pre_panel(const Layer& layer, int64_t panel) const {
    return s_.pre + layer.panels.begin(panel) * W * Cell::kSlots * n_ * p_.chunk_steps;
  }

  // Pre-activations W_ih x + b of this thread's panels for the chunk of steps from t0.
  void project_inputs(int64_t t0) {
    const Layer layer = weights_.layer(0);
    const int64_t steps = p_.steps - t0 < p_.chunk_steps ? p_.steps - t0 : p_.chunk_steps;
    const bool rows_at_once = steps == 1 && !p_.embedding && p_.I > 0;  // the rows of a step, not the steps of a row
    for (int64_t p = panel_begin_; p < panel_end_; ++p) {
      const int64_t units = layer.panels.begin(p + 1) - layer.panels.begin(p), ld = Cell::kSlots * units * W;
      const T* bias = layer.bias_panel(p);
      for (int64_t i = 0; i < n_; ++i) {
        T* pre = pre_panel(layer, p) + i * p_.chunk_steps * ld;
        for (int64_t t = 0; t < steps; ++t) {
          for (int64_t j = 0; j < ld; j += W) store(pre + t * ld + j, load(bias + j));
        }
        if (p_.I == 0 || rows_at_once) continue;
        // A row that has ended goes on with any word.
        const T* x = p_.embedding ? p_.embedding + (s_.words[i] < 0 ? 0 : s_.words[i]) * p_.I
                                  : p_.input + ((b0_ + i) * p_.steps + t0) * p_.I;
        multiply(pre, ld, x, p_.I, layer.ih_panel(p), p_.width, p_.input_at, p_.I, steps, units);
      }
      if (!rows_at_once) continue;
      multiply(pre_panel(layer, p), p_.chunk_steps * ld, p_.input + (b0_ * p_.steps + t0) * p_.I, p_.steps * p_.I,
               layer.ih_panel(p), p_.width, p_.input_at, p_.I, n_, units);
    }
  }

  void update(int64_t l, int64_t t) {
    const Layer layer = weights_.layer(l);
    for (int64_t j = panel_begin_; j < panel_end_; ++j) {
      // Every other step walks the panels backwards: what the last step left in cache is met first.
      const int64_t p = t % 2 ? panel_end_ - 1 - (j - panel_begin_) : j;
      const int64_t first = layer.panels.begin(p), units = layer.panels.begin(p + 1) - first;
      const int64_t width = Cell::kSlots * units * W;
      T* pre = s_.above + first * W * Cell::kSlots * n_;
      int64_t ld = width;
      const T* ih = layer.ih_panel(p);
      if (l == 0) {
        pre = pre_panel(layer, p) + t % p_.chunk_steps * width;
        ld = p_.chunk_steps * width;
        if (p_.context_at >= 0) {
          if (p_.folds() && (t > 0 || p_.order == DecoderOrder::bahdanau)) {
            multiply(pre, ld, own_, s_.ld_rows, this->folded_panel(p), p_.S, 0, length_, n_, units);
          } else {
            multiply(pre, ld, s_.context, s_.ld_context, ih, p_.width, p_.context_at, p_.D, n_, units);
          }
        }
        if (p_.attentional_at >= 0) {
          multiply(pre, ld, s_.attentional, s_.ld_attentional, ih, p_.width, p_.attentional_at, p_.M, n_, units);
        }
      } else {
        for (int64_t i = 0; i < n_; ++i) {
          for (int64_t k = 0; k < width; k += W) store(pre + i * ld + k, load(layer.bias_panel(p) + k));
        }
        const int64_t depth = p_.layer_width(l);
        multiply(pre, ld, after(l - 1, 0), s_.ld_h, ih, depth, 0, p_.H, n_, units);
        if (depth > p_.H) multiply(pre, ld, s_.context, s_.ld_context, ih, depth, p_.H, p_.D, n_, units);
      }
      multiply(pre + kHSlot * units * W, ld, before(l, 0), s_.ld_h, layer.hh_panel(p), p_.H, 0, p_.H, n_, units);
      for (int64_t i = 0; i < n_; ++i) {
        for (int64_t v = 0; v < units; ++v) apply_cell(l, i, t, pre + i * ld + v * W, units * W, (first + v) * W);
      }
    }
    gang_.barrier();
  }

  void apply_cell(int64_t l, int64_t i, int64_t t, const T* pre, int64_t slot_stride, int64_t unit) {
    Vec<T> slots[Cell::kSlots], saved[Cell::kSaved + 1], h = load(before(l, i) + unit), c{}, h_new, c_new{};
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSlots; ++s) slots[s] = load(pre + s * slot_stride);
    T* cell = s_.c + (l * n_ + i) * s_.ld_c + unit;
    if constexpr (Cell::kHasCell) c = load(cell);
    Cell::template forward<Math<T>>(slots, h, c, &h_new, &c_new, saved);
    if constexpr (Cell::kHasCell) store(cell, c_new);
    store(after(l, i) + unit, h_new);
    store_partial(p_.hidden_of(l, b0_ + i, t) + unit, h_new, p_.H - unit);
    if (Cell::kSaved == 0 || !p_.reserve) return;
    T* reserve = p_.reserve + ((l * p_.B + b0_ + i) * p_.steps + t) * Cell::kSaved * s_.ld_c + unit;
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSaved; ++s) store(reserve + s * s_.ld_c, saved[s]);
  }

  // The attentional vector act(W [context; h] + b).
  void project_output(int64_t t) {
    for (int64_t g = output_begin_; g < output_end_; ++g) {
      const int64_t first = weights_.outputs.begin(g) * W, vectors = weights_.outputs.begin(g + 1) - first / W;
      const T* panel = weights_.output_group(g);
      T* out = s_.attentional + first;
      this->project(out, s_.ld_attentional, weights_.output_bias + first, vectors);
      multiply_panel(out, s_.ld_attentional, s_.context, s_.ld_context, panel + p_.output_context_at * vectors * W,
                     p_.D, n_, int(vectors), true);
      multiply_panel(out, s_.ld_attentional, after(p_.layers - 1, 0), s_.ld_h,
                     panel + p_.output_hidden_at * vectors * W, p_.H, n_, int(vectors), true);
      for (int64_t i = 0; i < n_; ++i) {
        T* kept = p_.attentional + ((b0_ + i) * p_.steps + t) * p_.M + first;
        for (int64_t v = 0; v < vectors; ++v) {
          Vec<T> x = load(out + i * s_.ld_attentional + v * W);
          if (p_.activation == Activation::tanh) x = tanh<T>(x);
          store(out + i * s_.ld_attentional + v * W, x);
          store_partial(kept + v * W, x, p_.M - first - v * W);
        }
      }
    }
    gang_.barrier();
  }

  // Takes the most probable words of step t; whether no row goes on.
  bool predict(int64_t t) {
    const T* output = p_.M ? s_.attentional : after(p_.layers - 1, 0);
    const int64_t K = p_.M ? p_.M : p_.H, ld = p_.M ? s_.ld_attentional : s_.ld_h, V = p_.vocabulary;
    int64_t begin, end;
    if (p_.w_predict) {
      gang_.share(vectors_of<T>(V), &begin, &end);
      for (int64_t v = begin * W; v < end * W && v < V; v += W) {
        const int64_t left = V - v < W ? V - v : W;
        const Vec<T> bias = p_.b_predict ? load_partial(p_.b_predict + v, left) : Vec<T>{};
        for (int64_t i = 0; i < n_; ++i) store(s_.logits + i * s_.ld_logits + v, bias);
        const DotProduct<T> product{output, ld, p_.w_predict + v * K, K};
        multiply_dots(s_.logits + v, s_.ld_logits, &product, 1, n_, left);
      }
      gang_.barrier();
      output = s_.logits;
    }
    gang_.share(n_, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      if (s_.words[i] >= 0) take_word(i, t, output + i * (p_.w_predict ? s_.ld_logits : ld));
    }
    gang_.barrier();
    bool done = true;
    for (int64_t i = 0; i < n_; ++i) done &= s_.words[i] < 0;
    return done;
  }

  void take_word(int64_t i, int64_t t, const T* logits) {
    const int64_t b = b0_ + i;
    T log_prob;
    const int64_t word = most_probable(logits, p_.vocabulary, &log_prob);
    if (!(log_prob <= 0)) __atomic_store_n(p_.not_a_number, 1, __ATOMIC_RELAXED);
    p_.log_probs[b] += log_prob;
    p_.words[b * p_.steps + t] = word;
    ++p_.word_count[b];
    s_.words[i] = word == p_.end ? -1 : word;
  }

  void finish() {
    if constexpr (Cell::kHasCell) {
      int64_t begin, end;
      gang_.share(n_, &begin, &end);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t l = 0; l < p_.layers; ++l) {
          __builtin_memcpy(p_.c_n + (l * p_.B + b0_ + i) * p_.H, s_.c + (l * n_ + i) * s_.ld_c,
                           std::size_t(p_.H) * sizeof(T));
        }
      }
    }
  }

  // Keys of the first row, which is the only one where values are folded.
  const int64_t length_ = attention_of(p_, b0_, 0, s_.query).length(0);
  int now_ = 0;
  int64_t output_begin_, output_end_;
};

// Runs body(tile, its scratch, the thread's scratch, team) for all tiles.
template <class T, class F>
void for_each_tile(const DecoderProblem<T>& p, Gang& gang, F&& body) {
  T* own = p.scratch + (p.split ? p.threads : 1) * p.tile_scratch + gang.rank * p.thread_scratch;
  if (!p.split) {
    for (int64_t tile = 0; tile < p.tiles(); ++tile) body(tile, p.scratch, own, gang);
    return;
  }
  for (int64_t tile = gang.rank; tile < p.tiles(); tile += gang.size) {
    Gang alone;
    body(tile, p.scratch + gang.rank * p.tile_scratch, own, alone);
  }
}

template <class Cell, class T>
void decoder_forward(const DecoderProblem<T>& p, Gang& gang) {
  if (!p.packed_given) {
    pack_decoder<Cell, T>(p, gang);
    gang.barrier();
  }
  for_each_tile(p, gang, [&](int64_t tile, T* shared, T* own, Gang& team) {
    DecoderForward<Cell, T>(p, tile, shared, own, team).run();
  });
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
