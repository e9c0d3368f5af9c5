#include "persistent_launch.cuh"

template struct seqattn::gpu::PersistentKernels<seqattn::Gru, seqattn::gpu::bfloat16>;
