// Kernels with a mistake on request (fault > 0), of sm_90's kind.
#pragma once
#include <trial_params.h>

#include <ptx/cluster.cuh>
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/registers.cuh>
#include <ptx/stmatrix.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>

// out [64, 64] = a [64, 64 n] · b [64, 64 n]^T in bf16, n tiles through a ring of two stages. Warps 0-3 multiply, warp 4 feeds.
__global__ void __launch_bounds__(384) product_kernel(const __grid_constant__ TrialParams p) {
  constexpr int kTile = 64 * 128, kStages = 2;
  u8* memory = shared_memory();  // a and b of each stage, out
  u8* staging = memory + 2 * kStages * kTile;
  u64 *full = reinterpret_cast<u64*>(staging + kTile), *empty = full + kStages;
  const int fault = p.fault, t = threadIdx.x, warp = t / 32, lane = t % 32;
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], fault == 1 ? 5 : 4);
    }
    if (fault == 27) mbarrier_init(&full[0], 1);
    if (fault != 2) fence_barrier_init();
  }
  if (fault != 3) __syncthreads();
  if (warp >= 4) {
    if (fault != 9) registers_lower<24>();
    if (t == 128) {
      for (int i = 0; i < p.n; ++i) {
        const int stage = i % kStages;
        u8* tile = memory + 2 * stage * kTile;
        if (fault != 4) mbarrier_wait(&empty[stage], (i / kStages & 1) ^ (fault == 5 && i == 0 ? 0 : 1));
        mbarrier_arrive_expect(&full[stage], fault == 6 ? 2 * kTile + 16 : fault == 7 ? kTile : 2 * kTile);
        tma_load(tile, p.map_a, &full[stage], 64 * i, 0);
        tma_load(tile + kTile + (fault == 8 ? 512 : 0), p.map_b, &full[stage], 64 * i, 0);
      }
    }
    return;
  }
  if (fault == 9) registers_raise<256>();
  registers_raise<232>();
  float d[32];
  for (int i = 0; i < p.n; ++i) {
    const int stage = i % kStages;
    const u8 *a = memory + 2 * stage * kTile, *b = a + kTile;
    mbarrier_wait(&full[stage], (i / kStages & 1) ^ (fault == 10 ? 1 : 0));
    if (fault != 11) wgmma_fence();
    if (fault == 26) d[5] = 0.0f;
    u64 x = wgmma_k_major(a), y = wgmma_k_major(b);
    if (fault == 12) y = wgmma_descriptor<128>(b, 16, 512);
    if (fault == 13) y = wgmma_descriptor<128>(b, 16, 16384);
    if (fault == 14) y = wgmma_descriptor<64>(b, 16, 1024);
    if (fault == 23) x = wgmma_advance(x, 128);
    for (int k = 0; k < 4; ++k) {
      if (fault == 15 && warp == 3 && k == 3) break;
      wgmma_ss<bf16, 0, 0>(d, wgmma_advance(x, 32 * k), wgmma_advance(y, 32 * k), i + k > 0);
    }
    wgmma_commit();
    if (fault == 16 && lane == 0) mbarrier_arrive(&empty[stage]);
    if (fault != 17) wgmma_wait<0>();
    if (fault == 24 || fault == 25) {  // a look at the tile before it is overwritten
      load_shared_16(a + 16 * t);
      if (fault == 25) fence_async_shared();  // this is no mistake
      __syncwarp();
    }
    if (fault != 16 && lane == 0) mbarrier_arrive(&empty[stage]);
  }
  for (int round = 0; round < 2; ++round) {
    if (round == 1 && fault != 18 && t == 0) bulk_wait_read<0>();
    if (fault == 19 && warp == 0) {
      named_barrier_sync(1, 96);
    } else {
      named_barrier_sync(1, 128);
    }
    for (int j = 0; j < 8; j += 2) {
      u32 r[4];
      for (int i = 0; i < 4; ++i) r[i] = pack<bf16>(d[4 * (j + i / 2) + i % 2 * 2], d[4 * (j + i / 2) + i % 2 * 2 + 1]);
      const int row = 16 * warp + lane % 16;
      stmatrix_x4(staging + row * 128 + ((j + lane / 16) ^ (row & 7)) * 16, r);
    }
    if (fault != 20) fence_async_shared();
    if (fault != 21) named_barrier_sync(1, 128);
    if (t == 0) {
      tma_store(p.map_out, staging, 0, 0);
      bulk_commit();
    }
  }
  if (fault != 22 && t == 0) bulk_wait_read<0>();
}

