// Weight gradients of a chunk of a tile's steps. For decoder_backward.h alone.
#pragma once

namespace seqattn::SEQATTN_ISA {
namespace {

template <class Cell, class T>
class DecoderWeightGradients : TileRows<Cell, T> {
 public:
  DecoderWeightGradients(const DecoderProblem<T>& problem, const BackwardWeights<Cell, T>& weights, int64_t tile,
                         T* shared, T* own)
      : TileRows<Cell, T>(problem, tile, shared), w_(weights), own_(problem, own) {}

  // Adds the chunk's part to the weight gradients of this thread's rows, as one of the gang that all tiles share.
  void add(int64_t t0, int64_t t1, const Gang& gang) {
    t0_ = t0;
    steps_ = t1 - t0;
    constexpr int kHSlot = Cell::kSlots - Cell::kGates;
    const int64_t width = padded(p_.H), rows = n_ * steps_;
    const int64_t top = p_.layers - 1, asking = p_.query_layer();
    for (int64_t l = 0; l < p_.layers; ++l) {
      int64_t begin, end;
      share_vectors(p_.H, gang, &begin, &end);
      if (begin == end) continue;
      const T* grad = s_.grad + l * n_ * p_.chunk_steps * s_.ld_grad;
      LayerWeights<T>& d = p_.d_layers[l];
      for (int s = 0; s < Cell::kSlots; ++s) {
        const int64_t row = s * width + begin;
        transpose(grad + row, s_.ld_grad, rows, end - begin, w_.gates + row * w_.ld_t);
        T* b_ih = d.b_ih && s < Cell::kGates ? const_cast<T*>(d.b_ih) + Cell::x_gate(s) * p_.H + begin : nullptr;
        T* b_hh = d.b_hh && s >= kHSlot ? const_cast<T*>(d.b_hh) + Cell::h_gate(s) * p_.H + begin : nullptr;
        add_sums(w_.gates + row * w_.ld_t, rows, end - begin, b_ih, b_hh);
      }
      const auto gates = [&](const T* dw, int64_t ld, int64_t column, int64_t N, int first, int (*gate_of)(int),
                             auto&& row_at) {
        add_product(N, row_at, [&](int64_t at, int64_t vectors) {
          for (int s = first; s < first + Cell::kGates; ++s) {
            for_each_block(p_.H, begin, end, [&](int64_t unit, int64_t count) {
              multiply_within(const_cast<T*>(dw) + (gate_of(s) * p_.H + unit) * ld + column, ld, N,
                              w_.gates + (s * width + unit) * w_.ld_t, w_.ld_t, own_.panel, vectors * W, rows, count,
                              at, vectors, true, own_.product);
            });
          }
        });
      };
      gates(d.w_hh, p_.H, 0, p_.H, kHSlot, &Cell::h_gate, [&](int64_t i, int64_t t) { return state(l, i, t - 1); });
      if (l) {
        const int64_t ld = p_.layer_width(l);
        gates(d.w_ih, ld, 0, p_.H, 0, &Cell::x_gate, [&](int64_t i, int64_t t) { return state(l - 1, i, t); });
        if (ld > p_.H) {
          gates(d.w_ih, ld, p_.H, p_.D, 0, &Cell::x_gate, [&](int64_t i, int64_t t) { return context(i, t); });
        }
        continue;
      }
      gates(d.w_ih, p_.width, p_.input_at, p_.I, 0, &Cell::x_gate,
            [&](int64_t i, int64_t t) { return p_.input + ((b0_ + i) * p_.steps + t) * p_.I; });
      if (p_.context_at >= 0) {
        const int64_t lag = p_.order != DecoderOrder::bahdanau;
        gates(d.w_ih, p_.width, p_.context_at, p_.D, 0, &Cell::x_gate,
              [&](int64_t i, int64_t t) { return context(i, t - lag); });
      }
      if (p_.attentional_at >= 0) {
        gates(d.w_ih, p_.width, p_.attentional_at, p_.M, 0, &Cell::x_gate,
              [&](int64_t i, int64_t t) { return attentional(i, t - 1); });
      }
    }
    if (p_.w_query) {
      const int64_t lag = p_.order == DecoderOrder::bahdanau;
      projection(w_.queries, s_.d_query, s_.ld_query, p_.A, p_.d_w_query, p_.H, 0, p_.H, p_.d_b_query, gang,
                 [&](int64_t i, int64_t t) { return state(asking, i, t - lag); });
    }
    if (p_.M) {
      const int64_t ld = p_.D + p_.H;
      projection(w_.outputs, s_.d_output, s_.ld_output, p_.M, p_.d_w_output, ld, p_.output_context_at, p_.D,
                 p_.d_b_output, gang, [&](int64_t i, int64_t t) { return context(i, t); });
      projection(w_.outputs, s_.d_output, s_.ld_output, p_.M, p_.d_w_output, ld, p_.output_hidden_at, p_.H, nullptr,
                 gang, [&](int64_t i, int64_t t) { return state(top, i, t); });
    }
  }

 private:
  using Rows = TileRows<Cell, T>;
  using Rows::p_, Rows::s_, Rows::b0_, Rows::n_, Rows::t0_, Rows::steps_;
  using Rows::state, Rows::context, Rows::attentional;
  static constexpr int W = kLanes<T>;

