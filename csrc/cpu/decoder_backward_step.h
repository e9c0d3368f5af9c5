// One tile's way back through the decoder: the steps of a chunk, then what the tile alone gets of it. For
// decoder_backward.h alone.
#pragma once

namespace seqattn::SEQATTN_ISA {
namespace {

template <class Cell, class T>
class DecoderBackward : TileRows<Cell, T> {
 public:
  // team: the threads that work on this tile.
  DecoderBackward(const DecoderProblem<T>& problem, const BackwardWeights<Cell, T>& weights, int64_t tile, T* shared,
                  T* own, Gang& team)
      : TileRows<Cell, T>(problem, tile, shared),
        w_(weights),
        team_(team),
        own_(problem, own),
        history_(problem, weights, tile, shared, team_) {
    const Groups units(vectors_of<T>(p_.H));
    int64_t begin, end;
    team_.share(units.groups, &begin, &end);
    unit_begin_ = units.begin(begin) * W;
    unit_end_ = units.begin(end) * W;
  }

  void begin() {
    if (p_.has_history()) history_.begin();
    int64_t begin, end;
    team_.share(n_, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = b0_ + i;
      for (int64_t l = 0; l < p_.layers; ++l) {
        set_row(s_.dh + (l * n_ + i) * s_.ld_h, nullptr, 0, s_.ld_h);
        if constexpr (Cell::kHasCell) {
          set_row(s_.dc + (l * n_ + i) * s_.ld_c, p_.d_c_n ? p_.d_c_n + (l * p_.B + b) * p_.H : nullptr, p_.H, s_.ld_c);
        }
      }
      set_row(s_.fed_context + i * s_.ld_context, nullptr, 0, s_.ld_context);
      set_row(s_.fed_output + i * s_.ld_output, nullptr, 0, s_.ld_output);
    }
    // Products run over padded units: what no vector covers must not hold leftovers.
    const int64_t width = padded(p_.H), covered = vectors_of<T>(p_.H) * W;
    team_.share(covered < width ? p_.layers * n_ * p_.chunk_steps : 0, &begin, &end);
    for (int64_t r = begin; r < end; ++r) {
      for (int s = 0; s < Cell::kSlots; ++s) {
        set_row(s_.grad + r * s_.ld_grad + s * width + covered, nullptr, 0, width - covered);
      }
    }
  }

  // Goes back through steps [t0, t1) and leaves their gradients in scratch.
  void chunk(int64_t t0, int64_t t1) {
    t0_ = t0;
    steps_ = t1 - t0;
    team_.barrier();
    project_queries();
    team_.barrier();
    const bool sums_keys = p_.score == DecoderScore::additive && !p_.has_history();
    if (sums_keys) begin_keys();
    if (p_.has_history()) history_.begin_chunk(t0, t1);
    for (int64_t t = t1 - 1; t >= t0; --t) {
      gather_outputs(t);
      // Layers that updated after the look come before it.
      const int64_t looked = p_.order == DecoderOrder::bahdanau ? -1 : p_.query_layer();
      for (int64_t l = p_.layers - 1; l >= 0; --l) {
        if (l == looked) attention(t);
        cells(l, t);
      }
      if (looked < 0) attention(t);
    }
    team_.barrier();
    if (sums_keys) end_keys();
    source_gradients();
    if (p_.d_input) input_gradients();
  }

  void finish() {
    team_.barrier();
    if (p_.has_history()) history_.finish();
    int64_t begin, end;
    team_.share(n_, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = b0_ + i;
      for (int64_t l = 0; l < p_.layers; ++l) {
        copy(p_.d_h0, (l * p_.B + b) * p_.H, s_.dh + (l * n_ + i) * s_.ld_h, p_.H);
        if constexpr (Cell::kHasCell) copy(p_.d_c0, (l * p_.B + b) * p_.H, s_.dc + (l * n_ + i) * s_.ld_c, p_.H);
      }
      copy(p_.d_context0, b * p_.D, s_.fed_context + i * s_.ld_context, p_.D);
      copy(p_.d_attentional0, b * p_.M, s_.fed_output + i * s_.ld_output, p_.M);
    }
  }

 private:
  using Rows = TileRows<Cell, T>;
  using Rows::p_, Rows::s_, Rows::b0_, Rows::n_, Rows::t0_, Rows::steps_;
  using Rows::row, Rows::grad, Rows::state, Rows::set_row, Rows::copy;
  static constexpr int W = kLanes<T>;
  static constexpr int kHSlot = Cell::kSlots - Cell::kGates;

