// An additive bias that TMA brings tile by tile: how a tile lies in shared memory, and how the warps of a consumer add it to their
// scores. A tile is as wide as a tile of keys and as long as a block of queries, or one row where all queries share it.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/tma.cuh>
#include <tile/score.cuh>

// In boxes of kSpan bytes by BLOCK_M rows, the 16-byte pieces of a row exchanged by the swizzle of that span, so that neither the
// rows of an ldmatrix nor those of a warp meet in a bank; a single row lies as it is. kWide: of floats, else of 16-bit elements.
template <int BLOCK_M, int BLOCK_N, bool kRow, bool kWide>
struct BiasTile {
  static constexpr bool kOneRow = kRow;
  static constexpr int kItem = kWide ? 4 : 2, kRowBytes = BLOCK_N * kItem;
  static constexpr int kSpan = kRow ? kRowBytes : kRowBytes % 128 == 0 ? 128 : kRowBytes % 64 == 0 ? 64 : 32;
  static constexpr int kBox = kRow ? kRowBytes : BLOCK_M * kSpan;
  static constexpr int kLoad = kRowBytes / kSpan * kBox;       // bytes that a load brings
  static constexpr int kBytes = (kLoad + 1023) / 1024 * 1024;  // from one slot to the next
  static constexpr int kPieces = kSpan / 16;                   // of a row of a box

  // Where a thread's piece `lane_piece` (0 or 1) of a row begins, and from there the one `piece` (even) further on: an exclusive or
  // and an addition, both with constants.
  static __forceinline__ int at(int row, int lane_piece) {
    int turned = kSpan == 128 ? row & 7 : kSpan == 64 ? row >> 1 & 3 : row >> 2 & 1;
    return row * kSpan + ((lane_piece ^ turned) << 4);
  }
  static __forceinline__ int move(int from, int piece) { return (from ^ (piece % kPieces << 4)) + piece / kPieces * kBox; }
};

// s · scale + bias in units of log 2; -inf hides the key whatever the score is.
__forceinline__ void add_biased(float& s, float scale, float bias) {
  s = bias == -infinity() ? bias : fmaf(s, scale, bias * kLog2e);
}

template <class T, class Bias, int kTiles>
__forceinline__ void add_row(float (&s)[kTiles][4], float scale, const u8* tile) {
  int column = 2 * (threadIdx.x & 3);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const u8* at = tile + (8 * j + column) * Bias::kItem;
    float2 x = Bias::kItem == 4 ? *reinterpret_cast<const float2*>(at) : unpack<T>(*reinterpret_cast<const u32*>(at));
#pragma unroll
    for (int e = 0; e < 4; ++e) add_biased(s[j][e], scale, e & 1 ? x.y : x.x);
  }
}
template <class T, class Bias, int kTiles>
__forceinline__ void add_narrow(float (&s)[kTiles][4], float scale, const u8* tile, int row) {
  static_assert(kTiles % 2 == 0, "");
  int lane = threadIdx.x & 31, from = Bias::at(row + (lane & 15), lane >> 4);
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    u32 r[4];  // rows 0-7, rows 8-15, then the next 8 columns of both
    ldmatrix_x4(r, tile + Bias::move(from, j));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 x = unpack<T>(r[i]);
      add_biased(s[j + (i >> 1)][2 * (i & 1)], scale, x.x);
      add_biased(s[j + (i >> 1)][2 * (i & 1) + 1], scale, x.y);
    }
  }
}
template <class Bias, int kTiles>
__forceinline__ void add_wide(float (&s)[kTiles][4], float scale, const u8* tile, int row) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int from = Bias::at(row + lane / 4 + 8 * r, lane >> 1 & 1) + (lane & 1) * 8;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float2 x = *reinterpret_cast<const float2*>(tile + Bias::move(from, 2 * j));
      add_biased(s[j][2 * r], scale, x.x);
      add_biased(s[j][2 * r + 1], scale, x.y);
    }
  }
}
// s [16, 8 kTiles] = s · scale + the tile's rows from `row` on.
template <class T, class Bias, int kTiles>
__forceinline__ void add_tile(float (&s)[kTiles][4], float scale, const u8* tile, int row) {
  if constexpr (Bias::kOneRow) {
    add_row<T, Bias>(s, scale, tile);
  } else if constexpr (Bias::kItem == 4) {
    add_wide<Bias>(s, scale, tile, row);
  } else {
    add_narrow<T, Bias>(s, scale, tile, row);
  }
}
