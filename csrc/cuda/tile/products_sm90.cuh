// The two products of attention by a warpgroup: queries are 64 rows, tiles lie in panels of 64 columns with a 128-byte swizzle.
// They are issued only: fence before, commit and wait behind (ptx/wgmma.cuh).
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/wgmma.cuh>

constexpr int kPanelRow = 128;  // bytes of a row of a panel

template <int kTiles>
__forceinline__ float (&flat(float (&x)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(x);
}

// s [64, BLOCK_N] = q [64, HEADDIM] · k [BLOCK_N, HEADDIM]^T
template <class T, int HEADDIM, int BLOCK_N>
__forceinline__ void issue_scores(float (&s)[BLOCK_N / 8][4], const u8* q, const u8* k) {
  u64 a = wgmma_k_major(q), b = wgmma_k_major(k);
#pragma unroll
  for (int d = 0; d < HEADDIM; d += 16) {
    wgmma_ss<T, 0, 0>(flat(s), wgmma_advance(a, d / 64 * (64 * kPanelRow) + d % 64 * 2),
                      wgmma_advance(b, d / 64 * (BLOCK_N * kPanelRow) + d % 64 * 2), d > 0);
  }
}

// o [64, HEADDIM_V] += p [64, BLOCK_N] · v [BLOCK_N, HEADDIM_V]
template <class T, int HEADDIM_V, int BLOCK_N>
__forceinline__ void issue_values(float (&o)[HEADDIM_V / 8][4], const u32 (&p)[BLOCK_N / 4], const u8* v) {
  u64 b = wgmma_mn_major(v, BLOCK_N * kPanelRow);
#pragma unroll
  for (int n = 0; n < BLOCK_N; n += 16) {
    const u32* a = &p[n / 4];
    wgmma_rs<T, 1>(flat(o), a[0], a[1], a[2], a[3], wgmma_advance(b, n * kPanelRow), true);
  }
}

// Probabilities as the operand of issue_values.
template <class T, int kTiles>
__forceinline__ void pack_probabilities(u32 (&p)[2 * kTiles], const float (&s)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    p[2 * j] = pack<T>(s[j][0], s[j][1]);
    p[2 * j + 1] = pack<T>(s[j][2], s[j][3]);
  }
}
