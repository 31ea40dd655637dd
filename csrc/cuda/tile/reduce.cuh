// Sums over threads, in an order that depends on their number alone. Every thread gets every sum.
#pragma once
#include <ptx/cluster.cuh>

constexpr int kMaxCluster = 8;  // blocks; more need a launch that is not portable

// Over groups of `lanes` neighbouring lanes, a power of two up to 32.
template <int kCount>
__forceinline__ void sum_lanes(float (&x)[kCount], u32 lanes) {
  for (u32 apart = lanes / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], apart);
  }
}

// What sum_block and sum_cluster of kCount sums need of shared memory; not to be touched again, by the next sum either,
// until the block (the cluster) has passed one more barrier.
template <int kCount>
struct SumScratch {
  float of_warp[32][kCount];
  float of_block[kMaxCluster][kCount];
};

// Over the `lanes` threads from `first` on, whole warps; every thread of the block takes part, in a group of its own.
template <int kCount>
__forceinline__ void sum_warps(float (&x)[kCount], u32 first, u32 lanes, SumScratch<kCount>& scratch) {
  sum_lanes(x, 32);
  const u32 lane = threadIdx.x % 32;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch.of_warp[threadIdx.x / 32][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = lane < lanes / 32 ? scratch.of_warp[first / 32 + lane][i] : 0.0f;
  sum_lanes(x, 32);
}

// Over the whole block.
template <int kCount>
__forceinline__ void sum_block(float (&x)[kCount], SumScratch<kCount>& scratch) {
  sum_warps(x, 0, blockDim.x, scratch);
}

// Over the whole cluster (sm_90), whose blocks must all have started.
template <int kCount>
__forceinline__ void sum_cluster(float (&x)[kCount], SumScratch<kCount>& scratch) {
  sum_block(x, scratch);
  const u32 blocks = cluster_size();
  if (threadIdx.x < blocks) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) store_cluster(&scratch.of_block[cluster_rank()][i], threadIdx.x, x[i]);
  }
  cluster_sync();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0.0f;
    for (u32 block = 0; block < blocks; ++block) x[i] += scratch.of_block[block][i];
  }
}

// How the threads of a block share its rows: thread `lane` of the `lanes` that have row `group` of `groups`. kWhole: the block
// has one row.
template <bool kWhole = false>
struct Sharing {
  u32 lanes, lane, group, groups;
  __forceinline__ explicit Sharing(u32 threads) : lanes(kWhole ? blockDim.x : threads), lane(threadIdx.x), group(0), groups(1) {
    if (!kWhole && lanes < blockDim.x) {
      lane = threadIdx.x % lanes;
      group = threadIdx.x / lanes;
      groups = blockDim.x / lanes;
    }
  }
};

// Over the threads that share a row: the cluster, the block, whole warps, or neighbours of a warp.
template <bool kCluster, bool kWhole, int kCount>
__forceinline__ void sum_row(float (&x)[kCount], const Sharing<kWhole>& row, SumScratch<kCount>& scratch) {
  if constexpr (kCluster) {
    sum_cluster(x, scratch);
  } else if constexpr (kWhole) {
    sum_block(x, scratch);
  } else if (row.lanes > 32) {
    sum_warps(x, row.group * row.lanes, row.lanes, scratch);
  } else {
    sum_lanes(x, row.lanes);
  }
}
