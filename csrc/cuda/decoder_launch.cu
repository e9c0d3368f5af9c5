#include "decoder_launch.cuh"

namespace seqattn::gpu {

const char* decoder_forward(const DecoderForward& args, int64_t shared_limit, void* stream) {
  if (args.batch == 0) return nullptr;
  const Stream on = static_cast<Stream>(stream);
  return args.filters ? launch_decoder<true>(args, shared_limit, on) : launch_decoder<false>(args, shared_limit, on);
}

}  // namespace seqattn::gpu
