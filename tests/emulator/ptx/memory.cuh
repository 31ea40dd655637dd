// Stands in for csrc/cuda/ptx/memory.cuh.
#pragma once
#include <ptx/core.cuh>

namespace emulator {
__forceinline__ uint4 words_of(Words x) {
  return {static_cast<u32>(x.low), static_cast<u32>(x.low >> 32), static_cast<u32>(x.high), static_cast<u32>(x.high >> 32)};
}
__forceinline__ Words words_of(uint4 x) { return {static_cast<u64>(x.y) << 32 | x.x, static_cast<u64>(x.w) << 32 | x.z}; }
}  // namespace emulator

__forceinline__ uint4 load_16(const void* p) { return emulator::words_of(emulator::load_global(p)); }
__forceinline__ uint4 load_16_streamed(const void* p) { return emulator::words_of(emulator::load_global(p)); }
__forceinline__ void store_16(void* p, uint4 x) { emulator::store_global(p, emulator::words_of(x)); }
__forceinline__ void store_16_streamed(void* p, uint4 x) { emulator::store_global(p, emulator::words_of(x)); }
__forceinline__ uint4 load_shared_16(const void* p) { return emulator::words_of(emulator::load_shared(p)); }
__forceinline__ void store_shared_16(void* p, uint4 x) { emulator::store_shared(p, emulator::words_of(x)); }
