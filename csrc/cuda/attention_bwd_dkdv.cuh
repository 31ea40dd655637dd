// dk = scale dSᵀ q and dv = Pᵀ dout of BLOCK_N keys of one head of k and v, with dS = P (dP - delta), dP = dout vᵀ.
// A block: keeps its tiles of k and v and walks over the queries that see them, for each query head of the group, so that
//   every gradient is a sum in one fixed order, without atomics. Sᵀ and dPᵀ are computed transposed, [keys, queries]: with
//   kWarpsD = 1 a warp owns 16 kRows keys and P, dS stay in its registers as the next A operands; with 2, pairs of warps
//   share keys: each computes half of the queries' scores and half of the columns of dk and dv, P and dS meet in shared
//   memory.
// Grid: blocks of keys (those with the longest causal walk first) · nheads_k · batch.
// Shared memory in bytes: 2 D (BLOCK_N + 2 BLOCK_M) + 2 DV (BLOCK_N + 2 BLOCK_M) + 16 BLOCK_M + 80, and with kWarpsD = 2
//   another 4 BLOCK_M · BLOCK_N.
// Bound by the tensor cores and the shared memory's bandwidth: 8 · headdim flops per pair; of 2 · BLOCK_M · BLOCK_N ·
//   (D + DV) / 2048 mma per tile each reads 256 / kRows bytes for B, and 512 / (columns / 8) for A where it is not in registers.
// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, with dq in a kernel of its own.
#pragma once
#include <attention_bwd_params.h>

#include <ptx/cp_async.cuh>
#include <tile/bwd_lost.cuh>
#include <tile/bwd_product.cuh>
#include <tile/bwd_score.cuh>
#include <tile/copy.cuh>

// What a block of keys works on; in shared memory, because it is rarely read and would cost registers.
struct AttentionBwdKeys {
  Sequence first;     // of the first head of the group
  Walk walk;          // over the tiles of queries of each head
  int hi;             // the queries below it see these keys
  int n0, safe;       // its first key; 1: numbers were lost, this is the second round (tile/bwd_lost.cuh)
  int masked, steps;  // a step is a tile of one head; those that need a mask come first, for all heads
};