  // The queries of the chunk, for this thread's columns.
  void project_queries() {
    const int64_t lag = p_.order == DecoderOrder::bahdanau, top = p_.query_layer();
    const Groups groups(vectors_of<T>(p_.A));
    int64_t begin, end;
    team_.share(groups.groups, &begin, &end);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = groups.begin(g) * W, vectors = groups.begin(g + 1) - first / W;
      const int64_t left = p_.A - first < vectors * W ? p_.A - first : vectors * W;
      for (int64_t i = 0; i < n_; ++i) {
        T* out = s_.query + row(i, t0_) * s_.ld_query + first;
        for (int64_t t = 0; t < steps_; ++t) {
          T* at = out + t * s_.ld_query;
          if (!p_.w_query) {
            const T* h = state(top, i, t0_ + t - lag);
            set_row(at, h ? h + first : nullptr, left, vectors * W);
          } else {
            for (int64_t v = 0; v < vectors; ++v) store(at + v * W, load(w_.forward_query_bias + first + v * W));
          }
        }
        if (!p_.w_query) continue;
        // The first query of all comes from h0.
        const int64_t skip = t0_ - lag < 0 ? 1 : 0;
        const T* panel = w_.forward_query + first * p_.H;
        if (skip && p_.h0) {
          multiply_panel(out, s_.ld_query, state(top, i, -1), p_.H, panel, p_.H, 1, int(vectors), true);
        }
        if (steps_ > skip) {
          multiply_panel(out + skip * s_.ld_query, s_.ld_query, state(top, i, t0_ + skip - lag), p_.H, panel, p_.H,
                         steps_ - skip, int(vectors), true);
        }
      }
    }
  }

  // Queries and keys of this thread's column blocks in the form their size allows, as in `backward` of attention.
  void begin_keys() {
    for_each_column([&](int64_t i, int64_t a, int64_t item) {
      const int64_t length = p_.attention.length(b0_ + i), left = p_.A - a;
      T *q = s_.q + item * p_.chunk_steps * W, *k = s_.k + item * p_.S * W, *dk = s_.dk + item * p_.S * W;
      Vec<T> kmax{}, qmax{};
      for (int64_t s = 0; s < length; ++s) {
        const Vec<T> x = load_partial(p_.attention.keys + ((b0_ + i) * p_.S + s) * p_.A + a, left);
        kmax = larger<T>(kmax, x);
        store(k + s * W, x);
        store(dk + s * W, Vec<T>{});
      }
      for (int64_t t = 0; t < steps_; ++t) {
        const Vec<T> x = load_partial(s_.query + row(i, t0_ + t) * s_.ld_query + a, left);
        qmax = larger<T>(qmax, x);
        store(q + t * W, x);
      }
      store(s_.dv + item * W, Vec<T>{});
      const T bound = T(Additive::kSmall);
      Slope slope = Slope::plain;
      if (all_at_most<T>(qmax, bound) && all_at_most<T>(kmax, bound)) {
        slope = Slope::small;
        for (int64_t s = 0; s < length; ++s) store(k + s * W, tanh<T>(load(k + s * W)));
        for (int64_t t = 0; t < steps_; ++t) store(q + t * W, tanh<T>(load(q + t * W)));
      } else if (all_at_most<T>(kmax, Additive::kLargestKey<T>)) {
        slope = Slope::exponential;
        for (int64_t s = 0; s < length; ++s) store(k + s * W, exp<T>(T(2) * load(k + s * W)));
        for (int64_t t = 0; t < steps_; ++t) store(q + t * W, exp<T>(T(2) * load(q + t * W)));
      }
      s_.slope[item] = int8_t(slope);
    });
  }

  // Calls body(batch row, first column, number of the column block) for this thread's column blocks of the tile.
  template <class F>
  void for_each_column(F&& body) const {
    int64_t begin, end;
    team_.share(n_ * s_.columns, &begin, &end);
    for (int64_t item = begin; item < end; ++item) body(item / s_.columns, item % s_.columns * W, item);
  }

