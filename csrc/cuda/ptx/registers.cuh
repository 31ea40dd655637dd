// Moves registers between warpgroups while a block runs (sm_90a). kCount is a multiple of 8 from 24 to 256: how many each
// thread has afterwards. All warps of a warpgroup execute the same one, converged; raising waits until the block's pool has
// enough, so that the others must lower first. ptxas allots by the cap of __launch_bounds__(threads, 1) at entry, and then
// allocates the code behind each instruction within its count.
#pragma once
#include <ptx/core.cuh>

template <int kCount>
__forceinline__ void registers_raise() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__forceinline__ void registers_lower() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
