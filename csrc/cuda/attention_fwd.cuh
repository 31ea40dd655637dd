#pragma once
#include <attention_params.h>

#include <tile/band.cuh>
#include <tile/copy.cuh>
#include <tile/lost.cuh>
#include <tile/mask_walk.cuh>
#include <tile/philox.cuh>
#include <tile/product.cuh>
#include <tile/score.cuh>
#include <tile/sink.cuh>
#include <tile/softmax.cuh>

constexpr int larger(int a, int b) { return a > b ? a : b; }

// What a block works on.
struct AttentionBlock {
  Sequence sequence;
  int lo, hi;  // the keys that its queries see lie in tiles from lo on, below hi
};

// o and lse of BLOCK_M queries of one head: an online softmax over the tiles of BLOCK_N keys that they see.
// Grid: (heads that take turns, blocks of queries, groups of such heads); the blocks that see most keys under a causal mask
// come first. Each warp owns BLOCK_M / kWarps queries; scores and probabilities stay in its registers, where
// mma's accumulator is the next mma's operand.
// Shared memory: q, and kStages tiles of k and v: 2 · (BLOCK_M · BLOCK_D + kStages · BLOCK_N · (BLOCK_D + BLOCK_DV)) bytes;
// q stays in registers and leaves its room to k and v if kQInRegisters. Bound by the tensor cores: 4 · headdim flops a pair.
// kPairs: anything beyond q·k · scale (> 0) within the band: mask, bias, softcap, ALiBi; kDropout comes on top of it.
// Dao, FlashAttention-2, arXiv:2307.08691.
template <class T, int BLOCK_M, int BLOCK_N, int BLOCK_D, int BLOCK_DV, int kWarps, int kStages, bool kQInRegisters, bool kAligned,
          bool kPairs, bool kDropout>
