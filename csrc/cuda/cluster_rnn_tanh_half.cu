#include "cluster_launch.cuh"

template struct seqattn::gpu::ClusterKernels<seqattn::RnnTanh, seqattn::gpu::half>;
