// Stands in for csrc/cuda/ptx/registers.cuh.
#pragma once
#include <ptx/core.cuh>

template <int kCount>
__forceinline__ void registers_raise() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emulator::registers_change(kCount, true);
}
template <int kCount>
__forceinline__ void registers_lower() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  emulator::registers_change(kCount, false);
}
