// Stands in for csrc/cuda/ptx/core.cuh.
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

struct alignas(64) TensorMap {
  u64 opaque[16];
};

__forceinline__ u8* shared_memory() { return emulator::shared_memory(); }
__forceinline__ void must(bool holds) {
  if (!holds) emulator::broken_rule();
}
__forceinline__ u32 shared_address(const void* p) { return emulator::shared_address(p); }
