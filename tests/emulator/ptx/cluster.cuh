// Stands in for csrc/cuda/ptx/cluster.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ u32 cluster_rank() { return emulator::cluster_rank(); }
__forceinline__ u32 cluster_size() { return emulator::cluster_size(); }
__forceinline__ void cluster_arrive() { emulator::cluster_arrive(); }
__forceinline__ void cluster_wait() { emulator::cluster_wait(); }
__forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
__forceinline__ u32 cluster_address(const void* p, u32 rank) { return emulator::cluster_address(p, rank); }
__forceinline__ float load_cluster(const float* p, u32 rank) { return emulator::load_cluster(p, rank); }
__forceinline__ void store_cluster(float* p, u32 rank, float x) { emulator::store_cluster(p, rank, x); }
