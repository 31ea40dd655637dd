// Each sm_90 verb alone, as its header documents it.
#pragma once
#include <trial_params.h>

#include <ptx/cluster.cuh>
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>

__forceinline__ void begin_barriers(u64* barriers, int count) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) mbarrier_init(&barriers[i], 1);
    fence_barrier_init();
  }
  __syncthreads();
}

// out: the n bytes of a box of map_a at coordinates b [kRank] int, as they lie in shared memory; map_out: the box is written to its
// origin and added at b.
template <int kRank>
__global__ void __launch_bounds__(32) box_kernel(const __grid_constant__ TrialParams p) {
  u8* box = shared_memory();
  u64* full = reinterpret_cast<u64*>(box + (p.n + 1023) / 1024 * 1024);
  const int* x = static_cast<const int*>(p.b);
  begin_barriers(full, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(full, p.n);
    if constexpr (kRank == 2) tma_load(box, p.map_a, full, x[0], x[1]);
    if constexpr (kRank == 3) tma_load(box, p.map_a, full, x[0], x[1], x[2]);
    if constexpr (kRank == 4) tma_load(box, p.map_a, full, x[0], x[1], x[2], x[3]);
    if constexpr (kRank == 5) tma_load(box, p.map_a, full, x[0], x[1], x[2], x[3], x[4]);
  }
  mbarrier_wait(full, 0);
  for (int i = 16 * threadIdx.x; i < p.n; i += 512) store_16(static_cast<u8*>(p.out) + i, load_shared_16(box + i));
  if (threadIdx.x == 0) {
    if constexpr (kRank == 2) tma_store(p.map_out, box, 0, 0);
    if constexpr (kRank == 3) tma_store(p.map_out, box, 0, 0, 0);
    if constexpr (kRank == 4) tma_store(p.map_out, box, 0, 0, 0, 0);
    if constexpr (kRank == 5) tma_store(p.map_out, box, 0, 0, 0, 0, 0);
    bulk_commit();
    bulk_wait<0>();
    if constexpr (kRank == 2) tma_reduce_add(p.map_out, box, x[0], x[1]);
    if constexpr (kRank == 3) tma_reduce_add(p.map_out, box, x[0], x[1], x[2]);
    if constexpr (kRank == 4) tma_reduce_add(p.map_out, box, x[0], x[1], x[2], x[3]);
    if constexpr (kRank == 5) tma_reduce_add(p.map_out, box, x[0], x[1], x[2], x[3], x[4]);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// out [2, n] float: a [n] by bulk copies, then a added to what out held. Each block of a cluster of two gets a by multicast of b's
// map and writes it to its own n of out's second half [2, n].
__global__ void __launch_bounds__(32) bulk_kernel(const __grid_constant__ TrialParams p) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  float* out = static_cast<float*>(p.out);
  u64* full = reinterpret_cast<u64*>(memory + 2 * p.n);
  const u32 bytes = 4 * p.n, rank = cluster_rank();
  begin_barriers(full, 2);
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&full[0], bytes);
    mbarrier_arrive_expect(&full[1], bytes);
    bulk_load(memory, p.a, bytes, &full[0]);
    if (rank == 1) tma_load_multicast(memory + p.n, p.map_b, &full[1], 3, 0, 0);
    while (!mbarrier_try_wait(&full[0], 0)) {
    }
    if (rank == 0) {
      bulk_store(out, memory, bytes);
      bulk_reduce_add(out + p.n, memory, bytes);
    }
    mbarrier_wait(&full[1], 0);
    bulk_store(out + (2 + rank) * p.n, memory + p.n, bytes);
    bulk_commit();
    bulk_wait_read<0>();
  }
  cluster_sync();
}

