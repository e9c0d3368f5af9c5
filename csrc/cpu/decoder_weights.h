// The weights of the attentional decoder in the order forward reads them. For decoder_kernels.cpp alone.
#pragma once

#include "decoder.h"
#include "decoder_history.h"
#include "packed_weights.h"
#include "recurrence_forward.h"
#include "with_cell.h"

namespace seqattn::SEQATTN_ISA {
namespace {

// Every weight of the decoder as the forward pass reads it, in one buffer: the layers' panels, then the projection of
// the query [group][H][vectors] and its bias, then the output's [group][D + H][vectors] and its bias, then those that
// earlier weights are read with.
template <class Cell, class T>
struct DecoderWeights {
  using Layer = PackedWeights<Cell, T>;
  Groups queries, outputs;
  T *query, *query_bias, *output, *output_bias;
  HistoryWeights<T> history{};
  T* end;

  DecoderWeights(const DecoderProblem<T>& p, T* data)
      : queries(p.w_query ? vectors_of<T>(p.A) : 0), outputs(vectors_of<T>(p.M)), p_(p), data_(data) {
    query = data + layers_size(p, p.layers);
    query_bias = query + (p.w_query ? padded(p.A) * p.H : 0);
    output = query_bias + (p.w_query ? padded(p.A) : 0);
    output_bias = output + padded(p.M) * (p.D + p.H);
    history = HistoryWeights<T>(p, output_bias + padded(p.M));
    end = history.end;
  }

  Layer layer(int64_t l) const { return Layer(sizes(p_, l), data_ + layers_size(p_, l)); }
  T* layer_data(int64_t l) const { return data_ + layers_size(p_, l); }
  T* query_group(int64_t g) const { return query + queries.begin(g) * kLanes<T> * p_.H; }
  T* output_group(int64_t g) const { return output + outputs.begin(g) * kLanes<T> * (p_.D + p_.H); }

  static Sizes sizes(const DecoderProblem<T>& p, int64_t l) { return {p.layer_width(l), p.H, p.H, false}; }
  static int64_t layers_size(const DecoderProblem<T>& p, int64_t count) {
    int64_t size = 0;
    for (int64_t l = 0; l < count; ++l) size += Layer::size(sizes(p, l));
    return size;
  }

 private:
  const DecoderProblem<T>& p_;
  T* data_;
};

// w[n][K] as panels [group][K][vectors], and its bias, zero where there is none; this thread's share.
template <class T>
void pack_projection(const Groups& groups, T* out, T* out_bias, const T* w, const T* bias, int64_t n, int64_t K,
                     Gang& gang) {
  constexpr int W = kLanes<T>;
  int64_t begin, end;
  gang.share(groups.groups, &begin, &end);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = groups.begin(g), vectors = groups.begin(g + 1) - first;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t row = (first + v) * W, left = n - row;
      transpose_strip(out + first * W * K + v * W, vectors * W, w + row * K, K, left < W ? left : W, K);
      store(out_bias + row, bias ? load_partial(bias + row, left) : Vec<T>{});
    }
  }
}

template <class Cell, class T>
void pack_decoder(const DecoderProblem<T>& p, Gang& gang) {
  const DecoderWeights<Cell, T> packed(p, p.packed);
  for (int64_t l = 0; l < p.layers; ++l) {
    Direction<T> d{};
    d.w_ih = p.weights[l].w_ih;
    d.w_hh = p.weights[l].w_hh;
    d.b_ih = p.weights[l].b_ih;
    d.b_hh = p.weights[l].b_hh;
    d.packed = packed.layer_data(l);
    pack_weights<Cell, T>(DecoderWeights<Cell, T>::sizes(p, l), d, gang);
  }
  if (p.w_query) pack_projection(packed.queries, packed.query, packed.query_bias, p.w_query, p.b_query, p.A, p.H, gang);
  if (p.M) {
    pack_projection(packed.outputs, packed.output, packed.output_bias, p.w_output, p.b_output, p.M, p.D + p.H, gang);
  }
  if (p.has_history() && gang.rank == 0) packed.history.pack(p);
}

}  // namespace
}  // namespace seqattn::SEQATTN_ISA
