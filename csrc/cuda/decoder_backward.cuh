// Backward of the attentional decoder, a step at a time (decoder.h): the cell, one thread for each unit of each
// sequence, and the attention, a cluster of blocks for each sequence.
#pragma once

#include "decoder_forward.cuh"

namespace seqattn::gpu {

inline constexpr int kCellThreads = 128;

template <class Cell, class T>
SEQATTN_KERNEL(kCellThreads)
decoder_backward_cell_kernel(SEQATTN_KERNEL_PARAM DecoderBackward args, int t) {
  constexpr int kGates = Cell::kGates, kSlots = Cell::kSlots, kKept = kept(Cell::kSaved, Cell::kHasCell);
  const int64_t i = static_cast<int64_t>(block_index()) * kCellThreads + thread_index();
  const int64_t H = args.hidden, b = i / H, j = i % H, row = b * args.steps + t;
  if (b >= args.batch) return;
  const bool last = t + 1 == args.steps;
  float dh = last ? 0.f : args.h_product[i] + args.dh[i];
  if (args.d_output != nullptr) dh += to_float(static_cast<const T*>(args.d_output)[row * H + j]);

  float values[kKept + 1], h = 0, h_new = 0, c = 0, dc = 0;
  const Vec<T, kKept> read = load(static_cast<const Vec<T, kKept>*>(args.saved) + row * H + j);
  SEQATTN_UNROLL
  for (int k = 0; k < kKept; ++k) values[k] = to_float(read[k]);
  if constexpr (Cell::kSaved == 0) h_new = values[0];
  if (t > 0) {
    h = to_float(static_cast<const T*>(args.output)[(row - 1) * H + j]);
  } else if (args.h0 != nullptr) {
    h = to_float(static_cast<const T*>(args.h0)[i]);
  }
  if constexpr (Cell::kHasCell) {
    values[kKept] = args.cells[row * H + j];
    if (t > 0) {
      c = args.cells[(row - 1) * H + j];
    } else if (args.c0 != nullptr) {
      c = to_float(static_cast<const T*>(args.c0)[i]);
    }
    if (!last) {
      dc = args.dc[i];
    } else if (args.d_cn != nullptr) {
      dc = to_float(static_cast<const T*>(args.d_cn)[i]);
    }
  }

  float d_pre[kSlots], dh_before = 0, dc_before = 0;
  Cell::template backward<FastMath>(values, h, c, h_new, dh, dc, d_pre, &dh_before, &dc_before);
  args.dh[i] = dh_before;
  if constexpr (Cell::kHasCell) args.dc[i] = dc_before;
  T* d_x = static_cast<T*>(args.d_x_gates) + row * (kGates * H) + j;
  T* d_h = static_cast<T*>(args.d_step) + row * args.step_width + j;
  SEQATTN_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot < kGates) d_x[Cell::x_gate(slot) * H] = from_float<T>(d_pre[slot]);
    if (slot >= kSlots - kGates) d_h[Cell::h_gate(slot) * H] = from_float<T>(d_pre[slot]);
  }
}

template <class T>
SEQATTN_KERNEL(kCellThreads)
decoder_backward_finish_kernel(SEQATTN_KERNEL_PARAM DecoderBackward args) {
  const int64_t i = static_cast<int64_t>(block_index()) * kCellThreads + thread_index();
  if (i >= args.batch * args.hidden) return;
  if (args.d_h0 != nullptr) static_cast<T*>(args.d_h0)[i] = from_float<T>(args.h_product[i] + args.dh[i]);
  if (args.d_c0 != nullptr) static_cast<T*>(args.d_c0)[i] = from_float<T>(args.dc[i]);
}

// Blocks of a sequence share its keys and values. Each finds the gradients of the weights of its own source steps and
// tells them to all others; then each has a range of the features of q, for which it goes over all source steps.
struct DecoderAttentionBackward {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kMaxBlocks = 8;
  static constexpr int kPieces = 2;  // of 8 values that a lane has of a row of up to 512
  static constexpr int kRows = 4;    // rows of keys (values) that a thread has under way
  // Floats of shared memory: the threads' shares of q's gradient, then gradients of weights and of scores.
  static constexpr int kShares = kThreads * 8;
  static constexpr int64_t shared_bytes(int64_t source) { return (kShares + 2 * source) * 4; }
};

