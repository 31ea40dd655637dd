// Blocks of one cluster run at the same time on neighbouring multiprocessors and reach each other's shared memory (sm_90).
// A block must not end while another may still access its shared memory: cluster_sync before returning.
#pragma once
#include <ptx/core.cuh>

// This block's number in its cluster, and how many blocks it has (1 when launched without clusters).
__forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__forceinline__ u32 cluster_size() {
  u32 size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// A barrier of all threads of the cluster in two halves: accesses before the arrival of one thread are visible behind the
// wait of every other. Each thread arrives once, then waits once.
__forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address, in the window of the whole cluster, of what lies at this place in the shared memory of block `rank`.
__forceinline__ u32 cluster_address(const void* p, u32 rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
// Loads and stores through the shared memory of block `rank`, at the place where p lies in this block's.
__forceinline__ float load_cluster(const float* p, u32 rank) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(cluster_address(p, rank)) : "memory");
  return x;
}
__forceinline__ void store_cluster(float* p, u32 rank, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(cluster_address(p, rank)), "f"(x) : "memory");
}
