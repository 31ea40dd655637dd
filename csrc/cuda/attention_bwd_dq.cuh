// dq = scale dS k of BLOCK_M queries of one head, with dS = P (dP - delta), dP = dout vᵀ; and dS itself into a dbias of full
// size.
// A block: keeps its tiles of q and dout and walks over the keys that its queries see, in one fixed order, without atomics.
//   Each of kWarps warps owns 16 kRows queries; dS stays in its registers as the next A operand.
// Grid: blocks of queries (from the last one on, which has the longest causal walk) · nheads · batch.
// Shared memory in bytes: 2 (D + DV) (BLOCK_M + 2 BLOCK_N) + 80.
// Bound by the tensor cores and the shared memory's bandwidth: 6 · headdim flops per pair; of BLOCK_M · BLOCK_N (2 D + DV) /
//   2048 mma per tile each reads 256 / kRows bytes for B, and 512 / (BLOCK_N / 8) for A where it is not in registers.
// Source: FlashAttention-2 (arXiv 2307.08691), the dq of algorithm 2 as a kernel of its own.
#pragma once
#include <attention_bwd_params.h>

#include <ptx/cp_async.cuh>
#include <tile/bwd_lost.cuh>
#include <tile/bwd_product.cuh>
#include <tile/bwd_score.cuh>
#include <tile/copy.cuh>

// What a block of queries works on; in shared memory, because it is rarely read and would cost registers.
struct AttentionBwdQueries {
  Sequence sequence;
  Walk walk;          // over the tiles of keys
  int hi;             // the queries see keys below it
  int m0, safe;       // its first query; 1: numbers were lost, this is the second round (tile/bwd_lost.cuh)
  int masked, steps;  // a step is a tile; those that need a mask come first
};

