// Leads a block of queries through the tiles of keys that a boolean mask lets it see: hidden tiles are skipped wherever they
// lie, and tiles seen as a whole are told apart from those that need a test per pair.
#pragma once
#include <ptx/core.cuh>
#include <tile/score.cuh>

constexpr int kSights = 1024;  // tiles looked at in advance, one byte of shared memory each
enum Sight : u8 { kHidden, kPartly, kWhole };

// What queries [m0, m1) see of the keys [n0, n1), found by one warp.
template <int BLOCK_N>
__forceinline__ Sight look(const Pairs<u8>& mask, int m0, int m1, int n0, int n1, bool words) {
  int lane = threadIdx.x & 31;
  int rows = mask.stride_m == 0 ? 1 : m1 - m0;
  bool any = false, all = true;
  if (words) {
    constexpr int kWords = BLOCK_N / 4;
    int across = (n1 - n0) >> 2;
#pragma unroll 4
    for (int i = lane; i < rows * kWords; i += 32) {
      int row = i / kWords, column = i % kWords;
      if (column >= across) continue;
      u32 x = *reinterpret_cast<const u32*>(mask.first + (m0 + row) * mask.stride_m + n0 + 4 * column);
      any |= x != 0;
      all &= (x - 0x01010101u & ~x & 0x80808080u) == 0;  // no byte is 0
    }
  } else {
    int columns = mask.stride_n == 0 ? 1 : n1 - n0;
#pragma unroll 4
    for (int i = lane; i < rows * BLOCK_N; i += 32) {
      if (i % BLOCK_N >= columns) continue;
      bool x = mask.at(m0 + i / BLOCK_N, n0 + i % BLOCK_N) != 0;
      any |= x;
      all &= x;
    }
  }
  return !__any_sync(0xffffffffu, any) ? kHidden : __all_sync(0xffffffffu, all) ? kWhole : kPartly;
}

template <int BLOCK_N, int kWarps>
struct MaskWalk {
  Pairs<u8> mask;
  u8* sights;  // [kSights] in shared memory
  int m0, m1, seqlen_k, hi;
  int scanned, scanned_end;
  bool words;
  Sight sight;  // of the tile that `from` returned last

  __forceinline__ MaskWalk(const Pairs<u8>& mask, u8* sights, int m0, int m1, int seqlen_k, int hi)
      : mask(mask), sights(sights), m0(m0), m1(m1), seqlen_k(seqlen_k), hi(hi), scanned(0), scanned_end(-1) {
    u64 misaligned = reinterpret_cast<u64>(mask.first) | static_cast<u64>(mask.stride_m) | static_cast<u64>(seqlen_k);
    words = mask.stride_n == 1 && (misaligned & 3) == 0;
  }

  // The first tile from n on that is not hidden, or a number of at least hi. Called by all threads with the same n.
  __forceinline__ int from(int n) {
    for (; n < hi; n += BLOCK_N) {
      if (n >= scanned_end) scan(n);
      sight = static_cast<Sight>(sights[(n - scanned) / BLOCK_N]);
      if (sight != kHidden) break;
    }
    return n;
  }

  // Begins at the first tile again.
  __forceinline__ void restart() { scanned_end = -1; }

 private:
  __forceinline__ void scan(int n) {
    __syncthreads();
    scanned = n;
    scanned_end = min(hi, n + kSights * BLOCK_N);
    int warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int i = warp; scanned + i * BLOCK_N < scanned_end; i += kWarps) {
      int n0 = scanned + i * BLOCK_N;
      Sight found = look<BLOCK_N>(mask, m0, m1, n0, min(n0 + BLOCK_N, seqlen_k), words);
      if ((threadIdx.x & 31) == 0) sights[i] = found;
    }
    __syncthreads();
  }
};
