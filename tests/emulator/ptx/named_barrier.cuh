// Stands in for csrc/cuda/ptx/named_barrier.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ void named_barrier_sync(u32 id, u32 threads) { emulator::barrier_sync(id, threads); }
__forceinline__ void named_barrier_arrive(u32 id, u32 threads) { emulator::barrier_arrive(id, threads); }
