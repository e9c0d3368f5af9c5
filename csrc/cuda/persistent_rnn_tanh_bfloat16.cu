#include "persistent_launch.cuh"

template struct seqattn::gpu::PersistentKernels<seqattn::RnnTanh, seqattn::gpu::bfloat16>;
