// Accesses of 16 bytes, the widest a thread can make; the address must be a multiple of 16.
// `streamed` data is read or written once and takes no room in L1.
#pragma once
#include <ptx/core.cuh>

// Global memory that nobody writes while the kernel runs.
__forceinline__ uint4 load_16(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}
__forceinline__ uint4 load_16_streamed(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}
__forceinline__ void store_16(void* p, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__forceinline__ void store_16_streamed(void* p, uint4 x) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Shared memory.
__forceinline__ uint4 load_shared_16(const void* p) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(shared_address(p)));
  return x;
}
__forceinline__ void store_shared_16(void* p, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