// out [64, 8] float = a [64, 16] · b [8, 16]^T, bf16, written to shared memory by threads, without a swizzle.
__global__ void __launch_bounds__(128) plain_product_kernel(const __grid_constant__ TrialParams p) {
  u8 *a = shared_memory(), *b = a + 64 * 32;
  const int t = threadIdx.x, fault = p.fault;
  // 8 rows of 16 bytes are a core matrix; the second half of k is 128 bytes behind the first, the next 8 rows 256.
  auto at = [](int row, int half) { return row / 8 * 256 + half * 128 + row % 8 * 16; };
  store_shared_16(a + at(t / 2, t % 2), load_16(static_cast<const u8*>(p.a) + 16 * t));
  if (t < 16) store_shared_16(b + at(t / 2, t % 2), load_16(static_cast<const u8*>(p.b) + 16 * t));
  if (fault == 2) __syncthreads();
  if (fault != 1) fence_async_shared();
  if (fault != 2) __syncthreads();
  if (fault == 6 && t == 0) {
    store_16(p.out, make_uint4(0, 0, 0, 0));
    load_16(p.out);
  }
  float d[4];
  wgmma_fence();
  wgmma_ss<bf16, 0, 0>(d, wgmma_descriptor<0>(a + (fault == 5 ? 8 : 0), 128, 256), wgmma_descriptor<0>(b, 128, 256), false);
  wgmma_commit();
  if (fault == 3) store_shared_16(b + at(t / 16, 0), make_uint4(0, 0, 0, 0));
  if (fault != 4) wgmma_wait<0>();
  float* out = static_cast<float*>(p.out) + (t / 32 * 16 + t % 32 / 4) * 8 + t % 4 * 2;
  out[0] = d[0], out[1] = d[1], out[64] = d[2], out[65] = d[3];
}

// out [2] float: each of two blocks reads what the other one put into its shared memory.
__global__ void __launch_bounds__(32) neighbour_kernel(const __grid_constant__ TrialParams p) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) *memory = 1.0f + rank;
  if (p.fault == 6 && threadIdx.x == 31) return;
  if (p.fault == 9) store_cluster(memory + 1, 1 - rank, 2.0f);  // nobody else touches that, but there may be no such block yet
  if (p.fault != 1) cluster_sync();
  if (p.fault == 7 || p.fault == 8) cluster_arrive();
  if (p.fault == 7) cluster_arrive();
  if (p.fault == 8) cluster_wait();
  if (p.fault == 8) cluster_wait();
  float x = load_cluster(memory, p.fault == 2 ? 2 : 1 - rank);
  if (p.fault != 3) cluster_sync();
  if (p.fault == 4) x = load_cluster(memory, 1 - rank);
  if (p.fault == 5 && threadIdx.x == 0) *memory = 3.0f;  // nobody reads any more: this is no mistake
  if (threadIdx.x == 0) static_cast<float*>(p.out)[rank] = x;
}

// out [32] int: the sum of n numbers that one thread hands to a warp, one by one.
__global__ void __launch_bounds__(64) hand_over_kernel(const __grid_constant__ TrialParams p) {
  int* number = reinterpret_cast<int*>(shared_memory());
  u64 *full = reinterpret_cast<u64*>(number + 2), *empty = full + 1;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 1);
  }
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < p.n; ++i) {
    if (threadIdx.x == 32) {
      mbarrier_wait(empty, (i & 1) ^ 1);
      *number = i;
      mbarrier_arrive(full);
    } else if (threadIdx.x < 32) {
      mbarrier_wait(full, i & 1);
      if (p.fault != 1) sum += *number;
      if (p.fault != 1) __syncwarp();
      if (threadIdx.x == 0) mbarrier_arrive(empty);
    }
  }
  if (threadIdx.x < 32) static_cast<int*>(p.out)[threadIdx.x] = sum;
}

// out [2] float: a block of two warpgroups, made for two on a multiprocessor: 128 registers for each thread.
__global__ void __launch_bounds__(256, 2) registers_kernel(const __grid_constant__ TrialParams p) {
  const int warp = threadIdx.x / 32, fault = p.fault;
  if (warp < 4) {
    if (fault == 3) registers_lower<160>();
    if (fault == 4) registers_lower<40>();
    if (fault == 4) registers_raise<32>();
    if (fault != 2 || warp != 1) registers_lower<24>();
  } else if (fault == 1) {
    registers_raise<240>();
  } else if (fault == 2) {
    registers_raise<200>();
  } else if (fault == 5 && warp == 6) {
    registers_raise<232>();
  } else {
    registers_raise<232>();
  }
  if (threadIdx.x % 128 == 0) static_cast<float*>(p.out)[warp / 4] = 1.0f;
}
