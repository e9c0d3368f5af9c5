#include "decoder_launch.cuh"

namespace seqattn::gpu {

template const char* launch_decoder<true>(const DecoderForward&, int64_t, Stream);

}  // namespace seqattn::gpu
