// The whole loop of an attentional decoder in one kernel: a cluster of 16 blocks keeps all weights and serves up to
// eight sequences, the columns. Units, weights and columns are laid out as in persistent.cuh; W_query is one more row
// block beside the gates, whose units are the attention's features.
//
// The blocks of a cluster share the columns' attention: 16 / columns blocks (the parts) serve one column, each with its
// own range of features in the scores and of values in the context. A step has four exchanges through distributed
// shared memory, each awaited at a barrier that counts its bytes:
//   q        from the block that owns a feature to the one part that needs it; W_hh h is multiplied meanwhile
//   scores   each part's share of every score, to all parts of the column
//   context  from each part to all blocks
//   h        from each block to all
// q, scores and context have one buffer: they are sent only after h of the step before came from every warp of the
// receiving block, which has read them by then. h has two: a block without a column may lag behind, still multiplying.
//
// Scores that know of earlier weights have a fifth exchange. Each part keeps the whole history of its column, in float,
// and convolves it for its own range of keys; the features go to all parts of the column, which multiply them with
// their own rows of the feature weights. They are sent while the step waits for h, and after the context came from
// every part, whose warps have all read the features before by then.
#pragma once

#include <type_traits>

#include "decoder.h"
#include "persistent.cuh"

namespace seqattn::gpu {

// kQueue: 16-byte loads of keys or values a lane has under way.
template <class Cell_, class T_, int kHiddenPairs_, int kValuePairs_, int kQueue_, bool kHistory_>
struct ClusterDecoder {
  using Cell = Cell_;
  using T = T_;
  static constexpr int kCluster = 16, kColumns = 8;
  static constexpr int kHiddenPairs = kHiddenPairs_, kValuePairs = kValuePairs_, kQueue = kQueue_;
  static constexpr int kPiece = Operand<T>::kPiece;
  static constexpr int kHidden = kSplit * kHiddenPairs * 4 * kPiece;  // padded; attention features too
  static constexpr int kValue = kSplit * kValuePairs * 4 * kPiece;
  static constexpr int kUnits = kHidden / kCluster, kGroups = kUnits / kGroupUnits;
  static constexpr int kWarps = kSplit * kGroups, kThreads = 32 * kWarps;
  static constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots;
  static constexpr bool kHistory = kHistory_;
  // Whether W_hh h is multiplied after the scores, which take more registers with a history, and what is cheap is found
  // anew at each step: the assembler fits cells of fewer gates without spilling so, and the LSTM otherwise.
  static constexpr bool kFrugal = kHistory && kGates < 4;
  static constexpr int kHiddenPieces = kHidden / kPiece, kValuePieces = kValue / kPiece;
  static_assert(sizeof(T) == 2 && kQueue % 4 == 0 && (!kHistory || kQueue == 4) && kUnits % kGroupUnits == 0 &&
                kGroups >= 1 && kValue <= 512);

  // Barriers, in the order of a step but for h's two.
  enum { kQueryCame, kScoresCame, kContextCame, kStateCame, kFeaturesCame = kStateCame + 2, kBarriers };

  // Shared memory, in bytes. After kScores come the parts' scores [parts][source], their softmax [source], the warps'
  // shares of the context [warps][value columns], and of a history its channels (float, [C][source + window], half a
  // window of zeros before the first key) and features (T, [F][source]); source and window rounded up to fours.
  static constexpr int kState = 128, kStateSize = kHiddenPieces * 128;
  static constexpr int kContext = kState + 2 * kStateSize;
  static constexpr int kParts = kContext + kValuePieces * 128;
  static constexpr int kQueryParts = kParts + kWarps * (kSplit - 1) * kSlots * 128;
  static constexpr int kQuery = kQueryParts + kWarps * (kSplit - 1) * 128;
  static constexpr int kEnergy = kQuery + 256 * 4;
  static constexpr int kQueryWeights = kEnergy + 256 * 4;
  static constexpr int kContextWeights = kQueryWeights + kWarps * kHiddenPairs * 2 * 512;
  static constexpr int kScores = kContextWeights + kWarps * kValuePairs * kGates * 2 * 512;
  static constexpr int64_t shared_bytes(int64_t source, int parts) {
    return kScores + (parts + 1) * round_to_four(source) * 4 + int64_t(kWarps) * 256 * 4;
  }
  static SEQATTN_CELL constexpr int64_t round_to_four(int64_t n) { return (n + 3) / 4 * 4; }
};

// One bound of a column's range that `parts` blocks share in multiples of 8.
SEQATTN_DEVICE int part_size(int64_t n, int parts) { return static_cast<int>((n / 8 + parts - 1) / parts * 8); }

// The first power of two from n / 8 on, at most 32: lanes that share a row of n values, eight each.
SEQATTN_DEVICE int lanes_for(int n) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < n) lanes *= 2;
  return lanes;
}