  // Gradients of the context and of h, as far as they come from outside and from the output projection.
  void gather_outputs(int64_t t) {
    if (p_.M) {
      const Groups groups(vectors_of<T>(p_.M));
      int64_t begin, end;
      team_.share(groups.groups, &begin, &end);
      for (int64_t i = 0; i < n_; ++i) {
        for (int64_t m = groups.begin(begin) * W; m < groups.begin(end) * W; m += W) {
          const int64_t left = p_.M - m;
          Vec<T> d = load(s_.fed_output + i * s_.ld_output + m);
          const int64_t at = ((b0_ + i) * p_.steps + t) * p_.M + m;
          if (p_.d_attentional) d += load_partial(p_.d_attentional + at, left);
          const Vec<T> x = load_partial(p_.attentional + at, left);
          if (p_.activation == Activation::tanh) d = d - d * x * x;
          store(s_.d_output + row(i, t) * s_.ld_output + m, d);
        }
      }
      team_.barrier();
    }
    const Groups groups(vectors_of<T>(p_.D));
    int64_t begin, end;
    team_.share(groups.groups, &begin, &end);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t c = groups.begin(begin) * W; c < groups.begin(end) * W; c += W) {
        Vec<T> d{};
        if (p_.order != DecoderOrder::bahdanau) d = load(s_.fed_context + i * s_.ld_context + c);
        if (p_.d_contexts) d += load_partial(p_.d_contexts + ((b0_ + i) * p_.steps + t) * p_.D + c, p_.D - c);
        store(s_.d_context + row(i, t) * s_.ld_context + c, d);
      }
    }
    if (!p_.M) return;
    const T* d = s_.d_output + row(0, t) * s_.ld_output;
    const int64_t ld = steps_ * s_.ld_output;
    w_.output_context.multiply(s_.d_context + row(0, t) * s_.ld_context, steps_ * s_.ld_context, d, ld, n_, true,
                               team_);
    w_.output_hidden.multiply(s_.dh + (p_.layers - 1) * n_ * s_.ld_h, s_.ld_h, d, ld, n_, true, team_);
  }

  void cells(int64_t l, int64_t t) {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t unit = unit_begin_; unit < unit_end_; unit += W) cell_gradients(l, i, t, unit);
    }
    team_.barrier();
    const T *x = grad(l, 0, t), *h = x + kHSlot * padded(p_.H);
    const int64_t ld = steps_ * s_.ld_grad;
    if (t > 0 || p_.d_h0) {
      w_.layers[l].hh.multiply(s_.dh + l * n_ * s_.ld_h, s_.ld_h, h, ld, n_, true, team_);
    }
    T* d_context = s_.d_context + row(0, t) * s_.ld_context;
    if (l) w_.layers[l].below.multiply(s_.dh + (l - 1) * n_ * s_.ld_h, s_.ld_h, x, ld, n_, true, team_);
    if (l == 1 && p_.second_context) {
      w_.second_context.multiply(d_context, steps_ * s_.ld_context, x, ld, n_, true, team_);
    }
    if (l) return;
    if (p_.context_at >= 0) {
      if (p_.order == DecoderOrder::bahdanau) {
        w_.context.multiply(d_context, steps_ * s_.ld_context, x, ld, n_, true, team_);
      } else {
        w_.context.multiply(s_.fed_context, s_.ld_context, x, ld, n_, false, team_);
      }
    }
    if (p_.attentional_at >= 0) w_.attentional.multiply(s_.fed_output, s_.ld_output, x, ld, n_, false, team_);
  }

  void cell_gradients(int64_t l, int64_t i, int64_t t, int64_t unit) {
    const int64_t left = p_.H - unit, width = s_.ld_c, b = b0_ + i;
    Vec<T> saved[Cell::kSaved + 1], h{}, c{}, dc{}, d_pre[Cell::kSlots], dh_old{}, dc_old{};
    const T* kept = p_.reserve + ((l * p_.B + b) * p_.steps + t) * Cell::kSaved * width + unit;
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSaved; ++s) saved[s] = load(kept + s * width);
    T* dc_row = s_.dc + (l * n_ + i) * s_.ld_c + unit;
    if constexpr (Cell::kHasCell) {
      if (t > 0) {
        c = load(kept - width);  // the last value kept of the step before
      } else if (p_.c0) {
        c = load_partial(p_.c0 + (l * p_.B + b) * p_.H + unit, left);
      }
      dc = load(dc_row);
    }
    if (const T* before = state(l, i, t - 1)) h = load_partial(before + unit, left);
    const Vec<T> h_new = load_partial(state(l, i, t) + unit, left);
    T* dh_row = s_.dh + (l * n_ + i) * s_.ld_h + unit;
    Vec<T> dh = load(dh_row);
    if (p_.d_hidden) dh += load_partial(p_.d_hidden + ((l * p_.B + b) * p_.steps + t) * p_.H + unit, left);
    Cell::template backward<Math<T>>(saved, h, c, h_new, dh, dc, d_pre, &dh_old, &dc_old);
    T* out = grad(l, i, t) + unit;