  static void share_vectors(int64_t n, const Gang& gang, int64_t* begin, int64_t* end) {
    const Groups groups(vectors_of<T>(n));
    gang.share(groups.groups, begin, end);
    *begin = groups.begin(*begin) * W;
    *end = groups.begin(*end) * W;
    if (*end > n) *end = n;
    if (*begin > *end) *begin = *end;
  }

  // Calls body(first, count) for each group of rows in [begin, end): rows that are multiplied together, whichever
  // thread does, since sums run in an order that depends on how many there are.
  template <class F>
  static void for_each_block(int64_t n, int64_t begin, int64_t end, F&& body) {
    const Groups groups(vectors_of<T>(n));
    for (int64_t g = 0; g < groups.groups; ++g) {
      const int64_t first = groups.begin(g) * W, next = groups.begin(g + 1) * W;
      if (first >= begin && first < end) body(first, (next < n ? next : n) - first);
    }
  }

  // out[column][row] = in[row][column].
  void transpose(const T* in, int64_t ld, int64_t rows, int64_t columns, T* out) const {
    for (int64_t r = 0; r < rows; r += W) {
      transpose_strip(out + r, w_.ld_t, in + r * ld, ld, rows - r < W ? rows - r : W, columns);
    }
  }

  // Sums of transposed rows, added to up to two vectors.
  void add_sums(const T* in, int64_t n, int64_t rows, T* out, T* too) const {
    if (!out && !too) return;
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> sums{};
      for (int64_t k = 0; k < n; k += W) sums += load_partial(in + r * w_.ld_t + k, n - k);
      const T sum = sum_lanes<T>(sums);
      if (out) out[r] += sum;
      if (too) too[r] += sum;
    }
  }

  // Calls multiply(column, vectors) for each group of N columns, with the chunk's rows of them packed in a panel.
  template <class RowAt, class F>
  void add_product(int64_t N, RowAt&& row_at, F&& multiply) {
    const Groups groups(vectors_of<T>(N));
    for (int64_t g = 0; g < groups.groups; ++g) {
      const int64_t first = groups.begin(g), vectors = groups.begin(g + 1) - first;
      pack_rows(
          own_.panel, [&](int64_t r) { return row_at(r / steps_, t0_ + r % steps_); }, n_ * steps_, first * W, N,
          vectors);
      multiply(first * W, vectors);
    }
  }

  // dw[n][column .. column + N) += d^T rows, for this thread's rows of dw; db += sums of d. scratch: [n][ld_t].
  template <class RowAt>
  void projection(T* scratch, const T* d, int64_t ld_d, int64_t n, T* dw, int64_t ld, int64_t column, int64_t N, T* db,
                  const Gang& gang, RowAt&& row_at) {
    int64_t begin, end;
    share_vectors(n, gang, &begin, &end);
    if (begin == end) return;
    T* transposed = scratch + begin * w_.ld_t;
    transpose(d + begin, ld_d, n_ * steps_, end - begin, transposed);
    add_sums(transposed, n_ * steps_, end - begin, db ? db + begin : nullptr, nullptr);
    add_product(N, row_at, [&](int64_t at, int64_t vectors) {
      for_each_block(n, begin, end, [&](int64_t r, int64_t count) {
        multiply_within(dw + r * ld + column, ld, N, scratch + r * w_.ld_t, w_.ld_t, own_.panel, vectors * W,
                        n_ * steps_, count, at, vectors, true, own_.product);
      });
    });
  }

  const BackwardWeights<Cell, T>& w_;
  const BackwardThread<T> own_;
};

template <class Cell, class T>
void decoder_backward(const DecoderProblem<T>& p, Gang& gang) {
  const BackwardWeights<Cell, T> weights(p, p.scratch);
  weights.pack(p, gang);
  gang.barrier();
  T* tiles = p.scratch + p.common_scratch;
  T* own = tiles + (p.split ? p.threads : 1) * p.tile_scratch + gang.rank * p.thread_scratch;
  const int64_t together = p.split ? gang.size : 1, last = (p.steps - 1) / p.chunk_steps;
  for (int64_t first = 0; first < p.tiles(); first += together) {
    const int64_t count = p.tiles() - first < together ? p.tiles() - first : together;
    Gang alone;
    Gang& team = p.split ? alone : gang;
    const int64_t mine = p.split ? gang.rank : 0;
    const int64_t tile = mine < count ? first + mine : first;
    DecoderBackward<Cell, T> own_tile(p, weights, tile, tiles + mine * p.tile_scratch, own, team);
    if (mine < count) own_tile.begin();
    for (int64_t c = last; c >= 0; --c) {
      const int64_t t0 = c * p.chunk_steps, t1 = t0 + p.chunk_steps < p.steps ? t0 + p.chunk_steps : p.steps;
      if (mine < count) own_tile.chunk(t0, t1);
      gang.barrier();
      for (int64_t j = 0; j < count; ++j) {
        DecoderWeightGradients<Cell, T>(p, weights, first + j, tiles + j * p.tile_scratch, own).add(t0, t1, gang);
      }
      gang.barrier();
    }
    if (mine < count) own_tile.finish();
    gang.barrier();
  }
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
