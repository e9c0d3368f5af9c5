// Forward pass of the attentional decoder. For decoder_kernels.cpp alone.
#pragma once

#include "attention_context.h"
#include "attention_scores.h"
#include "decoder_weights.h"
#include "decoder_words.h"
#include "gemm_pair.h"

namespace seqattn::SEQATTN_ISA {
namespace {

template <class T>
SEQATTN_INLINE int64_t owner(const DecoderProblem<T>& p, int64_t b) {
  return p.owners ? p.owners[b] : b;
}

// What one row of the batch attends to, at step t, as an attention problem of its own.
template <class T>
AttentionArgs<T> attention_of(const DecoderProblem<T>& p, int64_t b, int64_t t, const T* query) {
  AttentionArgs<T> args = p.attention;
  const int64_t own = owner(p, b);
  args.B = args.T_ = 1;
  args.query = query;
  args.keys += own * p.S * p.A;
  if (args.packed) args.packed += own * args.blocks() * packed_block(p.A);
  args.values += own * p.S * p.D;
  if (args.lengths) args.lengths += own;
  if (args.mask_bool) args.mask_bool += own * args.mask_b;
  args.context += (b * p.steps + t) * p.D;
  args.weights += (b * p.steps + t) * p.S;
  return args;
}

// scale * q . k of keys [j0, j1) in blocks of 16.
template <class T>
void dot_scores(const AttentionArgs<T>& args, T scale, int64_t j0, int64_t j1, T* out) {
  constexpr int W = kLanes<T>;
  const int64_t length = args.length(0);
  for (int64_t s = j0 * kKeyBlock; s < j1 * kKeyBlock; s += W) {
    store(out + s, Vec<T>{});
    if (s >= length) continue;
    const DotProduct<T> product{args.query, args.A, args.keys + s * args.A, args.A};
    multiply_dots(out + s, W, &product, 1, 1, length - s < W ? length - s : W);
    store(out + s, load(out + s) * scale);
  }
}

template <class Cell, class T>
struct ForwardTile {
  T *pre, *above, *h, *c, *context, *attentional, *query, *rows, *logits, *end;
  int64_t* words;  // the newest of each row, -1 where it has ended
  int64_t ld_logits;
  T* channels;  // [row][C][channel_stride] of earlier weights
  int64_t ld_h, ld_c, ld_context, ld_attentional, ld_query, ld_rows, ld_channels;

  // Pre-activations of the first layer for a chunk of steps [panel][row][step][slot][units], of one above it for one
  // step; h [layer][2][row], c [layer][row], the last context and attentional vector, the query, the scores.
  ForwardTile(const DecoderProblem<T>& p, T* data) {
    const int64_t n = kDecoderRows < p.B ? kDecoderRows : p.B, slots = Cell::kSlots * padded(p.H);
    ld_h = row_stride(p.H);
    ld_c = padded(p.H);
    ld_context = row_stride(p.D);
    ld_attentional = row_stride(p.M);
    ld_query = row_stride(p.A);
    ld_rows = round_up(p.S, kKeyBlock) + kKeyBlock;
    T* at = data;
    auto take = [&](int64_t values) {
      T* start = at;
      at += padded(values);
      return start;
    };
    pre = take(n * p.chunk_steps * slots);
    above = take(p.layers > 1 ? n * slots : 0);
    h = take(p.layers * 2 * n * ld_h);
    c = take(Cell::kHasCell ? p.layers * n * ld_c : 0);
    context = take(n * ld_context);
    attentional = take(n * ld_attentional);
    query = take(n * ld_query);
    rows = take(n * ld_rows);
    ld_logits = row_stride(p.vocabulary);
    ld_channels = p.C * channel_stride(p);
    channels = take(n * ld_channels);
    logits = take(p.embedding ? n * ld_logits : 0);
    words = reinterpret_cast<int64_t*>(take(n * int64_t(sizeof(int64_t) / sizeof(T))));
    end = at;
  }
};

template <class Cell, class T>
void decoder_forward_scratch(DecoderProblem<T>* p) {
  p->tile_scratch = ForwardTile<Cell, T>(*p, nullptr).end - static_cast<T*>(nullptr);
  p->thread_scratch = forward_scratch(p->attention);
  // A row of scores, then the features of a block of keys.
  const int64_t features = round_up(p->S, kKeyBlock) + kKeyBlock + kKeyBlock * padded(p->F);
  if (p->has_history() && p->thread_scratch < features) p->thread_scratch = features;
}

template <class Cell, class T>
class DecoderForward {
 public:
  DecoderForward(const DecoderProblem<T>& problem, int64_t tile, T* shared, T* own, Gang& gang)
      : p_(problem),
        weights_(problem, problem.packed),
        gang_(gang),
        s_(problem, shared),
        b0_(problem.tile_begin(tile)),
        n_(problem.tile_begin(tile + 1) - b0_),
        own_(own) {
    const Groups& panels = weights_.layer(0).panels;
    gang_.share(panels.groups, &panel_begin_, &panel_end_);
    gang_.share(weights_.queries.groups, &query_begin_, &query_end_);
    gang_.share(weights_.outputs.groups, &output_begin_, &output_end_);
  }

