// The gradient of a bias that broadcasts: dS summed over all pairs that read one entry.
// A block: one tile of dbias of one of the owned_h heads and owned_b sequences that it tells apart; it walks over the
//   others, and over the queries or keys that the bias does not have, in one fixed order. A warp owns 16 queries.
// Grid: tiles of the bias · owned_h · owned_b.
// Shared memory in bytes: 2 (D + DV) (BLOCK_M + BLOCK_N), and BLOCK_M · BLOCK_N / 4 for sums over queries.
// Bound by the latency of its loads (one stage), then by the tensor cores: 4 · headdim flops per pair.
#pragma once
#include <attention_bwd_params.h>

#include <ptx/cp_async.cuh>
#include <tile/bwd_product.cuh>
#include <tile/bwd_score.cuh>
#include <tile/copy.cuh>

template <class T, int D, int DV, int BLOCK_M, int BLOCK_N, bool kAligned>
__global__ void __launch_bounds__(2 * BLOCK_M, 1) attention_bwd_dbias_kernel(const __grid_constant__ AttentionBwdParams p) {
  constexpr int kThreads = 2 * BLOCK_M, kTiles = BLOCK_N / 8;
  using QTile = TileLayout<BLOCK_M, D>;
  using DoutTile = TileLayout<BLOCK_M, DV>;
  using KTile = TileLayout<BLOCK_N, D>;
  using VTile = TileLayout<BLOCK_N, DV>;
  u8* q_smem = shared_memory();
  u8* dout_smem = q_smem + QTile::kBytes;
  u8* k_smem = dout_smem + DoutTile::kBytes;
  u8* v_smem = k_smem + KTile::kBytes;
  float* sums_smem = reinterpret_cast<float*>(v_smem + VTile::kBytes);  // [warps][BLOCK_N]
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32;

  int blocks_m = (p.seqlen_q + BLOCK_M - 1) / BLOCK_M, blocks_n = (p.seqlen_k + BLOCK_N - 1) / BLOCK_N;
  int tiles_m = p.bias_rows ? blocks_m : 1, tiles_n = p.bias_cols ? blocks_n : 1;
  int steps_m = p.bias_rows ? 1 : blocks_m, steps_n = p.bias_cols ? 1 : blocks_n;
  int steps_h = p.nheads / p.owned_h, steps_b = p.batch / p.owned_b;
  int block = blockIdx.x, at_n = block % tiles_n, at_m = block / tiles_n % tiles_m;
  int at_h = block / tiles_n / tiles_m % p.owned_h, at_b = block / tiles_n / tiles_m / p.owned_h;

  float total[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) total[j][e] = 0.0f;
  }
  i64 steps = static_cast<i64>(steps_b) * steps_h * steps_m * steps_n;
