// Kernels with a mistake on request (fault > 0), of the portable kind.
#pragma once
#include <trial_params.h>

#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/flag.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/memory.cuh>
#include <ptx/mma.cuh>
#include <ptx/named_barrier.cuh>

// out [128] float: out[t] = sum over tiles of a [n, 128] of tile[(t + 1) % 128]; a ring of three stages, 128 threads of which
// the first 32 copy.
__global__ void __launch_bounds__(128) ring_kernel(const __grid_constant__ TrialParams p) {
  constexpr int kStages = 3;
  float* ring = reinterpret_cast<float*>(shared_memory());  // [kStages][128]
  const float* a = static_cast<const float*>(p.a);
  const int t = threadIdx.x;
  auto fill = [&](int tile) {
    bool valid = tile < p.n || p.fault == 7;
    if (t < 32) {
      int at = (p.fault == 6 && tile >= kStages ? kStages : tile % kStages) * 128 + 4 * t;
      cp_async_16(ring + at, a + (tile < p.n || p.fault == 7 ? tile : 0) * 128 + 4 * t + (p.fault == 8 ? 1 : 0), valid);
    }
    if (p.fault != 9 || tile == 0) cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) fill(tile);
  float sum = 0.0f;
  for (int tile = 0; tile < p.n; ++tile) {
    if (p.fault == 3) {
      cp_async_wait<kStages - 1>();
    } else if (p.fault != 2) {
      cp_async_wait<kStages - 2>();
    }
    if (p.fault != 1) __syncthreads();
    if (p.fault == 5) fill(tile + kStages);  // into the stage that is read now
    sum += ring[(p.fault == 4 ? tile + 1 : tile) % kStages * 128 + (t + 1) % 128];
    if (p.fault != 5) fill(tile + kStages - 1);
  }
  static_cast<float*>(p.out)[t] = sum;
}

// out [8, 8] float = a [16, 16]'s upper half · b [8, 16]^T, bf16, through shared rows of 32 bytes whose two pieces swap every
// four rows. One warp.
__global__ void __launch_bounds__(32) product_kernel(const __grid_constant__ TrialParams p) {
  u8 *a = shared_memory(), *b = a + 16 * 32;
  const int lane = threadIdx.x;
  auto at = [&](int row, int piece) { return row * 32 + (piece ^ (row / 4 & 1)) * 16; };
  auto wrong = [&](int row, int piece) { return row * 32 + (p.fault == 1 ? piece : piece ^ (row / 4 & 1)) * 16; };
  store_shared_16(a + at(lane / 2, lane % 2), load_16(static_cast<const u8*>(p.a) + 16 * lane));
  if (lane < 16 && (p.fault != 2 || lane != 5))
    store_shared_16(b + at(lane / 2, lane % 2), load_16(static_cast<const u8*>(p.b) + 16 * lane));
  if (p.fault != 3) __syncwarp();
  u32 x[4], y[2];
  if (p.fault == 4 && lane == 31) return;
  ldmatrix_x4(x, a + at(lane % 16, lane / 16));
  if (p.fault == 5 && lane >= 16) {
    ldmatrix_x2(y, b + wrong(lane % 8, lane / 8 % 2));
  } else {
    ldmatrix_x2(y, b + wrong(lane % 8, lane / 8 % 2) + (p.fault == 6 ? 8 : 0));
  }
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_m16n8k16<bf16>(d, x, y);
  float* out = static_cast<float*>(p.out) + lane / 4 * 8 + lane % 4 * 2;
  out[0] = d[0], out[1] = d[1];
}

