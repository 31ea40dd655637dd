// One kernel per verb of csrc/cuda/tile that attention uses; tests/test_cuda_tile.py says what must come out.
#pragma once
#include <trial_params.h>

#include <ptx/mma.cuh>
#include <tile/band.cuh>
#include <tile/copy.cuh>
#include <tile/mask_walk.cuh>
#include <tile/philox.cuh>
#include <tile/product.cuh>
#include <tile/score.cuh>
#include <tile/softmax.cuh>
#include <tile/swizzle.cuh>

// out [kRows, kCols / 8, 2] int: where each 16-byte chunk lies, by `at` and by `move`.
template <int kRows, int kCols>
__global__ void __launch_bounds__(32) layout_kernel(const __grid_constant__ TrialParams p) {
  using Layout = TileLayout<kRows, kCols>;
  int* out = static_cast<int*>(p.out);
  for (int i = threadIdx.x; i < kRows * kCols / 8; i += 32) {
    int row = i / (kCols / 8), chunk = i % (kCols / 8);
    out[2 * i] = Layout::at(row, chunk);
    out[2 * i + 1] = Layout::move(Layout::at(row % 8, chunk % 2), row - row % 8, chunk / 2);
  }
}

// out [kRows, kCols] = the first n rows and `fault` columns of a [kRows, stride 2 kCols] bf16, 0 elsewhere, through a tile.
template <int kRows, int kCols, bool kAligned>
__global__ void __launch_bounds__(64) copy_kernel(const __grid_constant__ TrialParams p) {
  u8* tile = shared_memory();
  copy_rows_async<64, kRows, kCols>(tile, static_cast<const bf16*>(p.a), 2 * kCols, p.n, p.fault, kAligned);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  store_rows<64, kRows, kCols>(static_cast<bf16*>(p.out), kCols, tile, kRows, kCols, threadIdx.x);
}