// kPairs: the call has an option that tells single pairs apart (mask, bias, ALiBi, softcap, dropout).
template <class T, int D, int DV, int BLOCK_M, int BLOCK_N, int kWarps, bool kAligned, bool kPairs>
__global__ void __launch_bounds__(32 * kWarps, 1) attention_bwd_dq_kernel(const __grid_constant__ AttentionBwdParams p) {
  constexpr int kThreads = 32 * kWarps, kRows = BLOCK_M / (16 * kWarps);
  static_assert(kRows * 16 * kWarps == BLOCK_M && BLOCK_N % 16 == 0, "");
  using QTile = TileLayout<BLOCK_M, D>;
  using DoutTile = TileLayout<BLOCK_M, DV>;
  using KTile = TileLayout<BLOCK_N, D>;
  using VTile = TileLayout<BLOCK_N, DV>;
  u8* q_smem = shared_memory();
  u8* dout_smem = q_smem + QTile::kBytes;
  u8* k_smem = dout_smem + DoutTile::kBytes;  // two stages
  u8* v_smem = k_smem + 2 * KTile::kBytes;
  AttentionBwdQueries& block = *reinterpret_cast<AttentionBwdQueries*>(v_smem + 2 * VTile::kBytes);
  const Sequence& s = block.sequence;
  const Walk& walk = block.walk;

  const int blocks = (p.seqlen_q + BLOCK_M - 1) / BLOCK_M;
  if (threadIdx.x == 0) {
    int rest = static_cast<int>(blockIdx.x) / blocks;
    int m0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * BLOCK_M;
    block.m0 = m0;
    block.safe = 0;
    block.sequence = sequence_of(p, rest / p.nheads, rest % p.nheads);
    const Range range = key_range<BLOCK_N>(p, block.sequence, m0, min(m0 + BLOCK_M, block.sequence.seqlen_q));
    block.walk = walk_of<BLOCK_N>(range, kPairs);
    block.hi = range.hi;
    block.masked = block.walk.masked();
    block.steps = block.masked + block.walk.whole;
  }
  __syncthreads();
  const int& m0 = block.m0;
  if (m0 >= s.seqlen_q) return;
  const int lane = threadIdx.x & 31, warp_row = 16 * kRows * static_cast<int>(threadIdx.x / 32);

  {
    const T* q = row_of<T>(p.q, p.q_stride, s.b, s.first_q, s.h, m0);
    const T* dout = row_of<T>(p.dout, p.dout_stride, s.b, s.first_q, s.h, m0);
    copy_rows_async<kThreads, BLOCK_M, D>(q_smem, q, p.q_stride[1], s.seqlen_q - m0, p.headdim, kAligned);
    copy_rows_async<kThreads, BLOCK_M, DV>(dout_smem, dout, p.dout_stride[1], s.seqlen_q - m0, p.headdim_v, kAligned);
  }
  auto key_of = [&](int step) {
    bool is_masked = step < block.masked;
    return walk.lo + walk.tile(is_masked ? step : step - block.masked, is_masked) * BLOCK_N;
  };
  Sight sight = kPartly;               // what the mask shows of the step that was found last
  auto visible_from = [&](int step) {  // the first step from this one on that the mask does not hide
    if constexpr (kPairs) {
      for (; p.mask != nullptr && step < block.steps; ++step) {
        int n0 = key_of(step), m1 = min(m0 + BLOCK_M, s.seqlen_q), n1 = min(n0 + BLOCK_N, s.seqlen_k);
        sight = look_together<BLOCK_N, kWarps>(pairs_of<u8>(p.mask, p.mask_stride, s), m0, m1, n0, n1);
        if (sight != kHidden) break;
      }
    }
    return step;
  };
  auto load = [&](int step, int stage) {
    int n0 = key_of(step), limit = s.seqlen_k - n0;
    const T* k = row_of<T>(p.k, p.k_stride, s.b, s.first_k, s.h_k, n0);
    const T* v = row_of<T>(p.v, p.v_stride, s.b, s.first_k, s.h_k, n0);
    copy_rows_async<kThreads, BLOCK_N, D>(k_smem + stage * KTile::kBytes, k, p.k_stride[1], limit, p.headdim, kAligned);
    copy_rows_async<kThreads, BLOCK_N, DV>(v_smem + stage * VTile::kBytes, v, p.v_stride[1], limit, p.headdim_v, kAligned);
  };

  Statistics statistics[kRows];
  i64 first_row = s.b * p.row_stride[0] + s.h * p.row_stride[1] + s.first_q + m0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = warp_row + 16 * r + 8 * half + (lane >> 2);
      statistics[r].lse[half] = m0 + row < s.seqlen_q ? p.lse_log2[first_row + row] : infinity();
      statistics[r].delta[half] = m0 + row < s.seqlen_q ? p.delta[first_row + row] : 0.0f;
    }
  }
  float dq[kRows][D / 8][4];
  const float scale = p.scale * kLog2e;

  auto compute = [&](auto is_masked, int step, int stage, Sight sight) {
    constexpr bool kMasked = decltype(is_masked)::value;
    int n0 = key_of(step), n = n0 + 2 * (lane & 3);
    u8* k_tile = k_smem + stage * KTile::kBytes;
    u8* v_tile = v_smem + stage * VTile::kBytes;
    Span span[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kMasked) span[r][half] = span_of(p, s, m0 + warp_row + 16 * r + 8 * half + (lane >> 2), n);
      }
    }
    float weights[kRows][BLOCK_N / 8][4], ds[kRows][BLOCK_N / 8][4];  // S, then P; dP, then dS
    clear(weights);
    add_product_transposed<T, QTile, KTile>(weights, q_smem + warp_row * QTile::kRowBytes, k_tile);
    if (!kPairs) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
          probabilities<kMasked, false>(weights[r][j], scale, statistics[r], span[r], j);
        }
      }
    }
    clear(ds);
    add_product_transposed<T, DoutTile, VTile>(ds, dout_smem + warp_row * DoutTile::kRowBytes, v_tile);
    if (!kPairs) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
          score_gradient<kMasked, false>(weights[r][j], ds[r][j], statistics[r]);
        }
      }
    } else {
      HeadScores scores = head_scores<T>(p, s);
      if (sight == kWhole) scores.mask.first = nullptr;
      Philox philox = {};
      if (p.philox != nullptr) philox = load_philox(p.philox);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        int m = m0 + warp_row + 16 * r;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
          uint4 words = {};
          if (p.philox != nullptr) words = philox_fragment(philox, n0 + 8 * j, m, scores.head);
          pair_gradients<T, false, kToMemory>(p, scores, weights[r][j], ds[r][j], statistics[r], span[r], m + (lane >> 2), n,
                                              s.diagonal, j, words);
        }
      }
    }
    if (kMasked && block.safe) {
      __syncthreads();
      clean_tile<T, kThreads, KTile::kBytes>(k_tile);
      __syncthreads();
    }
    add_product<T, KTile, 1>(dq, ds, k_tile, 0);
  };

  for (;;) {
    clear(dq);
    int step = visible_from(0), stage = 0;
    if (step < block.steps) load(step, 0);
    cp_async_commit();
    auto walk_to = [&](auto is_masked, int end) {
      while (step < end) {
        const Sight now = sight;
        int next = visible_from(step + 1);
        cp_async_wait<0>();
        __syncthreads();  // this stage has landed, and all warps have left the other one
        if (next < block.steps) load(next, stage ^ 1);
        cp_async_commit();
        compute(is_masked, step, stage, now);
        step = next;
        stage ^= 1;
      }
    };
    walk_to(Flag<true>{}, block.masked);
    if constexpr (!kPairs) walk_to(Flag<false>{}, block.steps);
    cp_async_wait<0>();
    if (__syncthreads_or(!block.safe && block.masked > 0 && is_lost(dq, s.seqlen_q - m0 - warp_row)) == 0) break;
    if (threadIdx.x == 0) block.safe = 1;
    __syncthreads();
  }

  put_accumulator<T, QTile, 1>(q_smem, dq, p.scale, warp_row, 0);
  __syncthreads();
  if (block.safe) {
#pragma unroll 1
    for (int n = walk.lo; n < block.hi; ++n) {
      const T* row = row_of<T>(p.k, p.k_stride, s.b, s.first_k, s.h_k, n);
      if (!row_is_lost(row, p.headdim)) continue;
#pragma unroll 1
      for (int i = threadIdx.x / 32; i < min(BLOCK_M, s.seqlen_q - m0); i += kWarps) {
        if (sees<T>(p, s, m0 + i, n)) add_lost_row<QTile, true>(q_smem, i, row, p.headdim);
      }
    }
    __syncthreads();
  }
  T* dq_rows = row_of<T>(p.dq, p.dq_stride, s.b, s.first_q, s.h, m0);
  store_rows<kThreads, BLOCK_M, D>(dq_rows, p.dq_stride[1], q_smem, s.seqlen_q - m0, p.headdim, threadIdx.x);
}
