// Stands in for csrc/cuda/ptx/stmatrix.cuh.
#pragma once
#include <ptx/core.cuh>

__forceinline__ void stmatrix_x4(void* row, const u32 (&r)[4]) { emulator::stmatrix(row, 4, false, r[0], r[1], r[2], r[3]); }
__forceinline__ void stmatrix_x4_transposed(void* row, const u32 (&r)[4]) {
  emulator::stmatrix(row, 4, true, r[0], r[1], r[2], r[3]);
}
__forceinline__ void stmatrix_x2(void* row, const u32 (&r)[2]) { emulator::stmatrix(row, 2, false, r[0], r[1], 0, 0); }
__forceinline__ void stmatrix_x2_transposed(void* row, const u32 (&r)[2]) { emulator::stmatrix(row, 2, true, r[0], r[1], 0, 0); }
