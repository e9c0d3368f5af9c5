// A tile of the attentional decoder's forward pass: its scratch, its rows, and what each of them attends to. For
// decoder_kernels.cpp alone.
#pragma once

#include "attention_context.h"
#include "decoder_weights.h"
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

template <class Cell, class T>
struct ForwardTile {
  T *pre, *above, *folded, *h, *c, *context, *attentional, *query, *rows, *logits, *end;
  int64_t* words;  // the newest of each row, -1 where it has ended
  int64_t ld_logits;
  T* channels;  // [row][C][channel_stride] of earlier weights
  int64_t ld_h, ld_c, ld_context, ld_attentional, ld_query, ld_rows, ld_channels;

  // Pre-activations of the first layer for a chunk of steps [panel][row][step][slot][units], of one above it for one
  // step; values times W_ih [panel][part][s][gate][units] where they are folded; h [layer][2][row], c [layer][row], the
  // last context and attentional vector, the query, the scores.
  ForwardTile(const DecoderProblem<T>& p, T* data) {
    const int64_t n = p.tile_rows < p.B ? p.tile_rows : p.B, slots = Cell::kSlots * padded(p.H);
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
    folded = take(p.folds() ? p.S * Cell::kGates * padded(p.H) : 0);
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

// A tile of rows on the way forward, and this thread's part in it.
template <class Cell, class T>
class ForwardRows {
 protected:
  using Layer = PackedWeights<Cell, T>;
  static constexpr int W = kLanes<T>;

  ForwardRows(const DecoderProblem<T>& problem, int64_t tile, T* shared, T* own, Gang& gang)
      : p_(problem),
        weights_(problem, problem.packed),
        gang_(gang),
        s_(problem, shared),
        b0_(problem.tile_begin(tile)),
        n_(problem.tile_begin(tile + 1) - b0_),
        own_(own) {
    gang_.share(weights_.layer(0).panels.groups, &panel_begin_, &panel_end_);
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

  // Rows of `vectors` vectors of a bias.
  void project(T* out, int64_t ld, const T* bias, int64_t vectors) const {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t v = 0; v < vectors; ++v) store(out + i * ld + v * W, load(bias + v * W));
    }
  }

  const DecoderProblem<T>& p_;
  const DecoderWeights<Cell, T> weights_;
  Gang& gang_;
  const ForwardTile<Cell, T> s_;
  const int64_t b0_, n_;
  T* own_;  // this thread's: a row of scores, then what scores and context need
  int64_t panel_begin_, panel_end_;
};

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