__global__ void __launch_bounds__(kWarps * 32, 1) attention_fwd_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kThreads = kWarps * 32, kTiles = BLOCK_M / kWarps / 16, kKeys8 = BLOCK_N / 8;
  using QLayout = TileLayout<BLOCK_M, BLOCK_D>;
  using KLayout = TileLayout<BLOCK_N, BLOCK_D>;
  using VLayout = TileLayout<BLOCK_N, BLOCK_DV>;
  constexpr int kRing = kQInRegisters ? 0 : QLayout::kBytes, kStageBytes = KLayout::kBytes + VLayout::kBytes;
  static_assert(BLOCK_M % (16 * kWarps) == 0 && BLOCK_N % 16 == 0 && (kStages == 1 || kStages == 2), "");
  static_assert(kPairs || !kDropout, "");
  // Behind q, k, v, and o that takes their place: what is rarely read, which would cost registers, and the mask's sights.
  constexpr int kTileBytes = kRing + kStages * kStageBytes, kOBytes = BLOCK_M * BLOCK_DV * 2;
  constexpr int kBehind = larger(QLayout::kBytes, larger(kTileBytes, kOBytes));

  const int head = blockIdx.z * gridDim.x + blockIdx.x;
  if (head >= p.batch * p.nheads) return;
  const int m0 = (gridDim.y - 1 - blockIdx.y) * BLOCK_M;
  u8* smem = shared_memory();
  u8* ring = smem + kRing;
  AttentionBlock& block = *reinterpret_cast<AttentionBlock*>(smem + kBehind);
  const Sequence& sequence = block.sequence;
  u8* sights = smem + kBehind + sizeof(AttentionBlock);
  if (threadIdx.x == 0) {
    block.sequence = sequence_of(p, head / p.nheads, head % p.nheads);
    const Range range = key_range<BLOCK_N>(p, sequence, m0, min(m0 + BLOCK_M, sequence.seqlen_q));
    block.lo = range.lo;
    block.hi = range.hi;
  }
  __syncthreads();
  if (m0 >= sequence.seqlen_q) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp * 16 * kTiles;
  const T* k = row_of<T>(p.k, p.k_stride, sequence.b, sequence.first_k, sequence.h_k, 0);
  const T* v = row_of<T>(p.v, p.v_stride, sequence.b, sequence.first_k, sequence.h_k, 0);
  auto copy_k = [&](int n0, int stage) {
    copy_rows_async<kThreads, BLOCK_N, BLOCK_D>(ring + stage * kStageBytes, k + n0 * p.k_stride[1], p.k_stride[1],
                                                sequence.seqlen_k - n0, p.headdim, kAligned);
  };
  auto copy_v = [&](int n0, int stage) {
    copy_rows_async<kThreads, BLOCK_N, BLOCK_DV>(ring + stage * kStageBytes + KLayout::kBytes, v + n0 * p.v_stride[1],
                                                 p.v_stride[1], sequence.seqlen_k - n0, p.headdim_v, kAligned);
  };
  auto clean_v = [&](int v_tile) {
    clean_tile<T, kThreads, VLayout::kBytes>(smem + v_tile);
    __syncthreads();
  };
  {
    const T* q = row_of<T>(p.q, p.q_stride, sequence.b, sequence.first_q, sequence.h, m0);
    copy_rows_async<kThreads, BLOCK_M, BLOCK_D>(smem, q, p.q_stride[1], sequence.seqlen_q - m0, p.headdim, kAligned);
    cp_async_commit();
  }
  u32 q_reg[kQInRegisters ? kTiles : 1][kQInRegisters ? BLOCK_D / 16 : 1][4];
  const int q_lane = QLayout::lane_a(), k_lane = KLayout::lane_b(), v_lane = VLayout::lane_a();
  if constexpr (kQInRegisters) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int d = 0; d < BLOCK_D / 16; ++d) load_a<QLayout>(q_reg[i][d], smem, q_lane, row0 + 16 * i, d);
    }
    __syncthreads();  // before k and v take its place
  }

  const ScoreRule rule = score_rule(p, sequence);
  const float factor = kPairs ? 1.0f : p.scale * kLog2e;
  Philox philox = {};
  if constexpr (kDropout) philox = load_philox(p.philox);
  const bool has_mask = kPairs && p.mask != nullptr;
  MaskWalk<BLOCK_N, kWarps> walk(pairs_of<u8>(p.mask, p.mask_stride, sequence), sights, m0, min(m0 + BLOCK_M, sequence.seqlen_q),
                                 sequence.seqlen_k, block.hi);

  float acc[kTiles][BLOCK_DV / 8][4];
  float top[kTiles][2], total[kTiles][2];
  bool careful = false;  // a second round, where 0 · NaN of a value that a query may not see is 0
  for (;;) {
    const float sink = sink_of<T>(p, sequence.h);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // one lane of the four that share a row counts the sink
        top[i][r] = sink;
        total[i][r] = sink == -infinity() || lane % 4 != 0 ? 0.0f : 1.0f;
      }
#pragma unroll
      for (int d = 0; d < BLOCK_DV / 8; ++d) acc[i][d][0] = acc[i][d][1] = acc[i][d][2] = acc[i][d][3] = 0.0f;
    }

    int n0 = has_mask ? walk.from(block.lo) : block.lo, stage = 0;
    if (n0 < block.hi) {
      copy_k(n0, 0);
      if (kStages == 2) copy_v(n0, 0);
      cp_async_commit();
    }
    while (n0 < block.hi) {
      const int k_tile = kRing + stage * kStageBytes, v_tile = k_tile + KLayout::kBytes;
      bool whole = in_band<BLOCK_M, BLOCK_N>(p, n0 - m0 - sequence.diagonal) && n0 + BLOCK_N <= sequence.seqlen_k &&
                   !(has_mask && walk.sight != kWhole) && !careful;
      int next = has_mask ? walk.from(n0 + BLOCK_N) : n0 + BLOCK_N;
      cp_async_wait<0>();
      __syncthreads();  // this tile is there, and nobody reads the one before it
      if (kStages == 1) {
        copy_v(n0, 0);
      } else if (next < block.hi) {
        copy_k(next, stage ^ 1);
        copy_v(next, stage ^ 1);
      }
      cp_async_commit();

      float s[kTiles][kKeys8][4] = {};
#pragma unroll
      for (int d = 0; d < BLOCK_D / 16; ++d) {
        u32 a[kTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if constexpr (kQInRegisters) {
#pragma unroll
            for (int x = 0; x < 4; ++x) a[i][x] = q_reg[i][d][x];
          } else {
            load_a<QLayout>(a[i], smem, q_lane, row0 + 16 * i, d);
          }
        }
#pragma unroll
        for (int j = 0; j < kKeys8 / 2; ++j) {
          u32 b[4];
          load_b<KLayout>(b, smem, k_tile + k_lane, 16 * j, d);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) mma_m16n16k16<T>(s[i][2 * j], s[i][2 * j + 1], a[i], b);
        }
      }
      if (kStages == 1) {
        cp_async_wait<0>();
        __syncthreads();  // v is there, and nobody reads k
        if (next < block.hi) copy_k(next, 0);
        cp_async_commit();
      }

