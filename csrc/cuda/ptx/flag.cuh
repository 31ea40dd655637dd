// Counters in global memory by which blocks order what they do (sm_70): whoever reads a number with load_acquire sees what
// was written before the add_release that made it, by the thread that added, and by those that it had met at a barrier.
#pragma once
#include <ptx/core.cuh>

__forceinline__ int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__forceinline__ void add_release(int* p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