// out [16, kCols] float = (a · b^T rounded to T) · b, a [16, kCols], b [32, kCols] of T, as attention multiplies.
template <class T, int kCols>
__global__ void __launch_bounds__(64) products_kernel(const __grid_constant__ TrialParams p) {
  using ALayout = TileLayout<16, kCols>;
  using BLayout = TileLayout<32, kCols>;
  u8 *a_tile = shared_memory(), *b_tile = a_tile + (ALayout::kBytes + 1023) / 1024 * 1024;
  copy_rows_async<64, 16, kCols>(a_tile, static_cast<const T*>(p.a), kCols, 16, kCols, true);
  copy_rows_async<64, 32, kCols>(b_tile, static_cast<const T*>(p.b), kCols, 32, kCols, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float s[4][4] = {};
  for (int d = 0; d < kCols / 16; ++d) {
    u32 a[4];
    load_a<ALayout>(a, a_tile, ALayout::lane_a(), 0, d);
    for (int j = 0; j < 2; ++j) {
      u32 b[4];
      load_b<BLayout>(b, b_tile, BLayout::lane_b(), 16 * j, d);
      mma_m16n16k16<T>(s[2 * j], s[2 * j + 1], a, b);
    }
  }
  u32 weights[1][2][4];
  for (int j = 0; j < 2; ++j) pack_a<T>(weights[0][j], s, j);
  float acc[1][kCols / 8][4] = {};
  multiply_values<T, BLayout>(acc, weights, b_tile, BLayout::lane_a());
  float* out = static_cast<float*>(p.out);
  for (int d = 0; d < kCols / 8; ++d) {
    for (int e = 0; e < 4; ++e) {
      out[(threadIdx.x / 4 + e / 2 * 8) * kCols + 8 * d + 2 * (threadIdx.x % 4) + e % 2] = acc[0][d][e];
    }
  }
}

struct Band {
  int left, right;
};

// a [5] int: left, right, seqlen_q, seqlen_k, diagonal. Of block i of 16 queries and 16 keys, out [n, 9] int: key_range,
// query_range, and whether the tile of query block i and key block 0 lies in the band.
__global__ void __launch_bounds__(32) band_kernel(const __grid_constant__ TrialParams p) {
  const int* a = static_cast<const int*>(p.a);
  Band band = {a[0], a[1]};
  Sequence s = {};
  s.seqlen_q = a[2];
  s.seqlen_k = a[3];
  s.diagonal = a[4];
  for (int i = threadIdx.x; i < p.n; i += 32) {
    Range keys = key_range<16>(band, s, 16 * i, min(16 * i + 16, s.seqlen_q));
    Range queries = query_range<16>(band, s, 16 * i, min(16 * i + 16, s.seqlen_k));
    int found[9] = {keys.lo,          keys.hi,          keys.whole_lo,
                    keys.whole_hi,    queries.lo,       queries.hi,
                    queries.whole_lo, queries.whole_hi, in_band<16, 16>(band, -16 * i - s.diagonal)};
    for (int x = 0; x < 9; ++x) static_cast<int*>(p.out)[9 * i + x] = found[x];
  }
}

// out [16, 2] float: top and lse of rows of scores a [16, 16 n], `fault` being the factor, in steps of 16 columns.
template <bool kLazy>
__global__ void __launch_bounds__(32) softmax_kernel(const __grid_constant__ TrialParams p) {
  const float* a = static_cast<const float*>(p.a);
  const int row = threadIdx.x / 4, column = 2 * (threadIdx.x % 4);
  float top[2] = {-infinity(), -infinity()}, total[2] = {}, sum[2] = {};
  for (int n0 = 0; n0 < 16 * p.n; n0 += 16) {
    float s[2][4], share[2];
    for (int j = 0; j < 2; ++j) {
      for (int e = 0; e < 4; ++e) s[j][e] = a[(row + e / 2 * 8) * 16 * p.n + n0 + 8 * j + column + e % 2];
    }
    online_softmax<kLazy>(s, top, total, share, static_cast<float>(p.fault));
    for (int r = 0; r < 2; ++r) {  // what a caller does with weights and share
      sum[r] = sum[r] * share[r] + s[0][2 * r] + s[0][2 * r + 1] + s[1][2 * r] + s[1][2 * r + 1];
    }
  }
  for (int r = 0; r < 2; ++r) {
    float* out = static_cast<float*>(p.out) + 2 * (row + 8 * r);
    float all = row_sum(total[r]), same = row_sum(sum[r]);
    if (column == 0) {
      out[0] = log_sum(top[r], all);
      out[1] = log_sum(top[r], same);
    }
  }
}

// out [2, 16, 8] u32: the words of queries 24 … 39 and keys 32 … 39, and of keys 40 … 55 and queries 24 … 31; head n.
__global__ void __launch_bounds__(32) philox_kernel(const __grid_constant__ TrialParams p) {
  Philox philox = load_philox(static_cast<const i64*>(p.a));
  uint4 word[2] = {philox_fragment(philox, 32, 24, p.n), philox_fragment_transposed(philox, 40, 24, p.n)};
  for (int way = 0; way < 2; ++way) {
    u32* out = static_cast<u32*>(p.out) + way * 128 + threadIdx.x / 4 * 8 + 2 * (threadIdx.x % 4);
    out[0] = word[way].x;
    out[1] = word[way].y;
    out[64] = word[way].z;
    out[65] = word[way].w;
  }
}

// out [n] float: scores of products a [n] in units of log 2; b [4] float: scale, softcap, slope, distance.
struct Scoring {
  float scale, softcap;
  const float* alibi_slopes;
  i64 alibi_stride;
};
__global__ void __launch_bounds__(32) score_kernel(const __grid_constant__ TrialParams p) {
  const float* b = static_cast<const float*>(p.b);
  Scoring scoring = {b[0], b[1], b + 2, 0};
  Sequence s = {};
  ScoreRule rule = score_rule(scoring, s);
  for (int i = threadIdx.x; i < p.n; i += 32) {
    static_cast<float*>(p.out)[i] = log2_score(rule, static_cast<const float*>(p.a)[i], b[3]);
  }
}

// a [20, n] u8, a mask; out [n / 16 + 1] int: for each tile of 16 keys 0 where the walk of queries 2 … 17 skips it, 1 where it
// says that they see it in part, 2 where as a whole.
__global__ void __launch_bounds__(64) walk_kernel(const __grid_constant__ TrialParams p) {
  Pairs<u8> mask = {static_cast<const u8*>(p.a), p.fault == 1 ? 0 : p.n, 1};
  MaskWalk<16, 2> walk(mask, shared_memory(), 2, 18, p.n, p.n);
  int* out = static_cast<int*>(p.out);
  for (int n0 = walk.from(0); n0 < p.n; n0 = walk.from(n0 + 16)) {
    if (threadIdx.x == 0) out[n0 / 16] = walk.sight == kWhole ? 2 : 1;
  }
}