#pragma unroll 1
  for (i64 step = 0; step < steps; ++step) {
    int n0 = (at_n + static_cast<int>(step % steps_n)) * BLOCK_N;
    int m0 = (at_m + static_cast<int>(step / steps_n % steps_m)) * BLOCK_M;
    int other = static_cast<int>(step / steps_n / steps_m);
    const Sequence s = sequence_of(p, at_b + other / steps_h, at_h + other % steps_h);
    int m1 = min(m0 + BLOCK_M, s.seqlen_q), n1 = min(n0 + BLOCK_N, s.seqlen_k);
    if (m0 >= m1 || n0 >= n1) continue;
    const Range range = key_range<1>(p, s, m0, m1);
    if (range.lo >= n1 || range.hi <= n0) continue;
    Sight sight = kPartly;
    if (p.mask != nullptr) {
      sight = look_together<BLOCK_N, kThreads / 32>(pairs_of<u8>(p.mask, p.mask_stride, s), m0, m1, n0, n1);
      if (sight == kHidden) continue;
    }
    __syncthreads();  // all warps have left the tiles of the step before
    const T* q = row_of<T>(p.q, p.q_stride, s.b, s.first_q, s.h, m0);
    const T* dout = row_of<T>(p.dout, p.dout_stride, s.b, s.first_q, s.h, m0);
    const T* k = row_of<T>(p.k, p.k_stride, s.b, s.first_k, s.h_k, n0);
    const T* v = row_of<T>(p.v, p.v_stride, s.b, s.first_k, s.h_k, n0);
    copy_rows_async<kThreads, BLOCK_M, D>(q_smem, q, p.q_stride[1], m1 - m0, p.headdim, kAligned);
    copy_rows_async<kThreads, BLOCK_M, DV>(dout_smem, dout, p.dout_stride[1], m1 - m0, p.headdim_v, kAligned);
    copy_rows_async<kThreads, BLOCK_N, D>(k_smem, k, p.k_stride[1], n1 - n0, p.headdim, kAligned);
    copy_rows_async<kThreads, BLOCK_N, DV>(v_smem, v, p.v_stride[1], n1 - n0, p.headdim_v, kAligned);
    cp_async_commit();
    int m = m0 + 16 * warp + (lane >> 2), n = n0 + 2 * (lane & 3);
    i64 row = s.b * p.row_stride[0] + s.h * p.row_stride[1] + s.first_q + m;
    Statistics statistics;
    Span span[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool exists = m + 8 * half < s.seqlen_q;
      statistics.lse[half] = exists ? p.lse_log2[row + 8 * half] : infinity();
      statistics.delta[half] = exists ? p.delta[row + 8 * half] : 0.0f;
      span[half] = span_of(p, s, m + 8 * half, n);
    }
    cp_async_wait<0>();
    __syncthreads();

    float weights[1][kTiles][4], ds[1][kTiles][4];  // S, then P; dP, then dS
    clear(weights);
    add_product_transposed<T, QTile, KTile>(weights, q_smem + 16 * warp * QTile::kRowBytes, k_smem);
    clear(ds);
    add_product_transposed<T, DoutTile, VTile>(ds, dout_smem + 16 * warp * DoutTile::kRowBytes, v_smem);
    HeadScores scores = head_scores<T>(p, s);
    if (sight == kWhole) scores.mask.first = nullptr;
    Philox philox = {};
    if (p.philox != nullptr) philox = load_philox(p.philox);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint4 words = {};
      if (p.philox != nullptr) words = philox_fragment(philox, n0 + 8 * j, m0 + 16 * warp, scores.head);
      pair_gradients<T, false, kInPlace>(p, scores, weights[0][j], ds[0][j], statistics, span, m, n, s.diagonal, j, words);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[j][e] += ds[0][j][e];
    }
  }

  float* dbias = p.dbias + at_b * p.dbias_stride[0] + at_h * p.dbias_stride[1];
  int m = at_m * BLOCK_M + 16 * warp + (lane >> 2), n0 = at_n * BLOCK_N, n = n0 + 2 * (lane & 3);
  if (p.bias_rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum += total[j][2 * half + e];
          if (p.bias_cols && m + 8 * half < p.seqlen_q && n + 8 * j + e < p.seqlen_k) {
            dbias[(m + 8 * half) * p.dbias_stride[2] + (n + 8 * j + e) * p.dbias_stride[3]] = total[j][2 * half + e];
          }
        }
      }
      sum = row_sum(sum);
      if (!p.bias_cols && m + 8 * half < p.seqlen_q && lane % 4 == 0) dbias[(m + 8 * half) * p.dbias_stride[2]] = sum;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = total[j][e] + total[j][2 + e];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane < 4) sums_smem[warp * BLOCK_N + 8 * j + 2 * lane + e] = sum;
    }
  }
  __syncthreads();
  float all = 0.0f;
  for (int i = p.bias_cols ? threadIdx.x : 0; i < BLOCK_N; i += p.bias_cols ? kThreads : 1) {
    float sum = 0.0f;
    for (int w = 0; w < kThreads / 32; ++w) sum += sums_smem[w * BLOCK_N + i];
    if (p.bias_cols && n0 + i < p.seqlen_k) dbias[(n0 + i) * p.dbias_stride[3]] = sum;
    all += sum;
  }
  if (!p.bias_cols && threadIdx.x == 0) dbias[0] = all;
}