#pragma GCC unroll 8
    for (int s = 0; s < Cell::kSlots; ++s) {
      store(out + s * width, Vec<T>{});
      store_partial(out + s * width, d_pre[s], left);
    }
    if constexpr (Cell::kHasCell) store(dc_row, dc_old);
    store(dh_row, dh_old);
  }

  // From the gradient of the context to that of h that asked for it; keys' gradients are added up.
  void attention(int64_t t) {
    team_.barrier();
    weight_scores(t);
    team_.barrier();
    score_gradients(t);
    team_.barrier();
    if (p_.has_history()) {
      for_each_block([&](int64_t i, int64_t s, int64_t rows) { history_.feature_gradients(i, s, rows); });
      team_.barrier();
      history_.channel_gradients(t);
    }
    T* dh = s_.dh + p_.query_layer() * n_ * s_.ld_h;
    const T* d = s_.d_query + row(0, t) * s_.ld_query;
    if (p_.w_query) {
      w_.query.multiply(dh, s_.ld_h, d, steps_ * s_.ld_query, n_, true, team_);
      return;
    }
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t unit = unit_begin_; unit < unit_end_; unit += W) {
        T* out = dh + i * s_.ld_h + unit;
        store(out, load(out) + load_partial(d + i * steps_ * s_.ld_query + unit, p_.H - unit));
      }
    }
  }

  // Calls body(batch row, first key, number of keys) for this thread's blocks of keys that may be attended to.
  template <class F>
  void for_each_block(F&& body) const {
    const int64_t blocks = p_.attention.blocks();
    int64_t begin, end;
    team_.share(n_ * blocks, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / blocks, first = item % blocks * kKeyBlock;
      const int64_t left = p_.attention.length(b0_ + i) - first;
      if (left > 0) body(i, first, left < kKeyBlock ? left : kKeyBlock);
    }
  }

  // Gradients of the weights: values times the context's gradient, and what comes from outside and later steps.
  void weight_scores(int64_t t) {
    for_each_block([&](int64_t i, int64_t first, int64_t count) {
      const int64_t b = b0_ + i, end = first + count;
      const T* d = s_.d_context + row(i, t) * s_.ld_context;
      T* out = s_.d_weights + i * s_.ld_source;
      if (p_.has_history()) history_.features(i, t, first, count);
      for (int64_t s = first; s < end; s += W) {
        Vec<T> sum{};
        if (p_.d_weights) sum = load_partial(p_.d_weights + (b * p_.steps + t) * p_.S + s, end - s);
        if (p_.has_history() && p_.history_gradient) sum += history_.passed(i, t, s, end - s);
        store(out + s, sum);
        const DotProduct<T> product{d, p_.D, p_.attention.values + (b * p_.S + s) * p_.D, p_.D};
        multiply_dots(out + s, W, &product, 1, 1, end - s < W ? end - s : W);
      }
    });
  }

  // d_scores = w * (d_w - sum(w * d_w)) of batch row i, into this thread's row.
  void softmax_gradient(int64_t i, int64_t t, int64_t length) {
    const T* w = p_.attention.weights + ((b0_ + i) * p_.steps + t) * p_.S;
    const T* dw = s_.d_weights + i * s_.ld_source;
    Vec<T> sums{};
    for (int64_t s = 0; s < length; s += W) sums += load_partial(w + s, length - s) * load_partial(dw + s, length - s);
    const Vec<T> sum = sum_all<T>(sums);
    for (int64_t s = 0; s < length; s += W) {
      store(own_.scores + s, load_partial(w + s, length - s) * (load_partial(dw + s, length - s) - sum));
    }
  }

  void score_gradients(int64_t t) {
    if (p_.score == DecoderScore::dot) return dot_gradients(t);
    int64_t ready = -1;
    for_each_column([&](int64_t i, int64_t a, int64_t item) {
      const int64_t length = p_.attention.length(b0_ + i);
      T* out = s_.d_query + row(i, t) * s_.ld_query + a;
      if (ready != i) softmax_gradient(i, t, length);
      ready = i;
      if (p_.has_history()) {
        store(out, history_.column(i, a, length, s_.query + row(i, t) * s_.ld_query + a, own_.scores));
        return;
      }
      T dq[W] = {};
      Columns<T> c{s_.q + (item * p_.chunk_steps + t - t0_) * W, s_.k + item * p_.S * W, dq, s_.dk + item * p_.S * W,
                   load(s_.dv + item * W)};
      const Slope slope = Slope(s_.slope[item]);
      if (slope == Slope::small) {
        all_slopes<T, Slope::small>(own_.scores, 1, p_.S, length, c);
      } else if (slope == Slope::exponential) {
        all_slopes<T, Slope::exponential>(own_.scores, 1, p_.S, length, c);
      } else {
        all_slopes<T, Slope::plain>(own_.scores, 1, p_.S, length, c);
      }
      store(s_.dv + item * W, c.dv);
      store(out, factor(a, slope) * load(dq));
    });
  }

  void dot_gradients(int64_t t) {
    int64_t item, end;
    team_.share(n_ * s_.columns, &item, &end);
    while (item < end) {
      const int64_t i = item / s_.columns, first = item % s_.columns, b = b0_ + i, length = p_.attention.length(b);
      const int64_t stop = s_.columns - first < end - item ? s_.columns : first + end - item;
      const int64_t a = first * W, width = (stop * W < p_.A ? stop * W : p_.A) - a;
      item += stop - first;
      softmax_gradient(i, t, length);
      for (int64_t s = 0; s < length; s += W) store(own_.scores + s, load(own_.scores + s) * p_.scale);
      if (first == 0) copy(s_.d_scores, row(i, t) * s_.ld_source, own_.scores, length);
      context_rows<T, 1, false>(own_.scores, p_.S, p_.attention.keys + b * p_.S * p_.A + a, p_.A, nullptr, length,
                                s_.d_query + row(i, t) * s_.ld_query + a, width);
    }
  }

  Vec<T> factor(int64_t a, Slope slope) const {
    const Vec<T> v = load_partial(p_.attention.v + a, p_.A - a);
    return slope == Slope::small ? v : T(4) * v;
  }

  void end_keys() {
    for_each_column([&](int64_t i, int64_t a, int64_t item) {
      const int64_t b = b0_ + i, length = p_.attention.length(b), left = p_.A - a;
      const Slope slope = Slope(s_.slope[item]);
      const Vec<T> v = factor(a, slope);
      const T* dk = s_.dk + item * p_.S * W;
      for (int64_t s = 0; s < length; ++s) {
        T* out = p_.d_keys + (b * p_.S + s) * p_.A + a;
        store_partial(out, load_partial(out, left) + v * load(dk + s * W), left);
      }
      const Vec<T> dv = load(s_.dv + item * W);
      T* out = p_.d_v + b * p_.A + a;
      store_partial(out, load_partial(out, left) + (slope == Slope::small ? dv : T(-2) * dv), left);
    });
  }

  // Gradients of values, and of the keys of dot scores.
  void source_gradients() {
    int64_t begin, end;
    team_.share(n_, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = b0_ + i, length = p_.attention.length(b);
      transpose_source(p_.attention.weights + (b * p_.steps + t0_) * p_.S, p_.S, length);
      add_source(p_.d_values + b * p_.S * p_.D, p_.D, s_.d_context + row(i, t0_) * s_.ld_context, s_.ld_context,
                 length);
      if (p_.score != DecoderScore::dot) continue;
      transpose_source(s_.d_scores + row(i, t0_) * s_.ld_source, s_.ld_source, length);
      add_source(p_.d_keys + b * p_.S * p_.A, p_.A, s_.query + row(i, t0_) * s_.ld_query, s_.ld_query, length);
    }
  }

  void transpose_source(const T* rows, int64_t ld, int64_t length) {
    for (int64_t t = 0; t < steps_; t += W) {
      transpose_strip(own_.transposed + t, own_.ld_t, rows + t * ld, ld, steps_ - t < W ? steps_ - t : W, length);
    }
  }

  // out[s][N] += the transposed rows [s][step] times d[step][N].
  void add_source(T* out, int64_t N, const T* d, int64_t ld, int64_t length) {
    const Groups groups(vectors_of<T>(N));
    for (int64_t g = 0; length && g < groups.groups; ++g) {
      const int64_t first = groups.begin(g), vectors = groups.begin(g + 1) - first;
      multiply_within(out, N, N, own_.transposed, own_.ld_t, d + first * W, ld, steps_, length, first * W, vectors,
                      true, own_.product);
    }
  }

  void input_gradients() {
    const Groups& groups = w_.input.groups;
    int64_t begin, end;
    team_.share(n_ * groups.groups, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / groups.groups, g = item % groups.groups;
      const int64_t first = groups.begin(g), vectors = groups.begin(g + 1) - first;
      multiply_within(p_.d_input + ((b0_ + i) * p_.steps + t0_) * p_.I, p_.I, p_.I, grad(0, i, t0_), s_.ld_grad,
                      w_.input.data + first * W * w_.input.K, vectors * W, w_.input.K, steps_, first * W, vectors,
                      false, own_.product);
    }
  }

  const BackwardWeights<Cell, T>& w_;
  Gang& team_;
  const BackwardThread<T> own_;
  HistoryBackward<Cell, T> history_;
  int64_t unit_begin_, unit_end_;
};

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