#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const Corner corner = corner_of(p, sequence, m0 + row0 + 16 * i, n0);
        if constexpr (kPairs) {
          score_tile(s[i], rule, sequence, corner);
          if (p.bias != nullptr) {
            if (p.bias_float) {
              add_bias(s[i], pairs_of<float>(p.bias, p.bias_stride, sequence), corner);
            } else {
              add_bias(s[i], pairs_of<T>(p.bias, p.bias_stride, sequence), corner);
            }
          }
        }
        if (!whole) {
          hide_by_position(s[i], corner);
          if (has_mask) hide_by_mask(s[i], walk.mask, corner);
        }
      }
      u32 weights[kTiles][kKeys8 / 2][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float share[2];
        online_softmax<true>(s[i], top[i], total[i], share, factor);
        if (__any_sync(0xffffffffu, share[0] != 1.0f || share[1] != 1.0f)) {
#pragma unroll
          for (int d = 0; d < BLOCK_DV / 8; ++d) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][d][e] *= share[e / 2];
          }
        }
        if constexpr (kDropout) {
#pragma unroll
          for (int j = 0; j < kKeys8; ++j) {
            uint4 word = philox_fragment(philox, n0 + 8 * j, m0 + row0 + 16 * i, head);
            s[i][j][0] = word.x < p.dropout_threshold ? 0.0f : s[i][j][0];
            s[i][j][1] = word.y < p.dropout_threshold ? 0.0f : s[i][j][1];
            s[i][j][2] = word.z < p.dropout_threshold ? 0.0f : s[i][j][2];
            s[i][j][3] = word.w < p.dropout_threshold ? 0.0f : s[i][j][3];
          }
        }
#pragma unroll
        for (int j = 0; j < kKeys8 / 2; ++j) pack_a<T>(weights[i][j], s[i], j);
      }
      if (careful) clean_v(v_tile);
      multiply_values<T, VLayout>(acc, weights, smem, v_tile + v_lane);
      n0 = next;
      if (kStages == 2) stage ^= 1;
    }

    if (careful) break;
    bool lost = false;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) lost |= any_lost(acc[i]);
    if (!__syncthreads_or(lost)) break;
    careful = true;
    if (has_mask) walk.restart();
  }

  cp_async_wait<0>();
  __syncthreads();  // before o takes the place of q, k and v
  using OLayout = TileLayout<BLOCK_M, BLOCK_DV>;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int row = row0 + 16 * i + 8 * r + lane / 4;
      float sum = row_sum(total[i][r]), share = sum == 0.0f ? 1.0f : 1.0f / sum;
      if constexpr (kDropout) share *= p.dropout_scale;
#pragma unroll
      for (int d = 0; d < BLOCK_DV / 8; ++d) {
        u32* to = reinterpret_cast<u32*>(smem + OLayout::at(row, d));
        to[lane % 4] = pack<T>(acc[i][d][2 * r] * share, acc[i][d][2 * r + 1] * share);
      }
      if (lane % 4 == 0 && m0 + row < sequence.seqlen_q) {
        p.lse[sequence.b * p.lse_stride[0] + sequence.h * p.lse_stride[1] + sequence.first_q + m0 + row] = log_sum(top[i][r], sum);
      }
    }
  }
  __syncthreads();
  if (careful) {
    add_lost<T, OLayout, kThreads>(smem, p, sequence, v, p.v_stride[1], p.headdim_v, m0, min(m0 + BLOCK_M, sequence.seqlen_q),
                                   block.lo, block.hi);
    __syncthreads();
  }
  T* o = row_of<T>(p.o, p.o_stride, sequence.b, sequence.first_q, sequence.h, m0);
  store_rows<kThreads, BLOCK_M, BLOCK_DV>(o, p.o_stride[1], smem, sequence.seqlen_q - m0, p.headdim_v, threadIdx.x);
}