  void run() {
    gang_.barrier();  // weights are packed, and the tile before is done
    begin();
    gang_.barrier();
    for (int64_t t = 0; t < p_.steps; ++t) {
      if (t % p_.chunk_steps == 0) project_inputs(t);
      if (p_.order == DecoderOrder::bahdanau) attend(t, before(p_.layers - 1, 0));
      for (int64_t l = 0; l < p_.layers; ++l) {
        update(l, t);
        if (p_.order != DecoderOrder::bahdanau && l == p_.query_layer()) attend(t, after(l, 0));
      }
      if (p_.M) project_output(t);
      if (p_.embedding && predict(t)) break;
      now_ = 1 - now_;
    }
    finish();
  }

 private:
  using Layer = PackedWeights<Cell, T>;
  static constexpr int W = kLanes<T>;
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

  // pre[row][slot][units] += a[row][K] times the rows [k0, k0 + K) of a panel of `depth` rows.
  static void multiply(T* pre, int64_t ld, const T* a, int64_t lda, const T* panel, int64_t depth, int64_t k0,
                       int64_t K, int64_t rows, int64_t units) {
    constexpr int kPart = Layer::kPart;
    if constexpr (kPairs && Cell::kGates == 2 * kPart && kPart == 2) {
      if (rows == 1) {  // and one vector of units
        const T* first = panel + kPart * k0 * W;
        multiply_pair(pre, pre + kPart * W, a, first, first + kPart * depth * W, K);
        return;
      }
    }
    for (int gate = 0; gate < Cell::kGates; gate += kPart) {
      multiply_panel(pre + gate * units * W, ld, a, lda, panel + (gate * depth + kPart * k0) * units * W, K, rows,
                     int(kPart * units), true);
    }
  }

  // Pre-activations W_ih x + b of this thread's panels for the chunk of steps from t0.
  void project_inputs(int64_t t0) {
    const Layer layer = weights_.layer(0);
    const int64_t steps = p_.steps - t0 < p_.chunk_steps ? p_.steps - t0 : p_.chunk_steps;
    for (int64_t p = panel_begin_; p < panel_end_; ++p) {
      const int64_t units = layer.panels.begin(p + 1) - layer.panels.begin(p), ld = Cell::kSlots * units * W;
      const T* bias = layer.bias_panel(p);
      for (int64_t i = 0; i < n_; ++i) {
        T* pre = pre_panel(layer, p) + i * p_.chunk_steps * ld;
        for (int64_t t = 0; t < steps; ++t) {
          for (int64_t j = 0; j < ld; j += W) store(pre + t * ld + j, load(bias + j));
        }
        if (p_.I == 0) continue;
        // A row that has ended goes on with any word.
        const T* x = p_.embedding ? p_.embedding + (s_.words[i] < 0 ? 0 : s_.words[i]) * p_.I
                                  : p_.input + ((b0_ + i) * p_.steps + t0) * p_.I;
        multiply(pre, ld, x, p_.I, layer.ih_panel(p), p_.width, p_.input_at, p_.I, steps, units);
      }
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
          multiply(pre, ld, s_.context, s_.ld_context, ih, p_.width, p_.context_at, p_.D, n_, units);
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

  // Looks with these h.
  void attend(int64_t t, const T* query) {
    int64_t ld = s_.ld_h;
    if (p_.w_query) {
      for (int64_t g = query_begin_; g < query_end_; ++g) {
        const int64_t first = weights_.queries.begin(g) * W, vectors = weights_.queries.begin(g + 1) - first / W;
        project(s_.query + first, s_.ld_query, weights_.query_bias + first, vectors);
        multiply_panel(s_.query + first, s_.ld_query, query, ld, weights_.query_group(g), p_.H, n_, int(vectors), true);
      }
      query = s_.query;
      ld = s_.ld_query;
      gang_.barrier();
    }
    scores(t, query, ld);
    gang_.barrier();
    contexts(t);
    gang_.barrier();
  }

  void project(T* out, int64_t ld, const T* bias, int64_t vectors) const {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t v = 0; v < vectors; ++v) store(out + i * ld + v * W, load(bias + v * W));
    }
  }

