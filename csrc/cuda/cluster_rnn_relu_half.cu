#include "cluster_launch.cuh"

template struct seqattn::gpu::ClusterKernels<seqattn::RnnRelu, seqattn::gpu::half>;
