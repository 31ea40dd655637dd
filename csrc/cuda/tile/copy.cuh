// Tiles of rows between global memory and shared memory in TileLayout, by all threads of a block.
#pragma once
#include <ptx/core.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/memory.cuh>
#include <tile/swizzle.cuh>

// Eight elements one by one, from any address; 0 beyond `count`.
template <class T>
__forceinline__ uint4 gather_8(const T* from, int count) {
  u32 word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 low = 2 * i < count ? from[2 * i].bits : 0;
    u32 high = 2 * i + 1 < count ? from[2 * i + 1].bits : 0;
    word[i] = low | high << 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Starts to copy rows [0, kRows) from `rows` on, `stride` elements apart; the caller commits and waits. Rows from `limit`
// and columns from `columns` on become 0 and are not read. aligned: each row starts at a multiple of 16 bytes and columns
// is a multiple of 8, else the copy is slow, and done on return as far as this thread is concerned.
template <int kThreads, int kRows, int kCols, class T>
__forceinline__ void copy_rows_async(u8* tile, const T* rows, i64 stride, int limit, int columns, bool aligned) {
  using Layout = TileLayout<kRows, kCols>;
  constexpr int kStep = kThreads / Layout::kChunks;  // rows that the block copies at once
  static_assert(kThreads % Layout::kChunks == 0 && kStep % 8 == 0, "");
  int chunk = threadIdx.x % Layout::kChunks, row = threadIdx.x / Layout::kChunks;
  const T* from = rows + row * stride + chunk * 8;
  u8* to = tile + Layout::at(row, chunk);
  if (aligned) {
#pragma unroll
    for (int r = 0; r < kRows; r += kStep, from += kStep * stride) {
      if (kRows % kStep != 0 && row + r >= kRows) break;
#pragma unroll
      for (int panel = 0; panel < Layout::kPanels; ++panel) {
        bool valid = row + r < limit && panel * Layout::kPanel + chunk * 8 < columns;
        cp_async_16(to + panel * Layout::kPanelBytes + r * Layout::kRowBytes, from + panel * Layout::kPanel, valid);
      }
    }
  } else {
#pragma unroll 1
    for (int r = 0; row + r < kRows; r += kStep, from += kStep * stride) {
#pragma unroll 1
      for (int panel = 0; panel < Layout::kPanels; ++panel) {
        int count = row + r < limit ? columns - panel * Layout::kPanel - chunk * 8 : 0;
        uint4 x = gather_8(from + panel * Layout::kPanel, count);
        store_shared_16(to + panel * Layout::kPanelBytes + r * Layout::kRowBytes, x);
      }
    }
  }
}

// Writes rows [0, limit) and columns [0, columns) of a tile to `rows` on, each row at a multiple of 16 bytes. kThreads
// threads, of which this is number `thread`, work on it.
template <int kThreads, int kRows, int kCols, class T>
__forceinline__ void store_rows(T* rows, i64 stride, const u8* tile, int limit, int columns, int thread) {
  using Layout = TileLayout<kRows, kCols>;
  constexpr int kAcross = kCols / 8;
#pragma unroll
  for (int first = 0; first < kRows * kAcross; first += kThreads) {
    int row = (first + thread) / kAcross, chunk = (first + thread) % kAcross;
    if (row < limit && row < kRows && chunk * 8 < columns) {
      store_16(rows + row * stride + chunk * 8, load_shared_16(tile + Layout::at(row, chunk)));
    }
  }
}
