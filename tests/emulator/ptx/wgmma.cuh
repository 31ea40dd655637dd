// Stands in for csrc/cuda/ptx/wgmma.cuh. Descriptors are decoded in runtime/wgmma.cpp.
#pragma once
#include <ptx/core.cuh>
#include <ptx/descriptor.cuh>

__forceinline__ void wgmma_fence() { emulator::wgmma_fence(); }
__forceinline__ void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
__forceinline__ void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
// Results come into d at the wait and not before, so that nothing can move.
template <int kCount>
__forceinline__ void wgmma_pin(float (&)[kCount]) {}
template <int kCount>
__forceinline__ void wgmma_pin(u32 (&)[kCount]) {}

namespace emulator {
template <class T>
inline constexpr u32 kFormat = kHalf;
template <>
inline constexpr u32 kFormat<bf16> = 0;
}  // namespace emulator

template <class T, int kTransposeA, int kTransposeB, int kCount>
__forceinline__ void wgmma_ss(float (&d)[kCount], u64 a, u64 b, bool accumulate) {
  static_assert(kCount % 4 == 0 && kCount <= 128);
  emulator::wgmma(d, 2 * kCount,
                  emulator::kFormat<T> | (accumulate ? emulator::kAccumulate : 0) | (kTransposeA ? emulator::kTransposedA : 0) |
                      (kTransposeB ? emulator::kTransposedB : 0),
                  a, b, 0, 0, 0, 0);
}
template <class T, int kTransposeB, int kCount>
__forceinline__ void wgmma_rs(float (&d)[kCount], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate) {
  static_assert(kCount % 4 == 0 && kCount <= 128);
  emulator::wgmma(d, 2 * kCount,
                  emulator::kFormat<T> | emulator::kRegisters | (accumulate ? emulator::kAccumulate : 0) |
                      (kTransposeB ? emulator::kTransposedB : 0),
                  0, b, a0, a1, a2, a3);
}
