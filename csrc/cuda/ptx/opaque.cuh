// Numbers that the compiler takes for unknown: what follows from them is computed where it stands, instead of ahead of a loop
// at the price of registers.
#pragma once
#include <ptx/core.cuh>

__forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__forceinline__ u32 opaque(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}
__forceinline__ i64 opaque(i64 x) {
  asm volatile("" : "+l"(x));
  return x;
}
