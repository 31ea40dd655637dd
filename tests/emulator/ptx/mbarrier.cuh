// Stands in for csrc/cuda/ptx/mbarrier.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) { emulator::mbarrier_init(barrier, arrivals); }
__forceinline__ void fence_barrier_init() { emulator::fence_barrier_init(); }
__forceinline__ void mbarrier_arrive(u64* barrier) { emulator::mbarrier_arrive(barrier); }
__forceinline__ void mbarrier_arrive_expect(u64* barrier, u32 bytes) { emulator::mbarrier_arrive_expect(barrier, bytes); }
__forceinline__ void mbarrier_expect(u64* barrier, u32 bytes) { emulator::mbarrier_expect(barrier, bytes); }
__forceinline__ void mbarrier_arrive_remote(u64* barrier, u32 rank) { emulator::mbarrier_arrive_remote(barrier, rank); }
__forceinline__ void mbarrier_arrive_remote_read(u64* barrier, u32 rank) { emulator::mbarrier_arrive_remote(barrier, rank); }
__forceinline__ bool mbarrier_try_wait(u64* barrier, u32 parity) { return emulator::mbarrier_try_wait(barrier, parity); }
__forceinline__ void mbarrier_wait(u64* barrier, u32 parity) { emulator::mbarrier_wait(barrier, parity); }
