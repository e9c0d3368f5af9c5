#include "cluster_launch.cuh"

template struct seqattn::gpu::ClusterKernels<seqattn::Gru, seqattn::gpu::bfloat16>;
