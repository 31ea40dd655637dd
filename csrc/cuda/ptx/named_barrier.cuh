// The block's 16 hardware barriers, for subsets of its warps. Number 0 is __syncthreads's. `threads` counts everyone who takes
// part in one phase, those that arrive and those that wait together, a multiple of 32; all give the same number. Whole warps
// take part: every thread of a warp calls it, converged. The barrier begins anew when the phase completes.
#pragma once
#include <ptx/core.cuh>

// Arrive and wait for the others; orders shared memory as __syncthreads does.
__forceinline__ void named_barrier_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrive without waiting: earlier accesses are visible to those that wait.
__forceinline__ void named_barrier_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
