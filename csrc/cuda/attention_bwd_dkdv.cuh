// dk = scale dSᵀ q and dv = Pᵀ dout of BLOCK_N keys of one head of k and v, with dS = P (dP - delta), dP = dout vᵀ; and with kDq
// what these keys add to dq = scale dS k.
// A block: keeps its tiles of k and v and walks over the queries that see them, last tile first, for each query head of the
//   group, so that dk and dv are sums in one fixed order. Sᵀ and dPᵀ are computed transposed, [keys, queries]: with kWarpsD = 1 a
//   warp owns 16 kRows keys and P, dS stay in its registers as the next A operands; with 2, pairs of warps share keys: each
//   computes half of the queries' scores and half of the columns of dk and dv, P and dS meet in shared memory. For dq, whose tile
//   all warps share, dS does in both cases; dq is added to float32 sums in global memory, in turns (tile/bwd_dq.cuh) or in any
//   order, and attention_bwd_dq_sums.cuh rounds it.
// Grid: blocks of keys · nheads_k · batch. In turns, blocks draw their numbers as they begin: whoever waits, waits for blocks
//   that have begun, whatever order the hardware chooses.
// Shared memory in bytes: 2 (D + DV) (BLOCK_N + 2 BLOCK_M) + 16 BLOCK_M + 112, and 2 BLOCK_M · BLOCK_N for each of P and dS that
//   is exchanged.
// Bound by the tensor cores and the shared memory's bandwidth: 4 (D + DV) flops per pair, with kDq (6 D + 4 DV) and 4 D / BLOCK_N
//   bytes added in the L2 cache; counts per tile in docs/design/cuda-kernels.md.
// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
#pragma once
#include <attention_bwd_params.h>

#include <ptx/cp_async.cuh>
#include <ptx/flag.cuh>
#include <ptx/opaque.cuh>
#include <tile/bwd_dq.cuh>
#include <tile/bwd_lost.cuh>
#include <tile/bwd_product.cuh>
#include <tile/bwd_score.cuh>
#include <tile/copy.cuh>

// A tile of queries of one head of the group, and what the mask shows of it.
struct AttentionBwdStep {
  int h, m0;
  Sight sight;
};

// What a block of keys works on; in shared memory, because it is rarely read and would cost registers.
struct AttentionBwdKeys {
  Sequence first;             // of the first head of the group
  int n0;                     // its first key
  int lo, hi;                 // its queries, lo a multiple of BLOCK_M
  int whole_lo, whole_hi;     // of these, those of tiles that need no mask
  int last;                   // the first query of the last tile
  int end;                    // the head behind the group, where the walk ends
  int k_lost;                 // 1: rows of k are not finite, and a tile hides pairs
  int safe;                   // 1: numbers were lost, this is the second round (tile/bwd_lost.cuh)
  int *turns, *passing;       // where the block awaits its turn, and where it has yet to pass it on; may be null
  AttentionBwdStep steps[2];  // whose tiles are in the stages of q and dout
};

// Number `id` of batch · nheads_k · blocks of keys: heads_together heads take turns, block by block of keys.
template <int BLOCK_M, int BLOCK_N>
__forceinline__ AttentionBwdKeys keys_of_block(const AttentionBwdParams& p, int id, bool all_masked) {
  int blocks = (p.seqlen_k + BLOCK_N - 1) / BLOCK_N, group = p.nheads / p.nheads_k;
  int begin = id / (blocks * p.heads_together) * p.heads_together, rest = id - begin * blocks;
  int together = min(p.heads_together, p.batch * p.nheads_k - begin), head = begin + rest % together;
  AttentionBwdKeys block;
  block.n0 = rest / together * BLOCK_N;
  block.first = sequence_of(p, head / p.nheads_k, head % p.nheads_k * group);
  const int n1 = min(block.n0 + BLOCK_N, block.first.seqlen_k);
  const Range range = query_range<BLOCK_M>(p, block.first, block.n0, n1);
  // Keys that do not exist have weights as well, which may be infinite, and their rows of k are 0.
  const Walk walk = walk_of<BLOCK_M>(range, all_masked || n1 < block.n0 + BLOCK_N);
  int tiles = walk.masked() + walk.whole;
  block.lo = walk.lo;
  block.hi = range.hi;
  block.whole_lo = walk.lo + walk.before * BLOCK_M;
  block.whole_hi = block.whole_lo + walk.whole * BLOCK_M;
  block.last = walk.lo + (tiles - 1) * BLOCK_M;
  block.end = tiles > 0 ? block.first.h + group : block.first.h;
  block.k_lost = block.safe = 0;
  block.passing = nullptr;
  return block;
}