// kPairs: the call has an option that tells single pairs apart (mask, bias, ALiBi, softcap, dropout).
template <class T, int D, int DV, int BLOCK_M, int BLOCK_N, int kWarpsN, int kWarpsD, bool kAligned, bool kPairs>
__global__ void __launch_bounds__(32 * kWarpsN * kWarpsD, 1)
    attention_bwd_dkdv_kernel(const __grid_constant__ AttentionBwdParams p) {
  constexpr int kThreads = 32 * kWarpsN * kWarpsD, kRows = BLOCK_N / (16 * kWarpsN), kCols = BLOCK_M / kWarpsD;
  static_assert(kRows * 16 * kWarpsN == BLOCK_N && kCols % 16 == 0, "");
  using KTile = TileLayout<BLOCK_N, D>;
  using VTile = TileLayout<BLOCK_N, DV>;
  using QTile = TileLayout<BLOCK_M, D>;
  using DoutTile = TileLayout<BLOCK_M, DV>;
  using PTile = TileLayout<BLOCK_N, kWarpsD == 1 ? 32 : BLOCK_M>;
  u8* k_smem = shared_memory();
  u8* v_smem = k_smem + KTile::kBytes;
  u8* q_smem = v_smem + VTile::kBytes;  // two stages
  u8* dout_smem = q_smem + 2 * QTile::kBytes;
  u8* p_smem = dout_smem + 2 * DoutTile::kBytes;
  u8* ds_smem = p_smem + PTile::kBytes;
  float* rows_smem = reinterpret_cast<float*>(p_smem + (kWarpsD == 1 ? 0 : 2 * PTile::kBytes));  // [2][lse, delta][BLOCK_M]
  AttentionBwdKeys& block = *reinterpret_cast<AttentionBwdKeys*>(rows_smem + 4 * BLOCK_M);
  const Sequence& first = block.first;
  const Walk& walk = block.walk;

  const int blocks = (p.seqlen_k + BLOCK_N - 1) / BLOCK_N, group = p.nheads / p.nheads_k;
  if (threadIdx.x == 0) {
    int rest = static_cast<int>(blockIdx.x) / blocks, n0 = static_cast<int>(blockIdx.x) % blocks * BLOCK_N;
    block.n0 = n0;
    block.safe = 0;
    block.first = sequence_of(p, rest / p.nheads_k, rest % p.nheads_k * group);
    const Range range = query_range<BLOCK_M>(p, block.first, n0, min(n0 + BLOCK_N, block.first.seqlen_k));
    block.walk = walk_of<BLOCK_M>(range, kPairs);
    block.hi = range.hi;
    block.masked = block.walk.masked() * group;
    block.steps = block.masked + block.walk.whole * group;
  }
  __syncthreads();
  const int& n0 = block.n0;
  if (n0 >= first.seqlen_k) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, warp_n = warp % kWarpsN, warp_d = warp / kWarpsN;
  const int row_warp = 16 * kRows * warp_n, m_warp = kCols * warp_d;

  {
    const T* k = row_of<T>(p.k, p.k_stride, first.b, first.first_k, first.h_k, n0);
    const T* v = row_of<T>(p.v, p.v_stride, first.b, first.first_k, first.h_k, n0);
    copy_rows_async<kThreads, BLOCK_N, D>(k_smem, k, p.k_stride[1], first.seqlen_k - n0, p.headdim, kAligned);
    copy_rows_async<kThreads, BLOCK_N, DV>(v_smem, v, p.v_stride[1], first.seqlen_k - n0, p.headdim_v, kAligned);
  }

  struct Step {
    int h, m0;  // a head of the group, the first query of a tile
  };
  auto step_of = [&](int i) {
    bool is_masked = i < block.masked;
    int tiles = is_masked ? walk.masked() : walk.whole, at = is_masked ? i : i - block.masked;
    int g = group == 1 ? 0 : at / tiles;
    return Step{first.h + g, walk.lo + walk.tile(at - g * tiles, is_masked) * BLOCK_M};
  };
  auto sequence = [&](const Step& step) {
    Sequence s = first;
    s.h = step.h;
    return s;
  };
  Sight sight = kPartly;            // what the mask shows of the step that was found last
  auto visible_from = [&](int i) {  // the first step from this one on that the mask does not hide
    if constexpr (kPairs) {
      for (; p.mask != nullptr && i < block.steps; ++i) {
        Step step = step_of(i);
        auto mask = pairs_of<u8>(p.mask, p.mask_stride, sequence(step));
        int m1 = min(step.m0 + BLOCK_M, first.seqlen_q), n1 = min(n0 + BLOCK_N, first.seqlen_k);
        sight = look_together<BLOCK_N, kThreads / 32>(mask, step.m0, m1, n0, n1);
        if (sight != kHidden) break;
      }
    }
    return i;
  };
  auto load = [&](int i, int stage) {
    const Step step = step_of(i);
    int limit = first.seqlen_q - step.m0;
    const T* q = row_of<T>(p.q, p.q_stride, first.b, first.first_q, step.h, step.m0);
    const T* dout = row_of<T>(p.dout, p.dout_stride, first.b, first.first_q, step.h, step.m0);
    copy_rows_async<kThreads, BLOCK_M, D>(q_smem + stage * QTile::kBytes, q, p.q_stride[1], limit, p.headdim, kAligned);
    copy_rows_async<kThreads, BLOCK_M, DV>(dout_smem + stage * DoutTile::kBytes, dout, p.dout_stride[1], limit, p.headdim_v,
                                           kAligned);
    i64 row = first.b * p.row_stride[0] + step.h * p.row_stride[1] + first.first_q + step.m0;
    float* to = rows_smem + 2 * BLOCK_M * stage;
    for (int x = threadIdx.x; x < 2 * BLOCK_M; x += kThreads) {
      int m = x % BLOCK_M;
      const float* from = x < BLOCK_M ? p.lse_log2 : p.delta;
      cp_async_4(to + x, m < limit ? from + row + m : from, m < limit);
    }
  };

  float dk[kRows][D / 8 / kWarpsD][4], dv[kRows][DV / 8 / kWarpsD][4];
  const float scale = p.scale * kLog2e;

  auto compute = [&](auto is_masked, int i, int stage, Sight sight) {
    constexpr bool kMasked = decltype(is_masked)::value;
    u8* q_tile = q_smem + stage * QTile::kBytes;
    u8* dout_tile = dout_smem + stage * DoutTile::kBytes;
    const float* lse = rows_smem + 2 * BLOCK_M * stage + m_warp + 2 * (lane & 3);
    auto statistics = [&](int j) {
      float2 l = *reinterpret_cast<const float2*>(lse + 8 * j), d = *reinterpret_cast<const float2*>(lse + BLOCK_M + 8 * j);
      return Statistics{{l.x, l.y}, {d.x, d.y}};
    };
    const Step step = kMasked ? step_of(i) : Step{};
    int m = step.m0 + m_warp + 2 * (lane & 3);
    Span span[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kMasked) span[r][half] = span_of_key(p, first, n0 + row_warp + 16 * r + 8 * half + (lane >> 2), m);
      }
    }

    float weights[kRows][kCols / 8][4], ds[kRows][kCols / 8][4];  // S, then P; dP, then dS
    clear(weights);
    add_product_transposed<T, KTile, QTile>(weights, k_smem + row_warp * KTile::kRowBytes, q_tile + m_warp * QTile::kRowBytes);
    if (!kPairs) {
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) probabilities<kMasked, true>(weights[r][j], scale, statistics(j), span[r], j);
      }
    }
    clear(ds);
    add_product_transposed<T, VTile, DoutTile>(ds, v_smem + row_warp * VTile::kRowBytes, dout_tile + m_warp * DoutTile::kRowBytes);
    if (!kPairs) {
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) score_gradient<kMasked, true>(weights[r][j], ds[r][j], statistics(j));
      }
    } else {
      HeadScores scores = head_scores<T>(p, sequence(step));
      if (sight == kWhole) scores.mask.first = nullptr;
      Philox philox = {};
      if (p.philox != nullptr) philox = load_philox(p.philox);
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          int n = n0 + row_warp + 16 * r;
          uint4 words = {};
          if (p.philox != nullptr) words = philox_fragment_transposed(philox, n, step.m0 + m_warp + 8 * j, scores.head);
          pair_gradients<T, true, false>(p, scores, weights[r][j], ds[r][j], statistics(j), span[r], m, n + (lane >> 2),
                                         first.diagonal, j, words);
        }
      }
    }
    if (kMasked && block.safe) {
      __syncthreads();
      clean_tile<T, kThreads, QTile::kBytes>(q_tile);
      clean_tile<T, kThreads, DoutTile::kBytes>(dout_tile);
      __syncthreads();
    }
    if constexpr (kWarpsD == 1) {
      add_product<T, DoutTile>(dv, weights, dout_tile);
      add_product<T, QTile>(dk, ds, q_tile);
    } else {
      put_accumulator<T, PTile, 1>(p_smem, weights, 1.0f, row_warp, m_warp / 16);
      put_accumulator<T, PTile, 1>(ds_smem, ds, 1.0f, row_warp, m_warp / 16);
      __syncthreads();
      int row = row_warp * PTile::kRowBytes;
      add_product<T, PTile, DoutTile, BLOCK_M / 16, 2>(dv, p_smem + row, dout_tile, warp_d);
      add_product<T, PTile, QTile, BLOCK_M / 16, 2>(dk, ds_smem + row, q_tile, warp_d);
    }
  };

  for (;;) {
    clear(dk);
    clear(dv);
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
    int rows = first.seqlen_k - n0 - row_warp;
    if (__syncthreads_or(!block.safe && block.masked > 0 && (is_lost(dk, rows) || is_lost(dv, rows))) == 0) break;
    if (threadIdx.x == 0) block.safe = 1;
    __syncthreads();
  }

  put_accumulator<T, KTile, kWarpsD>(k_smem, dk, p.scale, row_warp, warp_d);
  put_accumulator<T, VTile, kWarpsD>(v_smem, dv, p.philox == nullptr ? 1.0f : p.dropout_scale, row_warp, warp_d);
  __syncthreads();
  int limit = first.seqlen_k - n0;
  if (block.safe) {
#pragma unroll 1
    for (int i = 0; i < group * (block.hi - walk.lo); ++i) {
      Sequence s = first;
      s.h += i % group;
      int m = walk.lo + i / group;
      const T* q = row_of<T>(p.q, p.q_stride, s.b, s.first_q, s.h, m);
      const T* dout = row_of<T>(p.dout, p.dout_stride, s.b, s.first_q, s.h, m);
      if (!row_is_lost(q, p.headdim) && !row_is_lost(dout, p.headdim_v)) continue;
#pragma unroll 1
      for (int row = warp; row < min(BLOCK_N, limit); row += kThreads / 32) {
        if (!sees<T>(p, s, m, n0 + row)) continue;
        add_lost_row<KTile, true>(k_smem, row, q, p.headdim);
        add_lost_row<VTile, false>(v_smem, row, dout, p.headdim_v);
      }
    }
    __syncthreads();
  }
  T* dk_rows = row_of<T>(p.dk, p.dk_stride, first.b, first.first_k, first.h_k, n0);
  T* dv_rows = row_of<T>(p.dv, p.dv_stride, first.b, first.first_k, first.h_k, n0);
  store_rows<kThreads, BLOCK_N, D>(dk_rows, p.dk_stride[1], k_smem, limit, p.headdim, threadIdx.x);
  store_rows<kThreads, BLOCK_N, DV>(dv_rows, p.dv_stride[1], v_smem, limit, p.headdim_v, threadIdx.x);
}
