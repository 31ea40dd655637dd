// What every kernel starts from: names of numbers and the block's shared memory.
// Kernels are device code only (compiled with -default-device) and include no header of CUDA's or of the standard
// library; these headers are included as <ptx/…>, so that the emulator's (tests/emulator/ptx) can stand in for them.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

// A tensor map as the driver encodes it for TMA; a kernel parameter of this type must be __grid_constant__.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

// The block's dynamic shared memory, aligned to 1024 bytes (what a 128-byte swizzle needs). Kernels declare no other.
__forceinline__ u8* shared_memory() {
  extern __shared__ __align__(1024) u8 fastattn_shared_memory[];
  return fastattn_shared_memory;
}

// What the hardware asks of a verb's arguments. The emulator checks it; a kernel does nothing here.
__forceinline__ void must(bool) {}

// An address in shared memory as PTX wants it.
__forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
