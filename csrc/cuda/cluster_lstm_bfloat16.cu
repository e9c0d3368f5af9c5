#include "cluster_launch.cuh"

template struct seqattn::gpu::ClusterKernels<seqattn::Lstm, seqattn::gpu::bfloat16>;
