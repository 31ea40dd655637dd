// Where a tile [kRows, kCols] of 16-bit elements lies in shared memory: in panels of 64 columns (of 32 where 64 does not
// divide kCols), each panel row by row. The 16-byte chunks of a row are exchanged by its number, so that neither the 8 rows
// of an ldmatrix nor the 8 lanes of a 16-byte copy meet in a bank. A panel of 64 columns is TMA's and wgmma's 128-byte
// swizzle, one of 32 their 64-byte swizzle. The tile starts at a multiple of 1024 bytes; kRows is a multiple of 8.
#pragma once
#include <ptx/core.cuh>
#include <ptx/ldmatrix.cuh>

template <int kRows, int kCols>
struct TileLayout {
  static constexpr int kPanel = kCols % 64 == 0 ? 64 : 32;
  static constexpr int kPanels = kCols / kPanel;
  static constexpr int kChunks = kPanel / 8;
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kRows * kCols * 2;
  static_assert(kCols % 32 == 0 && kRows % 8 == 0, "");

  // Byte offset of the columns [8 chunk, 8 chunk + 8) of a row.
  static __forceinline__ int at(int row, int chunk) {
    int in_panel = chunk % kChunks ^ (kPanel == 64 ? row & 7 : row >> 1 & 3);
    return chunk / kChunks * kPanelBytes + row * kRowBytes + (in_panel << 4);
  }
  // at(row + r, 2 step + half), from the precomputed at(r, half): half 0 or 1, row a multiple of 8.
  static __forceinline__ int move(int from, int row, int step) {
    return (from ^ (step % (kChunks / 2) << 5)) + step / (kChunks / 2) * kPanelBytes + row * kRowBytes;
  }
  // What each lane passes to `move` for the operands below.
  static __forceinline__ int lane_a() { return at(threadIdx.x & 15, threadIdx.x >> 4 & 1); }
  static __forceinline__ int lane_b() { return at((threadIdx.x & 7) + (threadIdx.x >> 1 & 8), threadIdx.x >> 3 & 1); }
};

// Operands of mma_m16n8k16 from a tile. `lane` is lane_a() or lane_b() of the layout; it may include an offset of the tile
// from `tile`, a multiple of 1024, and then costs no addition per access.

// A: rows [row, row + 16), columns [16 step, 16 step + 16). Also, transposed, two B for the product with a tile whose rows
// are summed over: rows are k, columns are n; b[0], b[1] belong to the first 8 columns, b[2], b[3] to the next.
template <class Layout>
__forceinline__ void load_a(u32 (&a)[4], const u8* tile, int lane, int row, int step) {
  ldmatrix_x4(a, tile + Layout::move(lane, row, step));
}
template <class Layout>
__forceinline__ void load_b_transposed(u32 (&b)[4], const u8* tile, int lane, int row, int step) {
  ldmatrix_x4_transposed(b, tile + Layout::move(lane, row, step));
}
// Two B for the product with a transposed tile: rows [row, row + 16) are n, columns [16 step, 16 step + 16) are k; b[0],
// b[1] belong to the first 8 rows, b[2], b[3] to the next. `lane` is lane_b().
template <class Layout>
__forceinline__ void load_b(u32 (&b)[4], const u8* tile, int lane, int row, int step) {
  ldmatrix_x4(b, tile + Layout::move(lane, row, step));
}
