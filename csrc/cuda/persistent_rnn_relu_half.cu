#include "persistent_launch.cuh"

template struct seqattn::gpu::PersistentKernels<seqattn::RnnRelu, seqattn::gpu::half>;
