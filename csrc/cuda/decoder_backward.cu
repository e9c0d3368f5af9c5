#include <stdexcept>

#include "decoder_backward.cuh"

namespace seqattn::gpu {
namespace {

Launch over(int64_t threads) {
  const int64_t blocks = (threads + kCellThreads - 1) / kCellThreads;
  if (blocks > INT32_MAX) throw std::runtime_error("x_gates: too many values for one CUDA kernel");
  return {.grid = static_cast<int>(blocks), .block = kCellThreads};
}

template <class F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(bfloat16());
  if (dtype == DType::kFloat16) return f(half());
  throw std::runtime_error("dtype: expected bfloat16 or float16");
}

}  // namespace

void decoder_backward_cell(const DecoderBackward& args, int64_t t, void* stream) {
  int number = 0;
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
#define SEQATTN_TRY(Cell)                                                                                            \
  if (args.cell == number++) {                                                                                       \
    launch(decoder_backward_cell_kernel<Cell, T>, over(args.batch * args.hidden), static_cast<Stream>(stream), args, \
           static_cast<int>(t));                                                                                     \
  }
    SEQATTN_FOR_EACH_CELL(SEQATTN_TRY)
#undef SEQATTN_TRY
  });
}

void decoder_backward_attention(const DecoderBackward& args, int64_t t, int sm_count, void* stream) {
  using Shape = DecoderAttentionBackward;
  // As many blocks as there is room for side by side.
  int blocks = 1;
  while (blocks < Shape::kMaxBlocks && args.batch * blocks * 2 <= sm_count) blocks *= 2;
  const Launch l{.grid = static_cast<int>(args.batch * blocks),
                 .block = Shape::kThreads,
                 .cluster = blocks,
                 .shared_bytes = static_cast<size_t>(Shape::shared_bytes(args.source))};
  with_type(args.dtype, [&](auto zero) {
    launch(decoder_backward_attention_kernel<decltype(zero)>, l, static_cast<Stream>(stream), args, static_cast<int>(t),
           blocks);
  });
}

void decoder_backward_finish(const DecoderBackward& args, void* stream) {
  with_type(args.dtype, [&](auto zero) {
    launch(decoder_backward_finish_kernel<decltype(zero)>, over(args.batch * args.hidden), static_cast<Stream>(stream),
           args);
  });
}

}  // namespace seqattn::gpu
