// From accumulators to rows in global memory: a warpgroup stages its 64 rows in shared memory, and the copy engine stores them.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/memory.cuh>
#include <ptx/stmatrix.cuh>
#include <ptx/tma.cuh>
#include <tile/swizzle.cuh>

// This warp's 16 rows of o [64, 8 kTiles], times share, into panels of 64 columns with a 128-byte swizzle.
template <class T, int kTiles>
__forceinline__ void stage_rows(u8* staging, const float (&o)[kTiles][4], const float (&share)[2], int row) {
  using Layout = TileLayout<64, (kTiles + 7) / 8 * 64>;
  static_assert(kTiles % 2 == 0, "");
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    u32 r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // matrices: rows 0-7, rows 8-15, then the next 8 columns of both
      const float (&x)[4] = o[j + (i >> 1)];
      r[i] = pack<T>(x[2 * (i & 1)] * share[i & 1], x[2 * (i & 1) + 1] * share[i & 1]);
    }
    stmatrix_x4(staging + Layout::at(row + (lane & 15), j + (lane >> 4)), r);
  }
}

// One element of the staged rows.
template <class T, int HEADDIM_V>
__forceinline__ T* staged(u8* staging, int row, int d) {
  return reinterpret_cast<T*>(staging + TileLayout<64, (HEADDIM_V + 63) / 64 * 64>::at(row, d / 8)) + d % 8;
}

// By one thread: rows from row0 of a head to global memory, those beyond the end of the tensor left out.
template <int HEADDIM_V>
__forceinline__ void store_staged(const TensorMap& map, const u8* staging, int row0, int h, int b) {
#pragma unroll
  for (int d = 0; d < HEADDIM_V; d += 64) tma_store(map, staging + d / 64 * (64 * 128), d, row0, h, b);
  bulk_commit();
}

// By the whole warpgroup: the first `rows` of the staged rows, 16 bytes at a time; o is where the first one goes. For a sequence
// that ends here while the tensor goes on.
template <class T, int HEADDIM_V>
__forceinline__ void store_ragged(T* o, i64 stride, const u8* staging, int rows, int headdim_v) {
  using Layout = TileLayout<64, (HEADDIM_V + 63) / 64 * 64>;
  int chunks = headdim_v / 8;
  for (int i = threadIdx.x & 127; i < rows * chunks; i += 128) {
    int row = i / chunks, chunk = i % chunks;
    store_16(o + row * stride + chunk * 8, load_shared_16(staging + Layout::at(row, chunk)));
  }
}
