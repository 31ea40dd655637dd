// Stands in for csrc/cuda/ptx/math.cuh. Results are those of libm, of which the hardware's stay within the errors that
// the real header documents; subnormal numbers count as zero on both sides.
#pragma once
#include <ptx/core.cuh>

namespace emulator {
__forceinline__ float without_subnormals(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
}  // namespace emulator

__forceinline__ float exp2_approx(float x) {
  return emulator::without_subnormals(__builtin_exp2f(emulator::without_subnormals(x)));
}
__forceinline__ float log2_approx(float x) { return __builtin_log2f(emulator::without_subnormals(x)); }
__forceinline__ float rcp_approx(float x) { return emulator::without_subnormals(1.0f / emulator::without_subnormals(x)); }