  void scores(int64_t t, const T* query, int64_t ld) {
    const int64_t blocks = p_.attention.blocks();
    int64_t begin, end;
    gang_.share(n_ * blocks, &begin, &end);
    while (begin < end) {
      const int64_t i = begin / blocks, j0 = begin % blocks;
      const int64_t j1 = blocks - j0 < end - begin ? blocks : j0 + end - begin;
      begin += j1 - j0;
      const AttentionArgs<T> args = attention_of(p_, b0_ + i, t, query + i * ld);
      const int64_t last = ceil_div(args.length(0), kKeyBlock), stop = j1 < last ? j1 : last;
      if (j0 >= stop) continue;
      T* out = s_.rows + i * s_.ld_rows;
      if (p_.has_history()) {
        location_scores(args, s_.channels + i * s_.ld_channels, j0, stop, out);
      } else if (p_.score == DecoderScore::dot) {
        dot_scores(args, p_.scale, j0, stop, out);
      } else {
        T* block = own_ + s_.ld_rows;
        const TileQueries<T> queries = prepare_queries(args, 0, 0, 1, block + packed_block(p_.A));
        score_blocks(args, queries, 0, 1, j0, stop, out, s_.ld_rows, block);
      }
    }
  }

  // Scores of the keys of blocks [j0, j1), which know of earlier weights.
  void location_scores(const AttentionArgs<T>& args, const T* channels, int64_t j0, int64_t j1, T* out) {
    const FeatureTerm<T> term = weights_.history.term(p_);
    T* features = own_ + s_.ld_rows;
    const int64_t length = args.length(0), ld = term.ld_features;
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t first = j * kKeyBlock, count = length - first < kKeyBlock ? length - first : kKeyBlock;
      location_features(p_, weights_.history, channels, first, count, features);
      int64_t s = 0;
      for (; s + kRows<T> <= count; s += kRows<T>) {
        score_keys<T, kRows<T>>(term, args.query, args.v, args.keys + (first + s) * p_.A, features + s * ld,
                                out + first + s);
      }
      for (; s < count; ++s) {
        score_keys<T, 1>(term, args.query, args.v, args.keys + (first + s) * p_.A, features + s * ld, out + first + s);
      }
    }
  }

  // Softmax of the scores and the context they give; a row's columns may be shared, its softmax then is done by each.
  void contexts(int64_t t) {
    const int64_t chunks = gang_.size / common_divisor(n_, gang_.size);
    const int64_t width = round_up(ceil_div(p_.D, chunks), kKeyBlock);
    auto* list = reinterpret_cast<int32_t*>(own_ + s_.ld_rows);
    int64_t begin, end, ready = -1;
    gang_.share(n_ * chunks, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / chunks, d0 = item % chunks * width, d1 = d0 + width < p_.D ? d0 + width : p_.D;
      AttentionArgs<T> args = attention_of(p_, b0_ + i, t, s_.query);
      if (ready != i) {
        __builtin_memcpy(own_, s_.rows + i * s_.ld_rows, std::size_t(s_.ld_rows) * sizeof(T));
        if (item % chunks) args.weights = nullptr;
        softmax_row(args, 0, 0, own_);
        if (p_.has_history() && item % chunks == 0) {
          const T* fertility = p_.fertility ? p_.fertility + owner(p_, b0_ + i) * p_.S : nullptr;
          extend_channels(p_, args.weights, fertility, s_.channels + i * s_.ld_channels);
        }
        ready = i;
      }
      if (d0 >= d1) continue;
      context_tile(args, 0, 0, 1, own_, s_.ld_rows, d0, d1, list);
      __builtin_memcpy(s_.context + i * s_.ld_context + d0, args.context + d0, std::size_t(d1 - d0) * sizeof(T));
    }
  }

  static int64_t common_divisor(int64_t a, int64_t b) {
    while (b) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }

  // The attentional vector act(W [context; h] + b).
  void project_output(int64_t t) {
    for (int64_t g = output_begin_; g < output_end_; ++g) {
      const int64_t first = weights_.outputs.begin(g) * W, vectors = weights_.outputs.begin(g + 1) - first / W;
      const T* panel = weights_.output_group(g);
      T* out = s_.attentional + first;
      project(out, s_.ld_attentional, weights_.output_bias + first, vectors);
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

  const DecoderProblem<T>& p_;
  const DecoderWeights<Cell, T> weights_;
  Gang& gang_;
  const ForwardTile<Cell, T> s_;
  const int64_t b0_, n_;
  T* own_;  // this thread's: a row of scores, then what scores and context need
  int now_ = 0;
  int64_t panel_begin_, panel_end_, query_begin_, query_end_, output_begin_, output_end_;
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
