// Copies from global to shared memory that bypass the registers (sm_80). A thread's copies complete in the order of its
// commits; they are visible to that thread after cp_async_wait, to the block after a barrier behind it.
#pragma once
#include <ptx/core.cuh>

// 16 bytes, both addresses multiples of 16. When not valid, 16 zero bytes are written and `global` is not read.
__forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// 4 bytes, both addresses multiples of 4.
__forceinline__ void cp_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
// Closes the group of the copies since the last commit; an empty group counts.
__forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the kPending youngest groups of this thread are under way.
template <int kPending>
__forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
