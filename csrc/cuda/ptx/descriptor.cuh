// How wgmma is told where an operand lies in shared memory (sm_90a). No asm: the emulator uses this file as it is.
#pragma once
#include <ptx/core.cuh>

// A descriptor: bits 0-13 the address, 16-29 the leading, 32-45 the stride offset, all in units of 16 bytes; 62-63 how 16-byte
// pieces are swizzled (kSwizzle bytes: 128 -> 1, 64 -> 2, 32 -> 3, none -> 0). Offsets 49-51 stay 0: a swizzled tile is made of
// atoms of 8 rows of kSwizzle bytes that begin at multiples of 8 kSwizzle, and within it piece c of row r lies at place
// c ^ (r % 8) (128), c ^ (r / 2 % 4) (64), c ^ (r / 4 % 2) (32), counted from the atom's beginning: an address bit 4 + i is flipped
// by bit 7 + i. TMA with the same swizzle writes exactly this.
template <int kSwizzle>
__forceinline__ u64 wgmma_descriptor(const void* tile, u32 leading_bytes, u32 stride_bytes) {
  static_assert(kSwizzle == 0 || kSwizzle == 32 || kSwizzle == 64 || kSwizzle == 128);
  must(shared_address(tile) % 16 == 0 && leading_bytes % 16 == 0 && stride_bytes % 16 == 0);
  must(leading_bytes < 1 << 18 && stride_bytes < 1 << 18);
  constexpr u64 kCode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : kSwizzle == 32 ? 3 : 0;
  return static_cast<u64>((shared_address(tile) & 0x3ffff) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 |
         static_cast<u64>(stride_bytes >> 4) << 32 | kCode << 62;
}
// The same operand `bytes` further on (a multiple of 16), the offset counted before swizzling.
__forceinline__ u64 wgmma_advance(u64 descriptor, u32 bytes) {
  must(bytes % 16 == 0);
  return descriptor + (bytes >> 4);
}

// Tiles [rows, 64 j] of 16-bit elements as TMA lays them with boxes 64 elements wide and a 128-byte swizzle: 64 columns are a
// part [rows, 64] of 128-byte rows that begins at a multiple of 1024 bytes.
// k-major, the product runs along the columns (Q and K of Q·K^T): operand rows are tile rows, groups of 8 rows follow each other
// by 1024 bytes (stride). The next 16 columns are 32 bytes further within a part; beyond its 64 columns, take the next part.
__forceinline__ u64 wgmma_k_major(const void* part) { return wgmma_descriptor<128>(part, 16, 1024); }
// mn-major, the product runs along the rows (V of P·V): operand rows (M or N) are tile columns, 64 per part, the next part
// part_bytes further (leading); 8 rows of the tile follow each other by 1024 bytes (stride). The next 16 rows are 2048 bytes on.
__forceinline__ u64 wgmma_mn_major(const void* tile, u32 part_bytes) { return wgmma_descriptor<128>(tile, part_bytes, 1024); }
