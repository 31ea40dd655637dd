// The two products of attention for the 16 kTiles rows of a warp, on mma_m16n8k16.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/mma.cuh>
#include <tile/softmax.cuh>
#include <tile/swizzle.cuh>

// d[.., 0], d[.., 1] += a · two B of 8 columns each.
template <class T>
__forceinline__ void mma_m16n16k16(float (&d0)[4], float (&d1)[4], const u32 (&a)[4], const u32 (&b)[4]) {
  const u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
  mma_m16n8k16<T>(d0, a, b0);
  mma_m16n8k16<T>(d1, a, b1);
}

// Columns [16 j, 16 j + 16) of an accumulator, rounded to T, as an A.
template <class T, int kCols8>
__forceinline__ void pack_a(u32 (&a)[4], const float (&x)[kCols8][4], int j) {
  a[0] = pack<T>(x[2 * j][0], x[2 * j][1]);
  a[1] = pack<T>(x[2 * j][2], x[2 * j][3]);
  a[2] = pack<T>(x[2 * j + 1][0], x[2 * j + 1][1]);
  a[3] = pack<T>(x[2 * j + 1][2], x[2 * j + 1][3]);
}

// acc += p · V, p [16 kTiles, BLOCK_N] as A operands by 16 keys, V a tile [BLOCK_N, BLOCK_DV]. lane: VLayout::lane_a().
template <class T, class VLayout, int kTiles, int kKeys16, int kCols8>
__forceinline__ void multiply_values(float (&acc)[kTiles][kCols8][4], const u32 (&p)[kTiles][kKeys16][4], const u8* v_tile,
                                     int lane) {
#pragma unroll
  for (int j = 0; j < kKeys16; ++j) {
#pragma unroll
    for (int d = 0; d < kCols8 / 2; ++d) {
      u32 b[4];
      load_b_transposed<VLayout>(b, v_tile, lane, 16 * j, d);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) mma_m16n16k16<T>(acc[i][2 * d], acc[i][2 * d + 1], p[i][j], b);
    }
  }
}