// What four lanes have, `apart` and 2 * `apart` from each other, in their order and in each of them; a warp takes part.
template <class W>
SEQATTN_DEVICE Vec<W, 4> gather_four(W own, int lane, int apart) {
  const bool first = lane & apart, second = lane & 2 * apart;
  const W next = shuffle_xor(own, apart);
  const W low = first ? next : own, high = first ? own : next;
  const W low2 = shuffle_xor(low, 2 * apart), high2 = shuffle_xor(high, 2 * apart);
  return {{second ? low2 : low, second ? high2 : high, second ? low : low2, second ? high : high2}};
}

// Element i of eight in 16 bytes. They are taken apart where they are used: a load is waited for at its first use.
template <class T>
SEQATTN_DEVICE float element(const Words4& words, int i) {
  const uint32_t word = words[i / 2];
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bits_float(i % 2 ? word & 0xffff0000u : word << 16);
  } else {
    const uint16_t bits = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
    T x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return to_float(x);
  }
}

template <class Shape>
SEQATTN_KERNEL(Shape::kThreads, 1)
cluster_decoder_forward(SEQATTN_KERNEL_PARAM DecoderForward args, int begin, int columns) {
  using Cell = typename Shape::Cell;
  using T = typename Shape::T;
  constexpr int kGates = Shape::kGates, kSlots = Shape::kSlots, kPiece = Shape::kPiece, kWarps = Shape::kWarps;
  constexpr int kHiddenPairs = Shape::kHiddenPairs, kValuePairs = Shape::kValuePairs, kCluster = Shape::kCluster;
  constexpr int kHSlot = kSlots - kGates, kQueue = Shape::kQueue;

  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  const int warp = warp_index(), split = warp % kSplit;
  const int rank = cluster_rank();
  const int steps = static_cast<int>(args.steps), source = static_cast<int>(args.source);
  const int hidden = static_cast<int>(args.hidden), features = static_cast<int>(args.attention);
  const int value = static_cast<int>(args.value);
  const int64_t batch = args.batch;
  const int64_t first = begin + static_cast<int64_t>(block_index() / kCluster) * columns;  // sequence of column 0
  const int present = static_cast<int>(batch - first < columns ? batch - first : columns);

  const Shared<unsigned char> shared = dynamic_shared<unsigned char>();
  const Shared<Barrier> barriers = shared_cast<Barrier>(shared);
  const Shared<Words4> state = shared_cast<Words4>(shared + Shape::kState);
  const Shared<Words4> context = shared_cast<Words4>(shared + Shape::kContext);
  const Shared<float> query = shared_cast<float>(shared + Shape::kQuery);
  const Shared<float> energy = shared_cast<float>(shared + Shape::kEnergy);
  const Shared<Words4> query_weights = shared_cast<Words4>(shared + Shape::kQueryWeights);
  const Shared<Words4> context_weights = shared_cast<Words4>(shared + Shape::kContextWeights);
  constexpr int kStateWords = Shape::kStateSize / 16;

  // This block's part in the attention.
  const int parts = kCluster / columns, part = rank % parts, column_served = rank / parts;
  const bool attends = column_served < present;
  const int sequence_served = static_cast<int>(first) + (attends ? column_served : 0);
  const int feature_part = part_size(features, parts), feature_begin = part * feature_part;
  const int feature_count = features - feature_begin < feature_part ? features - feature_begin : feature_part;
  const int value_part = part_size(value, parts), value_begin = part * value_part;
  const int value_count = value - value_begin < value_part ? value - value_begin : value_part;
  int length = source;
  if (args.lengths != nullptr) {
    const int64_t n = args.lengths[sequence_served];
    length = n < 0 ? 0 : n < source ? static_cast<int>(n) : source;
  }
  const int source_stride = static_cast<int>(Shape::round_to_four(source));
  const Shared<float> scores = shared_cast<float>(shared + Shape::kScores);
  const Shared<float> total = scores + parts * source_stride;
  const Shared<float> shares = total + source_stride;

  const int fours = (length + 3) / 4;
  // The history of this block's column; found anew wherever it is used, by a zero that keeps it out of registers.
  const int filters = static_cast<int>(args.filters), channels = static_cast<int>(args.channels);
  const int taps = static_cast<int>(Shape::round_to_four(args.window)), half_window = static_cast<int>(args.window) / 2;
  const auto channel_stride = [&](int zero) { return static_cast<int>(Shape::round_to_four(source + zero)) + taps; };
  const auto history_at = [&](int zero) {
    const int scores_stride = static_cast<int>(Shape::round_to_four(source + zero));
    return shared_cast<float>(shared + Shape::kScores) + ((parts + 1) * scores_stride + kWarps * 256);
  };
  const auto located_at = [&](int zero) {
    return shared_cast<Vec<T, 4>>(history_at(zero) + channels * channel_stride(zero));
  };

  // Weights: W_hh in registers, the others' fragments in shared memory.
  uint32_t held[kHiddenPairs][kGates][2][4];
  const int64_t group_unit = static_cast<int64_t>(rank) * Shape::kUnits + warp / kSplit * kGroupUnits;
  {
    const bool vectors = hidden % kPiece == 0;
    const T* w_hh = static_cast<const T*>(args.w_hh);
    const T* w_query = static_cast<const T*>(args.w_query);
    SEQATTN_UNROLL
    for (int p = 0; p < kHiddenPairs; ++p) {
      const int64_t k = ((split * kHiddenPairs + p) * 4 + q) * kPiece;
      SEQATTN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        const T* w = w_hh + static_cast<int64_t>(Cell::h_gate(kHSlot + gate)) * hidden * hidden;
        const WeightPair pair = weight_pair<T>(load_piece(w, group_unit + g, hidden, k, hidden, vectors),
                                               load_piece(w, group_unit + g + 8, hidden, k, hidden, vectors));
        SEQATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          SEQATTN_UNROLL
          for (int r = 0; r < 4; ++r) held[p][gate][i][r] = pair.a[i][r];
        }
      }
      const WeightPair pair = weight_pair<T>(load_piece(w_query, group_unit + g, features, k, hidden, vectors),
                                             load_piece(w_query, group_unit + g + 8, features, k, hidden, vectors));
      SEQATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        Words4 words;
        SEQATTN_UNROLL
        for (int r = 0; r < 4; ++r) words[r] = pair.a[i][r];
        store(query_weights + ((warp * kHiddenPairs + p) * 2 + i) * 32 + lane, words);
      }
    }
    for (int p = 0; p < kValuePairs; ++p) {
      const int64_t k = ((split * kValuePairs + p) * 4 + q) * kPiece;
      SEQATTN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        Words4 rows[2];
        SEQATTN_UNROLL
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
          const int64_t unit = group_unit + g + 8 * half_tile;
          rows[half_tile] = Words4{};
          if (unit < hidden && k < value) {
            const int64_t row = static_cast<int64_t>(Cell::x_gate(gate)) * hidden + unit;
            rows[half_tile] = load(
                reinterpret_cast<const Words4*>(static_cast<const T*>(args.w_context) + row * args.ld_context + k));
          }
        }
        const WeightPair pair = weight_pair<T>(rows[0], rows[1]);
        SEQATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          Words4 words;
          SEQATTN_UNROLL
          for (int r = 0; r < 4; ++r) words[r] = pair.a[i][r];
          store(context_weights + (((warp * kValuePairs + p) * kGates + gate) * 2 + i) * 32 + lane, words);
        }
      }
    }
  }

  // State and context of the first step; zeros in columns without a sequence and in padding.
  const T* h0 = static_cast<const T*>(args.h0);
  for (int i = thread_index(); i < Shape::kHiddenPieces * 8; i += Shape::kThreads) {
    const int piece = i / 8, column = i % 8;
    Words4 words{};
    if (h0 != nullptr && column < present) {
      words = load_piece(h0, first + column, batch, piece * kPiece, hidden, false);
    }
    store(state + piece_place(piece, column), words);
    store(state + kStateWords + piece_place(piece, column), Words4{});
  }
  for (int i = thread_index(); i < Shape::kValuePieces * 8; i += Shape::kThreads) store(context + i, Words4{});
  for (int i = thread_index(); i < 256; i += Shape::kThreads) {
    store(query + i, 0.f);
    store(energy + i, i < feature_count ? args.v[feature_begin + i] : 0.f);
  }
  if constexpr (Shape::kHistory) {
    const T* given = static_cast<const T*>(args.history0);
    const int stride = channel_stride(0);
    for (int i = thread_index(); i < channels * stride; i += Shape::kThreads) {
      const int channel = i / stride, s = i % stride - half_window;
      const int64_t at = (static_cast<int64_t>(sequence_served) * channels + channel) * source + s;
      store(history_at(0) + i, given != nullptr && s >= 0 && s < source ? to_float(given[at]) : 0.f);
    }
  }

  const int state_bytes = Shape::kHiddenPieces * 16 * present;
  const auto query_bytes = [&] { return keep(feature_count > 0 ? feature_count : 0) * 4; };
  const auto scores_bytes = [&] { return parts * keep(fours) * 16; };
  const auto features_bytes = [&] { return keep(fours) * filters * static_cast<int>(sizeof(Vec<T, 4>)); };
  const int context_bytes = value / kPiece * 16 * present;
  if (thread_index() == 0) {
    for (int i = 0; i < Shape::kBarriers; ++i) barrier_init(barriers + i, 1);
    barrier_fence_init();
    if (steps > 0) {
      barrier_arrive_expect(barriers + Shape::kQueryCame, query_bytes());
      barrier_arrive_expect(barriers + Shape::kScoresCame, scores_bytes());
      barrier_arrive_expect(barriers + Shape::kContextCame, context_bytes);
      if constexpr (Shape::kHistory) barrier_arrive_expect(barriers + Shape::kFeaturesCame, features_bytes());
    }
    if (steps > 1) barrier_arrive_expect(barriers + Shape::kStateCame + 1, state_bytes);
    if (steps > 2) barrier_arrive_expect(barriers + Shape::kStateCame, state_bytes);
  }
  cluster_sync();

  // This lane's unit (and feature of W_query) and column.
  const int group = keep(warp) / kSplit;
  const int unit = rank * Shape::kUnits + group * kGroupUnits + g + 8 * (split / 2);
  const int column = 2 * q + split % 2;
  const bool present_column = column < present, live = present_column && unit < hidden;
  const int sequence = static_cast<int>(first) + column;
  const auto state_at = [&] { return static_cast<int64_t>(keep(sequence)) * hidden + unit; };
  const auto sequence_at = [&](int zero) {
    return Shape::kFrugal ? static_cast<int>(first) + keep(column) : sequence + zero;
  };
  float h = 0, c = 0;
  if (live) {
    if (h0 != nullptr) h = to_float(h0[state_at()]);
    if (Cell::kHasCell && args.c0 != nullptr) c = to_float(static_cast<const T*>(args.c0)[state_at()]);
  }

  // The part that needs this lane's feature of q.
  const int query_owner = unit / feature_part < parts ? unit / feature_part : parts - 1;

  // Keys of the attention: `key_lanes` lanes share four that follow each other, eight features each; `key_stride` such
  // fours are looked at together, this lane's n-th is key_first + n * key_stride. Likewise values, one by one.
  const int key_lanes = lanes_for(feature_count), value_lanes = lanes_for(value_count);
  const int key_stride = kWarps * (32 / key_lanes), value_stride = kWarps * (32 / value_lanes);
  const int key_first = warp * (32 / key_lanes) + lane / key_lanes;
  const int value_first = warp * (32 / value_lanes) + lane / value_lanes;
  const int key_column = lane % key_lanes * 8, value_column = lane % value_lanes * 8;
  // Loads are never conditional, so that they stay under way: past the end they read the last key (value), and lanes
  // without a feature (value column) read the first.
  const int last = length > 0 ? length - 1 : 0;
  const T* keys = static_cast<const T*>(args.keys) + static_cast<int64_t>(sequence_served) * source * features +
                  (key_column < feature_count ? feature_begin + key_column : 0);
  const T* values = static_cast<const T*>(args.values) + static_cast<int64_t>(sequence_served) * source * value +
                    (value_column < value_count ? value_begin + value_column : 0);
  const int key_turns = attends ? (fours + key_stride - 1) / key_stride : 0;
  const int value_turns = attends ? (length + value_stride - 1) / value_stride : 0;
  const auto key_at = [&](int n) {
    const int s = 4 * (keep(key_first) + n / 4 * key_stride) + n % 4;
    return reinterpret_cast<const Words4*>(row_at(keys, s < last ? s : last, features * 2));
  };
  const auto value_at = [&](int n) {
    const int s = keep(value_first) + n * value_stride;
    return reinterpret_cast<const Words4*>(row_at(values, s < last ? s : last, value * 2));
  };

  for (int t = 0; t < steps; ++t) {
    const int parity = t & 1;
    // Zero, which the assembler can't know: what it is added to is found anew at each step, where it would be carried
    // through the loop in registers that there aren't.
    const int zero = (steps - 1 - t) >> 31;
    if constexpr (Shape::kHistory) {
      if (attends) {
        // Four keys of one filter a thread.
        const int own_fours = (fours + zero + parts - 1) / parts, four_begin = part * own_fours;
        const int four_count = fours - four_begin < own_fours ? fours - four_begin : own_fours;
        const Vec<T, 4>* conv = static_cast<const Vec<T, 4>*>(args.w_conv);
        SEQATTN_UNROLL_BY(1)
        for (int item = thread_index() + zero; item < filters * four_count; item += Shape::kThreads) {
          const int filter = item / four_count, four = four_begin + item % four_count;
          float found[4] = {};
          SEQATTN_UNROLL_BY(1)
          for (int channel = 0; channel < channels; ++channel) {
            const Shared<Vec<float, 4>> seen =
                shared_cast<Vec<float, 4>>(history_at(zero) + channel * channel_stride(zero)) + four;
            const Vec<T, 4>* weights = conv + (filter * channels + channel) * (taps / 4);
            Vec<float, 4> low = load(seen);
            SEQATTN_UNROLL_BY(1)
            for (int k = 0; k < taps / 4; ++k) {
              const Vec<float, 4> high = load(seen + (k + 1));
              const Vec<T, 4> weight = load(weights + k);
              SEQATTN_UNROLL
              for (int i = 0; i < 4; ++i) {
                const float w = to_float(weight[i]);
                SEQATTN_UNROLL
                for (int j = 0; j < 4; ++j) found[j] += w * (i + j < 4 ? low[(i + j) % 4] : high[(i + j) % 4]);
              }
              low = high;
            }
          }
          const Vec<T, 4> four_keys{
              {from_float<T>(found[0]), from_float<T>(found[1]), from_float<T>(found[2]), from_float<T>(found[3])}};
          SEQATTN_UNROLL_BY(1)
          for (int p = 0; p < parts; ++p) {
            store_async(map_shared(located_at(zero) + (filter * (source_stride / 4) + four), column_served * parts + p),
                        four_keys, map_shared(barriers + Shape::kFeaturesCame, column_served * parts + p));
          }
        }
      }
    }
    Words4 queue[kQueue];
    SEQATTN_UNROLL
    for (int n = 0; n < kQueue; ++n) queue[n] = load(key_at(n));
    const float query_bias = args.b_query != nullptr && unit < features ? args.b_query[unit] : 0.f;
    if (t > 0) {
      barrier_wait(barriers + Shape::kStateCame + parity, static_cast<uint32_t>((t - 1) >> 1) & 1);
      if (thread_index() == 0 && t + 2 < steps)
        barrier_arrive_expect(barriers + Shape::kStateCame + parity, state_bytes);
    }

    // q, and on its way W_hh h.
    int fragment = (4 * (g % 2) + g / 2) ^ q;
    if constexpr (Shape::kFrugal) {
      const int own = keep(lane);  // found anew
      fragment = (4 * (own / 4 % 2) + own / 8) ^ own % 4;
    }
    const Shared<Words4> previous = state + parity * kStateWords + (split * kHiddenPairs * 4 + q) * 8 + fragment;
    {
      float sum[2][4] = {};
      SEQATTN_UNROLL
      for (int p = 0; p < kHiddenPairs; ++p) {
        const Words4 b = load(previous + p * 32);
        SEQATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const Words4 words = load(query_weights + ((warp * kHiddenPairs + p) * 2 + i) * 32 + lane);
          const uint32_t a[4] = {words[0], words[1], words[2], words[3]};
          const uint32_t pair[2] = {b[2 * i], b[2 * i + 1]};
          Operand<T>::multiply(sum[i], a, pair);
        }
      }
      const Shared<float> sent = shared_cast<float>(shared + Shape::kQueryParts) + lane + zero;
      const int first_of_group = (group + zero) * kSplit;
      const auto part_of = [&](int to, int from) {
        return sent + ((first_of_group + to) * (kSplit - 1) + from - 1) * 32;
      };
      float own = 0;
      SEQATTN_UNROLL
      for (int r = 0; r < kSplit; ++r) {
        const float both = sum[0][r] + sum[1][r];
        if (r == split) {
          own = both;
        } else {
          store(part_of(r, (split - r) & (kSplit - 1)), both);
        }
      }
      named_barrier_sync(1 + group, 32 * kSplit);
      SEQATTN_UNROLL
      for (int from = 1; from < kSplit; ++from) own += load(part_of(split, from));
      // Four features of a column, four lanes apart, in one message.
      own += query_bias;
      const Vec<float, 4> four = gather_four(own, lane, 4);
      if (g % 4 == 0 && present_column && unit + zero < features) {
        int owner = query_owner + zero;
        if constexpr (Shape::kFrugal) {
          owner = keep(unit) / feature_part;
          if (owner >= parts) owner = parts - 1;
        }
        const int query_at = Shape::kQuery + (unit - owner * feature_part) * 4;
        const Remote<unsigned char> query_peer = map_shared(shared, column * parts + owner);
        store_async(remote_cast<Vec<float, 4>>(query_peer + query_at), four,
                    remote_cast<Barrier>(query_peer + Shape::kQueryCame * sizeof(Barrier)));
      }
    }
    float sum[kSlots][4] = {};
    const auto multiply_state = [&] {
      SEQATTN_UNROLL
      for (int p = 0; p < kHiddenPairs; ++p) {
        const Words4 b = load(previous + p * 32);
        SEQATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const uint32_t pair[2] = {b[2 * i], b[2 * i + 1]};
          SEQATTN_UNROLL
          for (int gate = 0; gate < kGates; ++gate) Operand<T>::multiply(sum[kHSlot + gate], held[p][gate][i], pair);
        }
      }
    };
    if constexpr (!Shape::kFrugal) multiply_state();

    if (attends) {
      // Where nothing comes there is no waiting: a phase without bytes would end before all threads have seen the last.
      if (feature_count > 0) {
        barrier_wait(barriers + Shape::kQueryCame, parity);
        if (thread_index() == 0 && t + 1 < steps) barrier_arrive_expect(barriers + Shape::kQueryCame, query_bytes());
      }
      if constexpr (Shape::kHistory) {
        if (fours > 0) {
          barrier_wait(barriers + Shape::kFeaturesCame, parity);
          if (thread_index() == 0 && t + 1 < steps) {
            barrier_arrive_expect(barriers + Shape::kFeaturesCame, features_bytes());
          }
        }
      }

      // Scores. The queue goes on with the first values, so that they are there when the weights are.
      {
        const int own_column = key_column + zero;
        const int feature_column = own_column < feature_count ? keep(part) * feature_part + own_column : 0;
        SEQATTN_UNROLL_BY(1)
        for (int n0 = 0; n0 < 4 * key_turns; n0 += kQueue) {
          const bool more = n0 + kQueue < 4 * key_turns;
          float score[kQueue] = {};
          SEQATTN_UNROLL
          for (int at = 0; at < 8; at += 4) {
            const Vec<float, 4> own_query = load(shared_cast<Vec<float, 4>>(query + own_column + at));
            float inner[kQueue][4];
            SEQATTN_UNROLL
            for (int j = 0; j < kQueue; ++j) {
              SEQATTN_UNROLL
              for (int i = 0; i < 4; ++i) inner[j][i] = own_query[i];
            }
            if constexpr (Shape::kHistory) {
              // Other fours may have been sent anew by the time this lane comes here.
              const int four = key_first + n0 / 4 * key_stride;
              const Shared<Vec<T, 4>> own_located = located_at(zero) + four;
              const Vec<T, 4>* weights = static_cast<const Vec<T, 4>*>(args.w_feature) + (feature_column + at) / 4;
              SEQATTN_UNROLL_BY(1)
              for (int f = 0; f < (four < fours ? filters : 0); ++f) {
                const Vec<T, 4> feature = load(own_located + f * ((source + zero + 3) / 4));
                const Vec<T, 4> weight = load(weights + f * (static_cast<int>(args.attention) / 4));
                SEQATTN_UNROLL
                for (int j = 0; j < kQueue; ++j) {
                  SEQATTN_UNROLL
                  for (int i = 0; i < 4; ++i) inner[j][i] += to_float(feature[j]) * to_float(weight[i]);
                }
              }
            }
            const Vec<float, 4> own_energy = load(shared_cast<Vec<float, 4>>(energy + own_column + at));
            SEQATTN_UNROLL
            for (int j = 0; j < kQueue; ++j) {
              SEQATTN_UNROLL
              for (int i = 0; i < 4; ++i) {
                score[j] += own_energy[i] * tanh_approx(inner[j][i] + element<T>(queue[j], at + i));
              }
              if (at) queue[j] = load(more ? key_at(n0 + j + kQueue) : value_at(j));
            }
          }
          SEQATTN_UNROLL_BY(1)
          for (int m = key_lanes / 2; m > 0; m /= 2) {
            SEQATTN_UNROLL
            for (int j = 0; j < kQueue; ++j) score[j] += shuffle_xor(score[j], m);
          }
          SEQATTN_UNROLL
          for (int j = 0; j < kQueue; j += 4) {
            const int four = key_first + (n0 + j) / 4 * key_stride;
            if (four < fours) {
              SEQATTN_UNROLL_BY(1)
              for (int p = lane % key_lanes; p < parts; p += key_lanes) {
                const Remote<unsigned char> peer = map_shared(shared, column_served * parts + p);
                store_async(remote_cast<Vec<float, 4>>(peer + (Shape::kScores + (part * source_stride + 4 * four) * 4)),
                            Vec<float, 4>{{score[j], score[j + 1], score[j + 2], score[j + 3]}},
                            remote_cast<Barrier>(peer + Shape::kScoresCame * sizeof(Barrier)));
              }
            }
          }
        }
      }
    }
    if constexpr (Shape::kFrugal) multiply_state();
    // Under way while the context comes together; as they are, since to convert them is to wait for them.
    T x[kGates];
    {
      const int row = live ? sequence_at(zero) : static_cast<int>(first), at = live ? unit + zero : 0;
      const T* from = static_cast<const T*>(args.x_gates) + t * args.x_step + row * args.x_batch + at;
      SEQATTN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) x[gate] = load(from + gate * hidden);
    }
    if (attends) {
      if (fours > 0) {
        barrier_wait(barriers + Shape::kScoresCame, parity);
        if (thread_index() == 0 && t + 1 < steps) barrier_arrive_expect(barriers + Shape::kScoresCame, scores_bytes());
      }

      // Weights: every warp finds the largest score and the sum by itself.
      SEQATTN_UNROLL_BY(1)
      for (int s = thread_index(); s < length; s += Shape::kThreads) {
        float score = 0;
        SEQATTN_UNROLL_BY(1)
        for (int p = 0; p < parts; ++p) score += load(scores + p * source_stride + s);
        if (args.mask != nullptr && !args.mask[static_cast<int64_t>(sequence_served + zero) * source + s])
          score = -INFINITY;
        store(total + s, score);
      }
      block_sync();
      float largest = -INFINITY, weight_sum = 0;
      SEQATTN_UNROLL_BY(1)
      for (int s = lane; s < length; s += 32) {
        const float score = load(total + s);
        largest = score > largest || score != score ? score : largest;
      }
      largest = warp_max(largest);
      const float shift = largest == -INFINITY ? 0.f : largest;
      SEQATTN_UNROLL_BY(1)
      for (int s = lane; s < length; s += 32) weight_sum += FastMath::exp(load(total + s) - shift);
      weight_sum = warp_sum(weight_sum);
      const float scale = weight_sum == 0 ? 0.f : reciprocal_approx(weight_sum);
      const auto weight_of = [&](int s) { return FastMath::exp(load(total + s) - shift) * scale; };

      if (args.weights != nullptr) {
        T* row = static_cast<T*>(args.weights) + (static_cast<int64_t>(sequence_served + zero) * steps + t) * source;
        SEQATTN_UNROLL_BY(1)
        for (int s = (part + zero) * Shape::kThreads + thread_index(); s < source; s += parts * Shape::kThreads) {
          row[s] = from_float<T>(s < length ? weight_of(s) : 0.f);
        }
      }

      if constexpr (Shape::kHistory) {
        const T* fertility = static_cast<const T*>(args.fertility);
        const Shared<float> first_channel = history_at(zero) + half_window;
        const Shared<float> last_channel = first_channel + (channels - 1) * channel_stride(zero);
        SEQATTN_UNROLL_BY(1)
        for (int s = thread_index() + zero; s < source; s += Shape::kThreads) {
          float weight = s < length ? weight_of(s) : 0.f;
          if (args.knows_last) store(first_channel + s, weight);
          if (args.knows_sum && s < length) {
            if (fertility != nullptr) weight /= to_float(fertility[static_cast<int64_t>(sequence_served) * source + s]);
            store(last_channel + s, load(last_channel + s) + weight);
          }
        }
      }

      // Context: this warp's share, then the block's columns of it. What a weight of zero stands at may be NaN.
      float sums[8] = {};
      SEQATTN_UNROLL_BY(1)
      for (int n0 = 0; n0 < value_turns; n0 += kQueue) {
        SEQATTN_UNROLL
        for (int j = 0; j < kQueue; ++j) {
          const int s = value_first + (n0 + j) * value_stride;
          const float weight = s < length ? weight_of(s) : 0.f;
          SEQATTN_UNROLL
          for (int i = 0; i < 8; ++i) sums[i] += weight != 0 ? weight * element<T>(queue[j], i) : 0.f;
          if (n0 + kQueue < value_turns) queue[j] = load(value_at(n0 + j + kQueue));
        }
      }
      SEQATTN_UNROLL
      for (int i = 0; i < 8; ++i) {
        SEQATTN_UNROLL_BY(1)
        for (int m = value_lanes; m < 32; m *= 2) sums[i] += shuffle_xor(sums[i], m);
      }
      if (lane < value_lanes) {
        SEQATTN_UNROLL
        for (int i = 0; i < 8; i += 4) {
          store(shared_cast<Vec<float, 4>>(shares + (warp + zero) * 256 + (value_column + zero) + i),
                Vec<float, 4>{{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]}});
        }
      }
      block_sync();
      SEQATTN_UNROLL_BY(1)
      for (int d0 = warp * 32; d0 < value_count; d0 += Shape::kThreads) {
        const int d = d0 + lane;
        float found = 0;
        if (d < value_count) {
          SEQATTN_UNROLL
          for (int w = 0; w < kWarps; ++w) found += load(shares + w * 256 + d);
        }
        const float neighbour = shuffle_xor(found, 1);
        const uint32_t word = lane & 1 ? pack<T>(neighbour, found) : pack<T>(found, neighbour);
        const Words4 piece = gather_four(word, lane, 2);
        if (d < value_count) {
          const int at = Shape::kContext + piece_place((value_begin + d) / kPiece, column_served) * 16;
          SEQATTN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const Remote<unsigned char> peer = map_shared(shared, (lane + zero) % 8 + 8 * i);
            store_async(remote_cast<Words4>(peer + at), piece,
                        remote_cast<Barrier>(peer + Shape::kContextCame * sizeof(Barrier)));
          }
          static_cast<T*>(
              args.contexts)[(static_cast<int64_t>(sequence_served + zero) * steps + t) * value + value_begin + d] =
              from_float<T>(found);
        }
      }
    }

    barrier_wait(barriers + Shape::kContextCame, parity);
    if (thread_index() == 0 && t + 1 < steps) barrier_arrive_expect(barriers + Shape::kContextCame, context_bytes);
    float pre[kSlots] = {};
    if (args.bias != nullptr) {
      const float* bias = static_cast<const float*>(args.bias) + (live ? unit + zero : 0);
      SEQATTN_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) pre[slot] = load(bias + slot * hidden);
    }
    const Shared<Words4> seen = context + ((split + zero) * kValuePairs * 4 + q) * 8 + fragment;
    SEQATTN_UNROLL
    for (int p = 0; p < kValuePairs; ++p) {
      const Words4 b = load(seen + p * 32);
      SEQATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair[2] = {b[2 * i], b[2 * i + 1]};
        SEQATTN_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          const Words4 words = load(context_weights + (((warp * kValuePairs + p) * kGates + gate) * 2 + i) * 32 + lane);
          const uint32_t a[4] = {words[0], words[1], words[2], words[3]};
          Operand<T>::multiply(sum[gate], a, pair);
        }
      }
    }

    // Accumulator r of all four warps goes to warp r of the group.
    const Shared<float> sent = shared_cast<float>(shared + Shape::kParts) + lane + zero;
    const int first_of_group = (group + zero) * kSplit;
    const auto part_of = [&](int to, int from) {
      return sent + ((first_of_group + to) * (kSplit - 1) + from - 1) * kSlots * 32;
    };
    SEQATTN_UNROLL
    for (int r = 0; r < kSplit; ++r) {
      if (r != split) {
        SEQATTN_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) {
          store(part_of(r, (split - r) & (kSplit - 1)) + slot * 32, sum[slot][r]);
        }
      }
    }
    named_barrier_sync(1 + group, 32 * kSplit);
    float saved[Cell::kSaved ? Cell::kSaved : 1];
    SEQATTN_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      const float (&own)[4] = sum[slot];
      if (slot < kGates) {
        SEQATTN_UNROLL
        for (int gate = 0; gate < kGates; ++gate) {
          if (gate == Cell::x_gate(slot)) pre[slot] += to_float(x[gate]);
        }
      }
      pre[slot] += split < 2 ? (split == 0 ? own[0] : own[1]) : (split == 2 ? own[2] : own[3]);
      SEQATTN_UNROLL
      for (int from = 1; from < kSplit; ++from) pre[slot] += load(part_of(split, from) + slot * 32);
    }
    float h_new, c_new;
    Cell::template forward<FastMath>(pre, h, c, &h_new, &c_new, saved);
    h = live ? Operand<T>::round(h_new) : 0.f;
    if constexpr (Cell::kHasCell) c = live ? c_new : 0.f;

    if (t + 1 < steps) {
      const float neighbour = shuffle_xor(h, 4);
      const uint32_t word = lane & 4 ? pack<T>(neighbour, h) : pack<T>(h, neighbour);
      const Words4 piece = gather_four(word, lane, 8);
      if (present_column) {
        const int at =
            Shape::kState + (1 - parity) * Shape::kStateSize + piece_place((unit + zero) / kPiece, column) * 16;
        const int barrier = (Shape::kStateCame + 1 - parity) * static_cast<int>(sizeof(Barrier));
        SEQATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const Remote<unsigned char> peer = map_shared(shared, g + zero + 8 * i);
          store_async(remote_cast<Words4>(peer + at), piece, remote_cast<Barrier>(peer + barrier));
        }
      }
    }
    if (live) {
      const int64_t at = (static_cast<int64_t>(sequence_at(zero)) * steps + t) * hidden + unit;
      static_cast<T*>(args.output)[at] = from_float<T>(h);
      if (args.saved != nullptr) {
        constexpr int kKept = kept(Cell::kSaved, Cell::kHasCell);
        Vec<T, kKept> values;
        SEQATTN_UNROLL
        for (int i = 0; i < kKept; ++i) values[i] = from_float<T>(Cell::kSaved > 0 ? saved[i] : h);
        store(static_cast<Vec<T, kKept>*>(args.saved) + at, values);
        if constexpr (Cell::kHasCell) args.cells[at] = c;
      }
    }
  }

  if (live) {
    static_cast<T*>(args.hn)[state_at()] = from_float<T>(h);
    if constexpr (Cell::kHasCell) static_cast<T*>(args.cn)[state_at()] = from_float<T>(c);
  }
  cluster_sync();
}

}  // namespace seqattn::gpu