// out [64, N] float (+)= a · b^T by a warpgroup: a [64, 16 k-steps], b [N, 16 k-steps] in bf16 or f16, brought by TMA with a
// swizzle of kSwizzle bytes. Operands k-major lie in parts of kSwizzle bytes of k, those mn-major (k rows in memory) in parts of
// kSwizzle bytes of m or n. `fault` 1: a comes from registers; 2: out's former values are added.
template <class T, int N, int kSwizzle, int kTransposeA, int kTransposeB, int kSteps>
__global__ void __launch_bounds__(128) wgmma_kernel(const __grid_constant__ TrialParams p) {
  constexpr int kK = 16 * kSteps, kWide = kSwizzle / 2;
  u8 *a = shared_memory(), *b = a + 64 * kK * 2 + 1024;
  b -= (b - a) % 1024;
  u64* full = reinterpret_cast<u64*>(b + N * kK * 2);
  const int t = threadIdx.x, warp = t / 32, g = t % 32 / 4, c = t % 4 * 2;
  begin_barriers(full, 1);
  if (t == 0) {
    mbarrier_arrive_expect(full, (64 + N) * kK * 2);
    auto bring = [&](u8* tile, const TensorMap& map, int rows, bool transposed) {
      const int wide = transposed ? rows : kK, high = transposed ? kK : rows;
      for (int i = 0; i < wide; i += kWide) tma_load(tile + i * 2 * high, map, full, i, 0);
    };
    bring(a, p.map_a, 64, kTransposeA);
    bring(b, p.map_b, N, kTransposeB);
  }
  mbarrier_wait(full, 0);
  float d[N / 2];
  float* out = static_cast<float*>(p.out) + (16 * warp + g) * N + c;
  for (int j = 0; j < N / 8; ++j) {
    for (int i = 0; i < 4; ++i) d[4 * j + i] = out[i / 2 * 8 * N + 8 * j + i % 2];
  }
  // Groups of 8 rows of the atom follow each other; k-major operands step through k within a part, then to the next one.
  constexpr u32 kGroup = 8 * kSwizzle;
  auto operand = [&](const u8* tile, int rows, bool transposed, int k) {
    if (transposed) return wgmma_advance(wgmma_descriptor<kSwizzle>(tile, kK * kSwizzle, kGroup), k * kSwizzle);
    return wgmma_advance(wgmma_descriptor<kSwizzle>(tile, 16, kGroup), k / kWide * rows * kSwizzle + k % kWide * 2);
  };
  u32 r[kSteps][4];
  const T* rows = static_cast<const T*>(p.a) + (16 * warp + g) * kK;
  for (int s = 0; s < kSteps; ++s) {
    for (int i = 0; i < 4; ++i) {
      const T* x = rows + i % 2 * 8 * kK + 16 * s + c + i / 2 * 8;
      r[s][i] = p.fault & 1 ? static_cast<u32>(x[1].bits) << 16 | x[0].bits : 0;
    }
  }
  wgmma_fence();
  for (int s = 0; s < kSteps; ++s) {
    const bool accumulate = s > 0 || (p.fault & 2);
    const u64 y = operand(b, N, kTransposeB, 16 * s);
    if (p.fault & 1) {
      wgmma_rs<T, kTransposeB>(d, r[s][0], r[s][1], r[s][2], r[s][3], y, accumulate);
    } else {
      wgmma_ss<T, kTransposeA, kTransposeB>(d, operand(a, 64, kTransposeA, 16 * s), y, accumulate);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int j = 0; j < N / 8; ++j) {
    for (int i = 0; i < 4; ++i) out[i / 2 * 8 * N + 8 * j + i % 2] = d[4 * j + i];
  }
}

// out [24] i64: descriptors of the operands of products by steps of 16 along k, without the tile's address: a [64, 128] and
// b [128, 128] (k rows in memory) with a 128-byte swizzle, a [64, 64] (k rows), b [64, 32] (k rows) with a 64-byte swizzle.
__global__ void __launch_bounds__(32) descriptors_kernel(const __grid_constant__ TrialParams p) {
  u64* out = static_cast<u64*>(p.out);
  const u8* tile = shared_memory();
  if (threadIdx.x != 0) return;
  const u64 at = shared_address(tile) >> 4;
  for (int k = 0; k < 8; ++k) *out++ = wgmma_advance(wgmma_k_major(tile), k / 4 * (64 * 128) + k % 4 * 32) - at;
  for (int k = 0; k < 8; ++k) *out++ = wgmma_advance(wgmma_mn_major(tile, 128 * 128), k * 16 * 128) - at;
  for (int k = 0; k < 4; ++k) *out++ = wgmma_advance(wgmma_mn_major(tile, 64 * 128), k * 16 * 128) - at;
  for (int k = 0; k < 4; ++k) *out++ = wgmma_advance(wgmma_descriptor<64>(tile, 64 * 64, 8 * 64), k * 16 * 64) - at;
}

// out [64] float: 64 consumers take n numbers, one at a time, from a slot that 32 producers fill; named barriers 1 (full) and 2
// (free).
__global__ void __launch_bounds__(96) handover_kernel(const __grid_constant__ TrialParams p) {
  float* slot = reinterpret_cast<float*>(shared_memory());
  const int t = threadIdx.x;
  if (t >= 64) {
    for (int i = 0; i < p.n; ++i) {
      if (i > 0) named_barrier_sync(2, 96);
      if (t == 64) *slot = static_cast<const float*>(p.a)[i];
      named_barrier_arrive(1, 96);
    }
  } else {
    float sum = 0.0f;
    for (int i = 0; i < p.n; ++i) {
      named_barrier_sync(1, 96);
      sum += *slot;
      if (i + 1 < p.n) named_barrier_arrive(2, 96);
    }
    static_cast<float*>(p.out)[t] = sum;
  }
}

// out [cluster] float: every block puts its number + 1 into all others and tells their mbarriers; each sums what it got.
__global__ void __launch_bounds__(32) exchange_kernel(const __grid_constant__ TrialParams p) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  u64* heard = reinterpret_cast<u64*>(memory + 16);
  const u32 rank = cluster_rank(), size = cluster_size(), t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(heard, size);
    fence_barrier_init();
  }
  cluster_arrive();
  cluster_wait();
  if (t < size) {
    store_cluster(&memory[rank], t, 1.0f + rank);
    mbarrier_arrive_remote(heard, t);
  }
  mbarrier_wait(heard, 0);
  if (t == 0) {
    float sum = 0.0f;
    for (u32 i = 0; i < size; ++i) sum += memory[i];
    static_cast<float*>(p.out)[rank] = sum;
  }
  cluster_sync();
}
