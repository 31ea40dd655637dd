// The special function unit, 16 results per cycle and multiprocessor. Relative errors are those of the PTX manual.
#pragma once
#include <ptx/core.cuh>

// 2^x, relative error 2^-22; 0 for -inf.
__forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x), absolute error 2^-22 near 1, else relative; -inf for 0.
__forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, 1 ulp.
__forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
