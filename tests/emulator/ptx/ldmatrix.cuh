// Stands in for csrc/cuda/ptx/ldmatrix.cuh.
#pragma once
#include <ptx/core.cuh>

namespace emulator {
__forceinline__ void spread(u32 (&r)[4], Words x) {
  r[0] = static_cast<u32>(x.low), r[1] = static_cast<u32>(x.low >> 32);
  r[2] = static_cast<u32>(x.high), r[3] = static_cast<u32>(x.high >> 32);
}
__forceinline__ void spread(u32 (&r)[2], Words x) { r[0] = static_cast<u32>(x.low), r[1] = static_cast<u32>(x.low >> 32); }
}  // namespace emulator

__forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* row) { emulator::spread(r, emulator::ldmatrix(row, 4, false)); }
__forceinline__ void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) { emulator::spread(r, emulator::ldmatrix(row, 4, true)); }
__forceinline__ void ldmatrix_x2(u32 (&r)[2], const void* row) { emulator::spread(r, emulator::ldmatrix(row, 2, false)); }
__forceinline__ void ldmatrix_x2_transposed(u32 (&r)[2], const void* row) { emulator::spread(r, emulator::ldmatrix(row, 2, true)); }
