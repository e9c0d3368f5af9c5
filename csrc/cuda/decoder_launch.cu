#include "decoder_forward.cuh"

namespace seqattn::gpu {
namespace {

// Longest of the sizes the instances below hold.
constexpr int64_t kMostHidden = 512, kMostValue = 512;

template <class Shape>
const char* start(const DecoderForward& args, int64_t shared_limit, Stream stream) {
  Launch l{.block = Shape::kThreads, .cluster = Shape::kCluster};
  const auto shape = [&](int columns) {
    l.grid = static_cast<int>((args.batch + columns - 1) / columns) * Shape::kCluster;
    l.shared_bytes = static_cast<size_t>(Shape::shared_bytes(args.source, Shape::kCluster / columns));
  };
  // As few columns a cluster as let all clusters run at once: each then has more blocks for its attention.
  shape(Shape::kColumns);
  if (static_cast<int64_t>(l.shared_bytes) > shared_limit) return "S: expected fewer source steps";
  const int resident = resident_clusters(cluster_decoder_forward<Shape>, l);
  if (resident == 0) return "no cluster of 16 blocks fits this device";
  int columns = Shape::kColumns;
  for (int fewer = 1; fewer < Shape::kColumns; fewer *= 2) {
    if ((args.batch + fewer - 1) / fewer <= resident &&
        Shape::shared_bytes(args.source, Shape::kCluster / fewer) <= shared_limit) {
      columns = fewer;
      break;
    }
  }
  shape(columns);
  launch(cluster_decoder_forward<Shape>, l, stream, args, columns);
  return nullptr;
}

template <class Cell, class T>
const char* with_size(const DecoderForward& args, int64_t shared_limit, Stream stream) {
  if (args.hidden <= 256 && args.attention <= 256) {
    return start<ClusterDecoder<Cell, T, 2, 4, 8>>(args, shared_limit, stream);
  }
  return start<ClusterDecoder<Cell, T, 4, 4, 4>>(args, shared_limit, stream);
}

template <class Cell>
const char* with_type(const DecoderForward& args, int64_t shared_limit, Stream stream) {
  return args.dtype == DType::kBFloat16 ? with_size<Cell, bfloat16>(args, shared_limit, stream)
                                        : with_size<Cell, half>(args, shared_limit, stream);
}

}  // namespace

const char* decoder_why_not(const DecoderForward& args, int64_t shared_limit) {
  if (args.dtype != DType::kBFloat16 && args.dtype != DType::kFloat16) return "dtype: expected bfloat16 or float16";
  if (args.hidden > kMostHidden || args.attention > kMostHidden) return "H and A: expected at most 512";
  if (args.value > kMostValue) return "D: expected at most 512";
  if (args.attention % 8 || args.value % 8) return "A and D: expected multiples of 8";
  // The largest instance's need; the smaller one's is less.
  using Largest = ClusterDecoder<Lstm, bfloat16, 4, 4, 4>;
  if (Largest::shared_bytes(args.source, 2) > shared_limit) return "S: expected fewer source steps";
  return nullptr;
}

const char* decoder_forward(const DecoderForward& args, int64_t shared_limit, void* stream) {
  if (const char* reason = decoder_why_not(args, shared_limit)) return reason;
  if (args.batch == 0) return nullptr;
  const Stream on = static_cast<Stream>(stream);
  int number = 0;
#define SEQATTN_TRY(Cell) \
  if (args.cell == number++) return with_type<Cell>(args, shared_limit, on);
  SEQATTN_FOR_EACH_CELL(SEQATTN_TRY)
#undef SEQATTN_TRY
  return "cell: expected a number of the registry";
}

}  // namespace seqattn::gpu
