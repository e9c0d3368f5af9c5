// How a tile's rows look at what they attend to: query, scores, weights and context of a step. For decoder_kernels.cpp
// alone.
#pragma once

#include "attention_scores.h"
#include "decoder_forward_tile.h"

namespace seqattn::SEQATTN_ISA {
namespace {

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
class DecoderLook : protected ForwardRows<Cell, T> {
 protected:
  using Base = ForwardRows<Cell, T>;
  using Layer = typename Base::Layer;
  using Base::b0_, Base::gang_, Base::n_, Base::own_, Base::p_, Base::panel_begin_, Base::panel_end_, Base::s_, Base::W,
      Base::weights_;

  DecoderLook(const DecoderProblem<T>& problem, int64_t tile, T* shared, T* own, Gang& gang)
      : Base(problem, tile, shared, own, gang) {
    gang_.share(weights_.queries.groups, &query_begin_, &query_end_);
  }

  // Looks with these h.
  void attend(int64_t t, const T* query) {
    int64_t ld = s_.ld_h;
    if (p_.w_query) {
      for (int64_t g = query_begin_; g < query_end_; ++g) {
        const int64_t first = weights_.queries.begin(g) * W, vectors = weights_.queries.begin(g + 1) - first / W;
        this->project(s_.query + first, s_.ld_query, weights_.query_bias + first, vectors);
        multiply_panel(s_.query + first, s_.ld_query, query, ld, weights_.query_group(g), p_.H, n_, int(vectors), true);
      }
      query = s_.query;
      ld = s_.ld_query;
      gang_.barrier();
    }
    scores(t, query, ld);
    gang_.barrier();
    if (p_.folds()) {  // of one row, so that what follows needs no more than this thread has
      weigh(attention_of(p_, b0_, t, s_.query), 0, gang_.rank == 0);
      return;
    }
    contexts(t);
    gang_.barrier();
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

  // The weights of row i, for this thread alone; to be kept by one thread, for all.
  void weigh(AttentionArgs<T> args, int64_t i, bool keep) {
    __builtin_memcpy(own_, s_.rows + i * s_.ld_rows, std::size_t(s_.ld_rows) * sizeof(T));
    if (!keep) args.weights = nullptr;
    softmax_row(args, 0, 0, own_);
    if (!keep || !p_.has_history()) return;
    const T* fertility = p_.fertility ? p_.fertility + owner(p_, b0_ + i) * p_.S : nullptr;
    extend_channels(p_, args.weights, fertility, s_.channels + i * s_.ld_channels);
  }

  // The contexts of the scores; where a row's columns are shared, each thread has its weights to itself.
  void contexts(int64_t t) {
    const int64_t chunks = gang_.size / common_divisor(n_, gang_.size);
    const int64_t width = round_up(ceil_div(p_.D, chunks), kKeyBlock);
    auto* list = reinterpret_cast<int32_t*>(own_ + s_.ld_rows);
    int64_t begin, end, ready = -1;
    gang_.share(n_ * chunks, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / chunks, d0 = item % chunks * width, d1 = d0 + width < p_.D ? d0 + width : p_.D;
      const AttentionArgs<T> args = attention_of(p_, b0_ + i, t, s_.query);
      if (ready != i) weigh(args, i, item % chunks == 0);
      ready = i;
      if (d0 >= d1) continue;
      context_tile(args, 0, 0, 1, own_, s_.ld_rows, d0, d1, list);
      __builtin_memcpy(s_.context + i * s_.ld_context + d0, args.context + d0, std::size_t(d1 - d0) * sizeof(T));
    }
  }

  T* folded_panel(int64_t panel) const {
    return s_.folded + weights_.layer(0).panels.begin(panel) * W * Cell::kGates * p_.S;
  }

  // The context's part of W_ih times each value that may be attended to, for this thread's panels. A step then
  // multiplies by its weights: S columns of W_ih in place of D.
  void fold_values() {
    constexpr int kPart = Layer::kPart;
    const Layer layer = weights_.layer(0);
    const AttentionArgs<T> args = attention_of(p_, b0_, 0, s_.query);
    const int64_t length = args.length(0);
    for (int64_t p = panel_begin_; p < panel_end_; ++p) {
      const int64_t units = layer.panels.begin(p + 1) - layer.panels.begin(p), width = kPart * units * W;
      for (int64_t part = 0; part < Cell::kGates / kPart; ++part) {
        T* out = folded_panel(p) + part * p_.S * width;
        const T* panel = layer.ih_panel(p) + (part * p_.width + p_.context_at) * width;
        multiply_panel(out, width, args.values, p_.D, panel, p_.D, length, int(kPart * units), false);
        for (int64_t s = 0; args.mask_bool && s < length; ++s) {  // a value that isn't attended to may be anything
          if (!args.mask_bool[s]) __builtin_memset(out + s * width, 0, std::size_t(width) * sizeof(T));
        }
      }
    }
  }

  // The contexts of all steps at once, where no step needed them.
  void unfold_contexts() {
    gang_.barrier();
    AttentionArgs<T> args = attention_of(p_, b0_, 0, s_.query);
    args.T_ = p_.steps;
    int64_t begin, end;
    gang_.share(ceil_div(p_.D, kKeyBlock), &begin, &end);
    const int64_t d0 = begin * kKeyBlock, d1 = end * kKeyBlock < p_.D ? end * kKeyBlock : p_.D;
    auto* list = reinterpret_cast<int32_t*>(own_ + s_.ld_rows);
    if (d0 < d1) context_tile(args, 0, 0, p_.steps, args.weights, p_.S, d0, d1, list);
  }

  static int64_t common_divisor(int64_t a, int64_t b) {
    while (b) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }

  int64_t query_begin_, query_end_;
};

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