// out [n] = a [n] + 1 by blocks of 64, through shared memory; out [n] (int, b null) counts per value elsewhere.
__global__ void __launch_bounds__(64) rows_kernel(const __grid_constant__ TrialParams p) {
  const float* a = static_cast<const float*>(p.a);
  float* out = static_cast<float*>(p.out);
  float* memory = reinterpret_cast<float*>(shared_memory());  // [64]
  const int t = threadIdx.x, i = blockIdx.x * 64 + t;
  if (p.fault == 1 || i < p.n) memory[t] = a[i];
  if (p.fault == 2) memory[64] = 0.0f;
  if (p.fault == 3 && t < 32) {
    named_barrier_sync(1, 64);
  } else if (p.fault == 3) {
    named_barrier_sync(1, 32);
  } else if (p.fault == 4) {
    if (t < 32) named_barrier_sync(1, 64);
  } else if (p.fault == 15) {
    if (t % 32 < 16) named_barrier_sync(1, 32);
    __syncthreads();
  } else if (p.fault == 16) {
    if (t < 32) named_barrier_arrive(1, 64);
    if (t < 32) named_barrier_arrive(1, 64);
  } else if (p.fault == 5) {
    if (t % 2 == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else {
    __syncthreads();
  }
  if (p.fault == 6 || i < p.n) out[i] = (i < p.n ? memory[t] : 0.0f) + 1.0f;
  if (p.fault == 7) out[0] = 0.0f;                     // by every block
  if (p.fault == 8 && i < p.n) out[2 * i + 1] = 0.0f;  // which out's view skips
  if (p.fault == 9) static_cast<float*>(p.out)[p.n - 1 - t % 2] += 1.0f;
  if (p.fault == 10) {
    const unsigned half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    __shfl_sync(half, 1.0f, 20);  // lane 20 is not in the lower half
  }
  if (p.fault == 11 && t % 32 < 16) __shfl_sync(0xffffffffu, 1.0f, 0);
  if (p.fault == 11 && t % 32 >= 16) __ballot_sync(0xffffffffu, 1);
  if (p.fault == 12) out[0] = reinterpret_cast<const float2*>(memory + 1)->x;
  if (p.fault == 13 && t % 32 == 0) __syncwarp(0xfffffffeu);
  if (p.fault == 14) __trap();
}

// out [1] int: a ticket for every thread. `fault` 1: the first waits for a ticket that nobody draws.
__global__ void __launch_bounds__(64) ticket_kernel(const __grid_constant__ TrialParams p) {
  int* out = static_cast<int*>(p.out);
  atomicAdd(out, 1);
  if (threadIdx.x == 0) {
    while (atomicAdd(out, 0) < 64 + p.fault) {
    }
  }
}

// out [2, 32] float: block 1 adds 1 to what block 0 wrote before it passed the turn, a [1] int. `fault` 1: block 0 looks at the
// turn and does not pass it; 2: block 1 does not look.
__global__ void __launch_bounds__(32) turn_kernel(const __grid_constant__ TrialParams p) {
  int* turn = static_cast<int*>(const_cast<void*>(p.a));
  float* out = static_cast<float*>(p.out);
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    out[t] = static_cast<float>(t);
    __syncwarp();
    if (t == 0 && p.fault == 1) load_acquire(turn);
    if (t == 0 && p.fault != 1) add_release(turn, 1);
  } else {
    while (t == 0 && p.fault == 0 && load_acquire(turn) != 1) {
    }
    if (t == 0 && p.fault == 1) load_acquire(turn);
    __syncwarp();
    out[32 + t] = out[31 - t] + 1.0f;
  }
}

// out [64] float: each block adds 1 to all, in turns by a number that it draws; the first one writes. a [2] int: numbers drawn, the
// turn. `fault` 1: nobody awaits the turn; 2: it is passed while others of the block still write.
__global__ void __launch_bounds__(64) sums_kernel(const __grid_constant__ TrialParams p) {
  int *counts = static_cast<int*>(const_cast<void*>(p.a)), *drawn = reinterpret_cast<int*>(shared_memory());
  float* out = static_cast<float*>(p.out);
  const int t = threadIdx.x;
  if (t == 0) {
    *drawn = atomicAdd(counts, 1);
    while (p.fault != 1 && load_acquire(counts + 1) != *drawn) {
    }
  }
  __syncthreads();
  if (*drawn == 0) {
    out[t] = 1.0f;
  } else {
    atomicAdd(out + t, 1.0f);
  }
  if (p.fault != 2) __syncthreads();
  if (t == 0) add_release(counts + 1, 1);
}
