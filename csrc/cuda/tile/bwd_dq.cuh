// The float32 sums of dq that many blocks of keys add up in global memory, and the turns by which they do it in one order.
#pragma once
#include <ptx/core.cuh>
#include <ptx/flag.cuh>
#include <tile/sequence.cuh>

// Where a tile [BLOCK_M, D] of them lies: as accumulators of mma_m16n8k16, [rows / 16][columns / 8][4 registers][32 lanes], so
// that a warp adds 128 consecutive bytes at once.
template <int BLOCK_M, int D>
struct DqTile {
  static constexpr int kFloats = BLOCK_M * D;
  static __forceinline__ int fragment(int row16, int column8) { return (row16 * (D / 8) + column8) * 128; }
  static __forceinline__ int at(int row, int column) {
    int lane = (row & 7) * 4 + (column >> 1 & 3), element = (row >> 2 & 2) + (column & 1);
    return fragment(row / 16, column / 8) + 32 * element + lane;
  }
};

// The number of the tile of head h that begins with query m0. Tiles of a sequence are consecutive, and sequences share none.
template <int BLOCK_M, class Params>
__forceinline__ i64 dq_tile(const Params& p, const Sequence& s, int h, int m0) {
  bool packed = p.cu_seqlens_q != nullptr;
  i64 head = packed ? h : static_cast<i64>(s.b) * p.nheads + h;
  return head * p.dq_tiles + (packed ? s.first_q / BLOCK_M + s.b : 0) + m0 / BLOCK_M;
}

// Blocks of keys add to a tile of dq in ascending order: so many that see its queries come before the block of key n0.
template <int BLOCK_N, class Params>
__forceinline__ int turn_of(const Params& p, const Sequence& s, int n0, int m0) {
  return n0 / BLOCK_N - max(0, m0 + s.diagonal - p.left) / BLOCK_N;
}
// Where the turns of a tile are counted.
template <class Params>
__forceinline__ int* turns_of(const Params& p, i64 tile) {
  return p.dq_turns + 1 + tile;
}
// By one thread, before a barrier behind which the block may add. `seen`: what load_acquire said last.
__forceinline__ void await_turn(const int* turns, int turn, int seen) {
  for (; seen != turn; seen = load_acquire(turns)) __nanosleep(20);
}

// sum [16 kRows, 8 kTiles] to the sums at `tile`, rows from 16 row16 and columns from 8 column8 on: added, or where nobody has
// written yet (is_first) put there.
template <class Tile, int kRows, int kTiles>
__forceinline__ void add_to_dq(float* tile, const float (&sum)[kRows][kTiles][4], int row16, int column8, bool is_first) {
  float* to = tile + Tile::fragment(row16, column8) + (threadIdx.x & 31);
  auto for_each = [&](auto put) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) put(to + Tile::fragment(r, j) + 32 * e, sum[r][j][e]);
      }
    }
  };
  if (is_first) {
    for_each([](float* at, float x) { *at = x; });
  } else {
    for_each([](float* at, float x) { atomicAdd(at, x); });
  }
}
