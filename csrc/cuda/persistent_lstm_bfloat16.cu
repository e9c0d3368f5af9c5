#include "persistent_launch.cuh"

template struct seqattn::gpu::PersistentKernels<seqattn::Lstm, seqattn::gpu::bfloat16>;
