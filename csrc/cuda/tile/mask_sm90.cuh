// Boolean masks: as bits, read while the scores are still being multiplied, two registers instead of a byte per score; and which
// tiles they hide as a whole.
#pragma once
#include <ptx/core.cuh>
#include <ptx/memory.cuh>
#include <tile/band.cuh>
#include <tile/score.cuh>

// bits[r] >> (2 j + e) & 1: may row r (of the two of this thread) see column e of its two of the 8-wide tile j? Position and mask
// together; up to 16 tiles.
template <int kTiles>
__forceinline__ void load_seen(u32 (&bits)[2], const Pairs<u8>& mask, const Corner& c) {
  static_assert(kTiles <= 16, "");
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const u8* row = mask.first + (c.m + 8 * r) * mask.stride_m + c.n * mask.stride_n;
    bits[r] = 0;
#pragma unroll 4
    for (int i = 0; i < 2 * kTiles; ++i) {
      int n = 4 * i - 3 * (i & 1);  // 8 j + e
      if (c.span[r].holds(n) && row[n * mask.stride_n] != 0) bits[r] |= 1u << i;
    }
  }
}

template <int kTiles>
__forceinline__ void hide_unseen(float (&s)[kTiles][4], const u32 (&bits)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if ((bits[e >> 1] >> (2 * j + (e & 1)) & 1) == 0) s[j][e] = -infinity();
    }
  }
}

// By a warp: is any pair of queries [m0, m1) and keys [n0, n1) allowed? A dimension that broadcasts is looked at once; the first
// allowed pair ends the search.
__forceinline__ bool any_allowed(const Pairs<u8>& mask, int m0, int m1, int n0, int n1) {
  constexpr int kEach = 2;  // loads under way per lane
  if (mask.stride_m == 0) m1 = m0 + 1;
  if (mask.stride_n == 0) n1 = n0 + 1;
  const u8* corner = mask.first + m0 * mask.stride_m + n0 * mask.stride_n;
  bool wide = mask.stride_n == 1 && (n1 - n0) % 16 == 0 && mask.stride_m % 16 == 0 && reinterpret_cast<u64>(corner) % 16 == 0;
  int each = wide ? 16 : 1, columns = (n1 - n0) / each, pieces = (m1 - m0) * columns;
  for (int first = threadIdx.x & 31; __any_sync(0xffffffffu, first < pieces); first += 32 * kEach) {
    u32 found = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      int i = first + 32 * e;
      if (i >= pieces) continue;
      const u8* at = corner + i / columns * mask.stride_m + i % columns * each * mask.stride_n;
      if (wide) {
        uint4 x = load_16(at);
        found |= x.x | x.y | x.z | x.w;
      } else {
        found |= *at;
      }
    }
    if (__any_sync(0xffffffffu, found != 0)) return true;
  }
  return false;
}
