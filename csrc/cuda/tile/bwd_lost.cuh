// The slow road of the backward, for numbers that are not finite. Where a tile holds hidden pairs their weight is 0, but
// 0 · NaN is NaN. Who finds such a number in its gradients starts again with the rows that they sum over made finite, so
// that hidden pairs add nothing, and adds to the result what visible pairs would have added.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/memory.cuh>
#include <tile/lost.cuh>
#include <tile/swizzle.cuh>

// Is a number lost in this thread's part of an accumulator's first `rows` rows?
template <int kRows, int kTiles>
__forceinline__ bool is_lost(const float (&x)[kRows][kTiles][4], int rows) {
  bool lost = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float zero = 0.0f;  // NaN after a number that is not finite
#pragma unroll
      for (int j = 0; j < kTiles; ++j) zero = fmaf(x[r][j][2 * half], 0.0f, fmaf(x[r][j][2 * half + 1], 0.0f, zero));
      lost |= 16 * r + 8 * half + static_cast<int>(threadIdx.x >> 2 & 7) < rows && zero != 0.0f;
    }
  }
  return lost;
}

// Is one in a tile of kBytes, as far as this thread's share of it goes?
template <class T, int kThreads, int kBytes>
__forceinline__ bool tile_is_lost(const u8* tile) {
  float zero = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x * 16; i < kBytes; i += kThreads * 16) {
    uint4 x = load_shared_16(tile + i);
    const u32 pair[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float2 two = unpack<T>(pair[e]);
      zero = fmaf(two.x, 0.0f, fmaf(two.y, 0.0f, zero));
    }
  }
  return zero != 0.0f;
}

// Does a row of global memory hold such a number? A warp asks together.
template <class T>
__forceinline__ bool row_is_lost(const T* row, int columns) {
  bool lost = false;
#pragma unroll 1
  for (int d = threadIdx.x & 31; d < columns; d += 32) lost |= !is_finite(row[d]);
  return __any_sync(0xffffffffu, lost);
}

// Adds the numbers of `from` that are not finite to a row of a tile, by one warp: as they are, or with kAsNan as NaN,
// which is what they give times 0.
template <class Layout, bool kAsNan, class T>
__forceinline__ void add_lost_row(u8* tile, int row, const T* from, int columns) {
#pragma unroll 1
  for (int d = threadIdx.x & 31; d < columns; d += 32) {
    if (is_finite(from[d])) continue;
    T* to = reinterpret_cast<T*>(tile + Layout::at(row, d / 8)) + d % 8;
    *to = from_float<T>(to_float(*to) + (kAsNan ? __uint_as_float(0x7fc00000u) : to_float(from[d])));
  }
}
