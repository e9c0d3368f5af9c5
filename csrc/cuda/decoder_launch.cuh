// Chooses an instance of the decoder's kernel and launches it: with a history of weights in its scores, or without.
#pragma once

#include <algorithm>

#include "decoder_forward.cuh"
#include "plan.h"
#include "resident.cuh"

namespace seqattn::gpu {

template <class Shape>
const char* start(const DecoderForward& args, int64_t shared_limit, Stream stream) {
  constexpr DecoderShape kShape{Shape::kHidden, Shape::kValue};
  static_assert(Shape::shared_bytes(100, 2) == decoder_shared_bytes(kShape, Shape::kGates, Shape::kSlots, 100, 2));
  static Resident held_by_device;
  const int64_t history = decoder_history_bytes(args.source, args.filters, args.channels, args.window);
  const auto shared_bytes = [&](int columns) {
    return Shape::shared_bytes(args.source, Shape::kCluster / columns) + history;
  };
  Launch l{.block = Shape::kThreads, .cluster = Shape::kCluster};
  l.grid = Shape::kCluster;
  l.shared_bytes = static_cast<size_t>(shared_bytes(Shape::kColumns));
  if (shared_bytes(Shape::kColumns) > shared_limit) return "S: expected fewer source steps";
  const int resident = held_by_device.clusters(cluster_decoder_forward<Shape>, l);
  if (resident == 0) return "no cluster of 16 blocks fits this device";
  // As many sequences at a time as all clusters that run at once have columns, but no more columns than these need:
  // with fewer, a column has more blocks for its attention.
  for (int64_t first = 0; first < args.batch;) {
    const int64_t left = args.batch - first;
    int columns = 1;
    while (columns < Shape::kColumns && (left > int64_t(columns) * resident || shared_bytes(columns) > shared_limit)) {
      columns *= 2;
    }
    const int64_t count = std::min(left, int64_t(columns) * resident);
    l.grid = static_cast<int>((count + columns - 1) / columns) * Shape::kCluster;
    l.shared_bytes = static_cast<size_t>(shared_bytes(columns));
    launch(cluster_decoder_forward<Shape>, l, stream, args, static_cast<int>(first), columns);
    first += count;
  }
  return nullptr;
}

template <class Cell, class T, bool kHistory>
const char* with_size(const DecoderForward& args, int64_t shared_limit, Stream stream) {
  if (args.hidden <= kSmallDecoder.hidden && args.attention <= kSmallDecoder.hidden) {
    return start<ClusterDecoder<Cell, T, 2, 4, 4, kHistory>>(args, shared_limit, stream);
  }
  return start<ClusterDecoder<Cell, T, 4, 4, 4, kHistory>>(args, shared_limit, stream);
}

template <class Cell, bool kHistory>
const char* with_type(const DecoderForward& args, int64_t shared_limit, Stream stream) {
  return args.dtype == DType::kBFloat16 ? with_size<Cell, bfloat16, kHistory>(args, shared_limit, stream)
                                        : with_size<Cell, half, kHistory>(args, shared_limit, stream);
}

template <bool kHistory>
const char* launch_decoder(const DecoderForward& args, int64_t shared_limit, Stream stream) {
  int number = 0;
#define SEQATTN_TRY(Cell) \
  if (args.cell == number++) return with_type<Cell, kHistory>(args, shared_limit, stream);
  SEQATTN_FOR_EACH_CELL(SEQATTN_TRY)
#undef SEQATTN_TRY
  return "cell: expected a number of the registry";
}

extern template const char* launch_decoder<true>(const DecoderForward&, int64_t, Stream);

}  // namespace seqattn::gpu