template <class T>
SEQATTN_KERNEL(DecoderAttentionBackward::kThreads, 1)
decoder_backward_attention_kernel(SEQATTN_KERNEL_PARAM DecoderBackward args, int t, int blocks) {
  using Shape = DecoderAttentionBackward;
  constexpr int kWarps = Shape::kWarps, kThreads = Shape::kThreads, kPieces = Shape::kPieces, kRows = Shape::kRows;
  const int lane = lane_index(), warp = warp_index();
  const int rank = block_index() % blocks, b = block_index() / blocks;
  const int source = static_cast<int>(args.source), features = static_cast<int>(args.attention);
  const int value = static_cast<int>(args.value);
  const int64_t row = static_cast<int64_t>(b) * args.steps + t;
  int length = source;
  if (args.lengths != nullptr) {
    const int64_t n = args.lengths[b];
    length = n < 0 ? 0 : n < source ? static_cast<int>(n) : source;
  }
  const auto eight_at = [](const void* array, int64_t i) {
    return reinterpret_cast<const Words4*>(static_cast<const T*>(array) + i);
  };
  if (blocks > 1) cluster_arrive();  // before a block writes to another, that one must run
  const Shared<float> shares = dynamic_shared<float>();
  const Shared<float> d_weights = shares + Shape::kShares, d_scores = d_weights + source;
  const T* weights = static_cast<const T*>(args.weights) + row * source;

  // The context's gradient: this lane's columns of it.
  float d_context[kPieces][8];
  SEQATTN_UNROLL
  for (int p = 0; p < kPieces; ++p) {
    const int column = (p * 32 + lane) * 8;
    SEQATTN_UNROLL
    for (int i = 0; i < 8; ++i) d_context[p][i] = 0;
    if (column < value) {
      const float* product = args.context_product + static_cast<int64_t>(b) * value + column;
      Words4 given{}, sum;
      if (args.d_contexts != nullptr) given = load(eight_at(args.d_contexts, row * value + column));
      SEQATTN_UNROLL
      for (int i = 0; i < 8; ++i) d_context[p][i] = element<T>(given, i) + product[i];
      SEQATTN_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] = pack<T>(d_context[p][2 * i], d_context[p][2 * i + 1]);
      if (rank == 0 && warp == 0) {
        store(reinterpret_cast<Words4*>(static_cast<T*>(args.d_context) + row * value + column), sum);
      }
    }
  }

  // Gradients of the weights: a row of values a warp, kRows of them at a time. What a weight of zero stands at may be
  // NaN.
  const T* values = static_cast<const T*>(args.values) + static_cast<int64_t>(b) * source * value;
  const int stride = blocks * kWarps;
  if (blocks > 1) cluster_wait();
  for (int first = rank * kWarps + warp; first < length; first += kRows * stride) {
    Words4 read[kRows][kPieces];
    SEQATTN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      const int s = first + n * stride < length ? first + n * stride : length - 1;
      SEQATTN_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        const int column = (p * 32 + lane) * 8;
        read[n][p] =
            load(reinterpret_cast<const Words4*>(row_at(values, s, value * 2) + (column < value ? column : 0)));
      }
    }
    SEQATTN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      float sum = 0;
      SEQATTN_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        const bool there = (p * 32 + lane) * 8 < value;
        SEQATTN_UNROLL
        for (int i = 0; i < 8; ++i) sum += there ? d_context[p][i] * element<T>(read[n][p], i) : 0.f;
      }
      sum = warp_sum(sum);
      const int s = first + n * stride;
      if (s < length && lane < blocks) {
        if (args.d_weights != nullptr) sum += to_float(static_cast<const T*>(args.d_weights)[row * source + s]);
        if (to_float(weights[s]) == 0) sum = 0;
        if (blocks == 1) {
          store(d_weights + s, sum);
        } else {
          store_remote(map_shared(d_weights + s, lane), sum);
        }
      }
    }
  }
  if (blocks == 1) {
    block_sync();
  } else {
    cluster_sync();
  }

  // Through the softmax.
  float mean = 0;
  for (int s = lane; s < length; s += 32) mean += to_float(weights[s]) * load(d_weights + s);
  mean = warp_sum(mean);
  for (int s = thread_index(); s < source; s += kThreads) {
    float d_score = 0;
    if (s < length) {
      const float weight = to_float(weights[s]);
      d_score = weight != 0 ? weight * (load(d_weights + s) - mean) : 0.f;
      store(d_scores + s, d_score);
    }
    if (rank == 0) args.d_scores[row * source + s] = d_score;
  }
  block_sync();

  // q: a thread has eight features and every `groups`-th source step.
  const int pieces = features / 8, part = (pieces + blocks - 1) / blocks, begin = rank * part;
  const int count = pieces - begin < part ? pieces - begin : part;
  int threads_a_row = 1;
  while (threads_a_row < part) threads_a_row *= 2;
  const int groups = kThreads / threads_a_row, group = thread_index() / threads_a_row;
  const int piece = thread_index() % threads_a_row, column = (begin + piece) * 8;
  if (piece < count) {
    float sums[8] = {};
    const Words4 query = load(eight_at(args.queries, row * features + column));
    const T* keys = static_cast<const T*>(args.keys) + static_cast<int64_t>(b) * source * features + column;
    for (int first = group; first < length; first += kRows * groups) {
      Words4 read[kRows];
      SEQATTN_UNROLL
      for (int n = 0; n < kRows; ++n) {
        const int s = first + n * groups;
        read[n] = load(reinterpret_cast<const Words4*>(row_at(keys, s < length ? s : length - 1, features * 2)));
      }
      SEQATTN_UNROLL
      for (int n = 0; n < kRows; ++n) {
        const int s = first + n * groups;
        const float d_score = s < length ? load(d_scores + s) : 0.f;
        SEQATTN_UNROLL
        for (int i = 0; i < 8; ++i) {
          const float y = tanh_approx(element<T>(query, i) + element<T>(read[n], i));
          sums[i] += d_score != 0 ? d_score * (1 - y * y) : 0.f;
        }
      }
    }
    SEQATTN_UNROLL
    for (int i = 0; i < 8; ++i) store(shares + ((group * threads_a_row + piece) * 8 + i), sums[i]);
  }
  block_sync();
  T* d_query = static_cast<T*>(args.d_step) + (row + 1) * args.step_width - features + begin * 8;
  for (int a = thread_index(); a < count * 8; a += kThreads) {
    float sum = 0;
    for (int n = 0; n < groups; ++n) sum += load(shares + (n * threads_a_row * 8 + a));
    d_query[a] = from_float<T>(sum * args.v[begin * 8 + a]);
  }
}

}  // namespace seqattn::gpu