// kPairs: the call has an option that tells single pairs apart (mask, bias, ALiBi, softcap, dropout). kDq: dq is added up here.
template <class T, int D, int DV, int BLOCK_M, int BLOCK_N, int kWarpsN, int kWarpsD, bool kAligned, bool kPairs, bool kDq>
__global__ void __launch_bounds__(32 * kWarpsN * kWarpsD, 1)
    attention_bwd_dkdv_kernel(const __grid_constant__ AttentionBwdParams p) {
  constexpr int kWarps = kWarpsN * kWarpsD, kThreads = 32 * kWarps, kRows = BLOCK_N / (16 * kWarpsN), kCols = BLOCK_M / kWarpsD;
  static_assert(kRows * 16 * kWarpsN == BLOCK_N && kCols % 16 == 0, "");
  // dq's tile: a warp owns 16 kRowsQ rows and 16 kGroupsQ columns of it.
  constexpr int kAcross = 32 * kWarps / BLOCK_M;  // warps beside each other if each owns 32 rows
  constexpr int kRowsQ = BLOCK_M % 32 == 0 && kAcross > 0 && D / 16 % (kAcross + (kAcross == 0)) == 0 ? 2 : 1;
  constexpr int kWarpsQ = BLOCK_M / (16 * kRowsQ), kGroupsQ = kDq ? D / 16 * kWarpsQ / kWarps : 1;
  static_assert(!kDq || (kWarps % kWarpsQ == 0 && kGroupsQ * kWarps == D / 16 * kWarpsQ), "");
  using KTile = TileLayout<BLOCK_N, D>;
  using VTile = TileLayout<BLOCK_N, DV>;
  using QTile = TileLayout<BLOCK_M, D>;
  using DoutTile = TileLayout<BLOCK_M, DV>;
  constexpr bool kShares = kDq || kWarpsD == 2;  // warps exchange dS
  using PTile = TileLayout<BLOCK_N, kShares ? BLOCK_M : 32>;
  using Sums = DqTile<BLOCK_M, D>;
  u8* k_smem = shared_memory();
  u8* v_smem = k_smem + KTile::kBytes;
  u8* q_smem = v_smem + VTile::kBytes;  // two stages
  u8* dout_smem = q_smem + 2 * QTile::kBytes;
  u8* ds_smem = dout_smem + 2 * DoutTile::kBytes;
  u8* p_smem = ds_smem + PTile::kBytes;                                                            // with kWarpsD = 2
  float* rows_smem = reinterpret_cast<float*>(ds_smem + (kShares ? kWarpsD : 0) * PTile::kBytes);  // [2][lse, delta][BLOCK_M]
  AttentionBwdKeys& block = *reinterpret_cast<AttentionBwdKeys*>(rows_smem + 4 * BLOCK_M);
  const Sequence& first = block.first;
  const bool in_turns = kDq && p.dq_turns != nullptr;

  if (threadIdx.x == 0) {
    block = keys_of_block<BLOCK_M, BLOCK_N>(p, in_turns ? atomicAdd(p.dq_turns, 1) : static_cast<int>(blockIdx.x), kPairs);
  }
  __syncthreads();
  const int& n0 = block.n0;
  if (n0 >= first.seqlen_k) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, warp_n = warp % kWarpsN, warp_d = warp / kWarpsN;
  const int row_warp = 16 * kRows * warp_n, m_warp = kCols * warp_d;

  auto load_k = [&] {
    const T* k = row_of<T>(p.k, p.k_stride, first.b, first.first_k, first.h_k, n0);
    copy_rows_async<kThreads, BLOCK_N, D>(k_smem, k, p.k_stride[1], first.seqlen_k - n0, p.headdim, kAligned);
  };
  load_k();
  {
    const T* v = row_of<T>(p.v, p.v_stride, first.b, first.first_k, first.h_k, n0);
    copy_rows_async<kThreads, BLOCK_N, DV>(v_smem, v, p.v_stride[1], first.seqlen_k - n0, p.headdim_v, kAligned);
  }

  using Step = AttentionBwdStep;
  auto behind = [&](Step step) {
    step.m0 -= BLOCK_M;
    return step.m0 >= block.lo ? step : Step{step.h + 1, block.last, kPartly};
  };
  auto sequence = [&](const Step& step) {
    Sequence s = first;
    s.h = step.h;
    return s;
  };
  // Takes the block's turn at a tile to which it adds nothing.
  auto pass = [&](const Step& step) {
    const i64 tile = dq_tile<BLOCK_M>(p, first, step.h, step.m0);
    const int turn = turn_of<BLOCK_N>(p, first, n0, step.m0);
    if (turn == 0) {
      for (int i = threadIdx.x; i < Sums::kFloats; i += kThreads) p.dq_sums[tile * Sums::kFloats + i] = 0.0f;
    } else if (threadIdx.x == 0) {
      await_turn(turns_of(p, tile), turn, -1);
    }
    __syncthreads();
    if (threadIdx.x == 0) add_release(turns_of(p, tile), 1);
  };
  auto visible_from = [&](Step step) {  // the first step from this one on that the mask does not hide
    if constexpr (kPairs) {
      for (; p.mask != nullptr && step.h < block.end; step = behind(step)) {
        auto mask = pairs_of<u8>(p.mask, p.mask_stride, sequence(step));
        int m1 = min(step.m0 + BLOCK_M, first.seqlen_q), n1 = min(n0 + BLOCK_N, first.seqlen_k);
        step.sight = look_together<BLOCK_N, kWarps>(mask, step.m0, m1, n0, n1);
        if (step.sight != kHidden) break;
        if (in_turns && !block.safe) pass(step);
      }
    }
    return step;
  };
  auto load = [&](const Step& step, int stage) {
    int limit = first.seqlen_q - step.m0;
    const T* q = row_of<T>(p.q, p.q_stride, first.b, first.first_q, step.h, step.m0);
    const T* dout = row_of<T>(p.dout, p.dout_stride, first.b, first.first_q, step.h, step.m0);
    copy_rows_async<kThreads, BLOCK_M, D>(q_smem + stage * QTile::kBytes, q, opaque(p.q_stride[1]), limit, p.headdim, kAligned);
    copy_rows_async<kThreads, BLOCK_M, DV>(dout_smem + stage * DoutTile::kBytes, dout, opaque(p.dout_stride[1]), limit, p.headdim_v,
                                           kAligned);
    i64 row = first.b * p.row_stride[0] + step.h * p.row_stride[1] + first.first_q + step.m0;
    float* to = rows_smem + 2 * BLOCK_M * stage;
    for (int x = opaque(static_cast<int>(threadIdx.x)); x < 2 * BLOCK_M; x += kThreads) {
      int m = x % BLOCK_M;
      const float* from = x < BLOCK_M ? p.lse_log2 : p.delta;
      cp_async_4(to + x, m < limit ? from + row + m : from, m < limit);
    }
  };

  float dk[kRows][D / 8 / kWarpsD][4], dv[kRows][DV / 8 / kWarpsD][4];
  const float scale = p.scale * kLog2e;

  // What the keys add to dq's tile of this step; all have written dS.
  auto add_dq = [&](const Step& step, bool masked) {
    const bool clean = masked && block.k_lost;
    if (clean) {
      clean_tile<T, kThreads, KTile::kBytes>(k_smem);
      __syncthreads();
    }
    float* sums = p.dq_sums + dq_tile<BLOCK_M>(p, first, step.h, step.m0) * Sums::kFloats;
    float dq[kRowsQ][2 * kGroupsQ][4];
    clear(dq);
    const int part = opaque(warp), row16 = part % kWarpsQ * kRowsQ, group = part / kWarpsQ * kGroupsQ;
    add_product_of_columns<T, PTile, KTile, BLOCK_N / 16>(dq, ds_smem, k_smem, row16, group);
    add_to_dq<Sums>(sums, dq, row16, 2 * group, in_turns && turn_of<BLOCK_N>(p, first, n0, step.m0) == 0);
    if (!clean) return;
    __syncthreads();
    load_k();
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int n = n0; n < min(n0 + BLOCK_N, first.seqlen_k); ++n) {
      const T* k = row_of<T>(p.k, p.k_stride, first.b, first.first_k, first.h_k, n);
      if (!row_is_lost(k, p.headdim)) continue;
#pragma unroll 1
      for (int i = warp; i < min(BLOCK_M, first.seqlen_q - step.m0); i += kWarps) {
        if (!sees<T>(p, sequence(step), step.m0 + i, n)) continue;
        for (int d = lane; d < p.headdim; d += 32) {  // 0 · NaN, or the weight is NaN too
          if (!is_finite(k[d])) atomicAdd(sums + Sums::at(i, d), __uint_as_float(0x7fc00000u));
        }
      }
    }
  };

  auto compute = [&](int stage) {
    const Step& step = block.steps[stage];
    const bool masked = kPairs || step.m0 < block.whole_lo || step.m0 >= block.whole_hi;
    int seen = 0;
    if (kDq && threadIdx.x == 0) {
      block.turns = in_turns && !block.safe ? turns_of(p, dq_tile<BLOCK_M>(p, first, step.h, step.m0)) : nullptr;
      if (block.turns != nullptr) seen = load_acquire(block.turns);
    }
    u8* q_tile = q_smem + stage * QTile::kBytes;
    u8* dout_tile = dout_smem + stage * DoutTile::kBytes;
    const float* lse = rows_smem + 2 * BLOCK_M * stage + m_warp + 2 * (lane & 3);
    auto statistics = [&](int j) {
      float2 l = *reinterpret_cast<const float2*>(lse + 8 * j), d = *reinterpret_cast<const float2*>(lse + BLOCK_M + 8 * j);
      return Statistics{{l.x, l.y}, {d.x, d.y}};
    };
    const int m = step.m0 + (kAligned ? m_warp : opaque(m_warp)) + 2 * (lane & 3);
    auto span = [&](int r, Span(&found)[2]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        found[half] = span_of_key(p, first, n0 + row_warp + 16 * r + 8 * half + (lane >> 2), m);
      }
    };

    float weights[kRows][kCols / 8][4], ds[kRows][kCols / 8][4];  // S, then P; dP, then dS
    clear(weights);
    add_product_transposed<T, KTile, QTile>(weights, k_smem + row_warp * KTile::kRowBytes, q_tile + m_warp * QTile::kRowBytes);
    auto soften = [&](auto is_masked) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Span visible[2];
        if (decltype(is_masked)::value) span(r, visible);
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
          probabilities<decltype(is_masked)::value, true>(weights[r][j], scale, statistics(j), visible, j);
        }
      }
    };
    if constexpr (!kPairs) {
      if (masked) {
        soften(Flag<true>{});
      } else {
        soften(Flag<false>{});
      }
    }
    clear(ds);
    add_product_transposed<T, VTile, DoutTile>(ds, v_smem + row_warp * VTile::kRowBytes, dout_tile + m_warp * DoutTile::kRowBytes);
    if constexpr (!kPairs) {
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) score_gradient<false, true>(weights[r][j], ds[r][j], statistics(j));
      }
      if (masked) hide_gradients(weights, ds);
    } else {
      HeadScores scores = head_scores<T>(p, sequence(step));
      if (step.sight == kWhole) scores.mask.first = nullptr;
      Philox philox = {};
      if (p.philox != nullptr) philox = load_philox(p.philox);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Span visible[2];
        span(r, visible);
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
          int n = n0 + row_warp + 16 * r;
          uint4 words = {};
          if (p.philox != nullptr) words = philox_fragment_transposed(philox, n, step.m0 + m_warp + 8 * j, scores.head);
          pair_gradients<T, true, kDq ? kToMemory : kNotBias>(p, scores, weights[r][j], ds[r][j], statistics(j), visible, m,
                                                              n + (lane >> 2), first.diagonal, j, words);
        }
      }
    }
    if (masked && block.safe) {
      __syncthreads();
      clean_tile<T, kThreads, DoutTile::kBytes>(dout_tile);
      clean_tile<T, kThreads, QTile::kBytes>(q_tile);
      __syncthreads();
    }
    if constexpr (kShares) put_accumulator<T, PTile, 1>(ds_smem, ds, 1.0f, kAligned ? row_warp : opaque(row_warp), m_warp / 16);
    if constexpr (kWarpsD == 2) put_accumulator<T, PTile, 1>(p_smem, weights, 1.0f, row_warp, m_warp / 16);
    {
      const int part = kWarpsD == 1 ? 0 : opaque(warp_d), m_own = kCols * part;
      add_product<T, DoutTile, kWarpsD>(dv, weights, dout_tile + m_own * DoutTile::kRowBytes, part);
      add_product<T, QTile, kWarpsD>(dk, ds, q_tile + m_own * QTile::kRowBytes, part);
    }
    if constexpr (kDq) {
      if (threadIdx.x == 0 && block.turns != nullptr) await_turn(block.turns, turn_of<BLOCK_N>(p, first, n0, step.m0), seen);
    }
    if constexpr (kShares) __syncthreads();
    if constexpr (kDq) {
      if (threadIdx.x == 0) {
        if (block.passing != nullptr) add_release(block.passing, 1);
        block.passing = block.turns;
      }
      if (!block.safe) add_dq(step, masked);
    }
    if constexpr (kWarpsD == 2) {  // the other half of the queries
      const int part = opaque(warp_d), row = opaque(row_warp) * PTile::kRowBytes, m_other = kCols - kCols * part;
      const u8 *dout_other = dout_tile + m_other * DoutTile::kRowBytes, *q_other = q_tile + m_other * QTile::kRowBytes;
      add_product<T, PTile, DoutTile, kCols / 16, 2>(dv, p_smem + row, m_other / 16, dout_other, part);
      add_product<T, PTile, QTile, kCols / 16, 2>(dk, ds_smem + row, m_other / 16, q_other, part);
    }
  };

  for (;;) {
    clear(dk);
    clear(dv);
    // The first step from this one on that is visible, into a stage.
    auto begin = [&](Step step, int stage) {
      step = visible_from(step);
      if (threadIdx.x == 0) block.steps[stage] = step;
      if (step.h < block.end) load(step, stage);
      cp_async_commit();
    };
    begin({first.h, block.last, kPartly}, 0);
    const bool hides = kPairs || block.whole_lo > block.lo || block.whole_hi <= block.last;
    if (kDq && hides && !block.safe) {
      cp_async_wait<0>();
      __syncthreads();
      const bool lost = __syncthreads_or(tile_is_lost<T, kThreads, KTile::kBytes>(k_smem)) != 0;
      if (threadIdx.x == 0) block.k_lost = lost;
    }
#pragma unroll 1
    for (int stage = 0;; stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has landed, and all warps have left the other one
      if (block.steps[stage].h == block.end) break;
      begin(behind(block.steps[stage]), stage ^ 1);
      compute(stage);
    }
    int rows = first.seqlen_k - n0 - row_warp;
    bool again = __syncthreads_or(!block.safe && hides && (is_lost(dk, rows) || is_lost(dv, rows))) != 0;
    if (threadIdx.x == 0) {
      if (kDq && block.passing != nullptr) add_release(block.passing, 1);
      block.passing = nullptr;
      if (again) block.safe = 1;
    }
    if (!again) break;
    __syncthreads();
  }

  put_accumulator<T, KTile, kWarpsD>(k_smem, dk, p.scale, row_warp, warp_d);
  put_accumulator<T, VTile, kWarpsD>(v_smem, dv, p.philox == nullptr ? 1.0f : p.dropout_scale, row_warp, warp_d);
  __syncthreads();
  int limit = first.seqlen_k - n0;
  if (block.safe) {
    const int group = p.nheads / p.nheads_k;
#pragma unroll 1
    for (int i = 0; i < group * (block.hi - block.lo); ++i) {
      Sequence s = first;
      s.h += i % group;
      int m = block.lo + i / group;
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
  const int thread = opaque(static_cast<int>(threadIdx.x));  // what the copies made of it is not kept until here
  store_rows<kThreads, BLOCK_N, D>(dk_rows, p.dk_stride[1], k_smem, limit, p.headdim, thread);
  store_rows<kThreads, BLOCK_N, DV>(dv_rows, p.dv_stride[1], v_smem, limit, p.headdim_v, thread);
}
