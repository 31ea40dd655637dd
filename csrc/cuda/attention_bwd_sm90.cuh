// Attention backward for Hopper: dk and dv of BLOCK_N keys of one head of k and v, and what these keys add to dq, with
// dS = P (dP - delta), dP = dout v^T. Grid: blocks of keys · nheads_k · batch. A block keeps its k and v and walks over the queries
// that see them, last tile first, for each query head of the group. It is a producer warpgroup (warp 0 loads q, dout and their rows
// of lse and delta; warp 1 adds tiles of dq to dq_sums) and two consumers. Scores are computed transposed, [keys, queries]. Narrow
// (BLOCK_N 128): a consumer owns 64 keys, P and dS stay in its registers as operands of dv and dk. Wide (BLOCK_N 64): it computes
// the scores of half of the queries and half of the columns of dk and dv; P and dS meet in shared memory. dq is one product of both
// consumers, who share its columns, or its rows where BLOCK_M is 128.
// Shared memory: BwdPlan::kBytes (153 to 217 KB): k, v, two stages of q and one or two of dout, dS (and P), two slabs of dq.
// Registers of a consumer: dk, dv, dq, scores and dP: 128 + 96 of 240 at headdim 128. Bound by shared memory's bandwidth, closely
// followed by the tensor cores (2 (3 headdim + 2 headdim_v) flops per pair): docs/design/hopper-backward.md. HGMMA of a consumer
// per tile: (HEADDIM + HEADDIM_V + 2 BLOCK_M + BLOCK_N) / 16. Bytes per tile: 2 BLOCK_M (HEADDIM + HEADDIM_V) in, 4 BLOCK_M ·
// HEADDIM added to dq_sums. Shah et al., FlashAttention-3, arXiv:2407.08608.
#pragma once
#include <attention_bwd_sm90_params.h>

#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/registers.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>
#include <tile/bwd_sm90.cuh>
#include <tile/copy.cuh>
#include <tile/lost_bwd_sm90.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax_sm90.cuh>
#include <tile/swizzle.cuh>
#include <tile/work_bwd_sm90.cuh>

// How a specialisation goes about it; the results are the same.
constexpr u32 kAhead = 1;  // the scores of the next tile are computed behind this one's dq and dk, so that no exponential waits

template <int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N>
struct BwdPlan {
  static constexpr bool kWide = BLOCK_N == 64;
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kQueries = kWide ? BLOCK_M / 2 : BLOCK_M;          // columns of a consumer's scores
  static constexpr int kColumns = kWide ? HEADDIM / 2 : HEADDIM;          // of dk in a consumer
  static constexpr int kColumnsV = kWide ? HEADDIM_V / 2 : HEADDIM_V;     // of dv
  static constexpr int kRowSlabs = BLOCK_M / 64;                          // of dq's tile
  static constexpr int kRounds = HEADDIM / 64 * kRowSlabs / 2;            // slabs of dq in a consumer, staged one by one
  static constexpr int kPanelM = BLOCK_M * 128, kPanelN = BLOCK_N * 128;  // bytes of 64 columns
  static constexpr int kQ = HEADDIM / 64 * kPanelM, kDout = HEADDIM_V / 64 * kPanelM, kDs = BLOCK_M / 64 * kPanelN;
  static constexpr int kK = HEADDIM / 64 * kPanelN, kV = HEADDIM_V / 64 * kPanelN;
  static constexpr int kStagesQ = 2, kStagesDout = HEADDIM_V > 128 ? 1 : 2, kStagesDs = kWide ? 2 : 1;
  static constexpr int kAtV = kK, kAtQ = kAtV + kV, kAtDout = kAtQ + kStagesQ * kQ, kAtDs = kAtDout + kStagesDout * kDout;
  static constexpr int kAtP = kAtDs + kStagesDs * kDs, kAtDq = kAtP + (kWide ? kDs : 0);  // dq: two slabs of float
  static constexpr int kAtRows = kAtDq + 2 * 4 * 64 * 64;                                 // lse of each stage of q, delta of dout
  static constexpr int kAtLost = kAtRows + 4 * BLOCK_M * (kStagesQ + kStagesDout);        // a byte for each key of a consumer
  static constexpr int kAtWork = kAtLost + 128, kAtBarriers = kAtWork + BwdWork::kBytes;
  static constexpr int kQFull = 0, kDoutFull = kQFull + kStagesQ, kQEmpty = kDoutFull + kStagesDout;  // numbers of barriers
  static constexpr int kDoutEmpty = kQEmpty + kStagesQ, kKFull = kDoutEmpty + kStagesDout, kVFull = kKFull + 1;
  static constexpr int kBarriers = kVFull + 1, kBytes = kAtBarriers + 8 * kBarriers;
  static __forceinline__ u64* barriers(u8* memory) { return reinterpret_cast<u64*>(memory + kAtBarriers); }
  static_assert(BLOCK_M % 64 == 0 && BLOCK_M <= 128 && (BLOCK_N == 128 || (BLOCK_N == 64 && BLOCK_M == 64)), "");
  static_assert(HEADDIM % 64 == 0 && HEADDIM_V % 64 == 0 && kRounds >= 1 && (!kWide || HEADDIM_V % 128 == 0), "");
  static_assert(kBytes <= 227 * 1024, "");
};

// An accumulator that the next product overwrites: without this its old numbers would be kept in registers until then.
template <int kCount>
__forceinline__ void forget(float (&x)[kCount]) {
  float nothing[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = nothing[i];
}

// x, unknown to the compiler, which would prepare the descriptors of all products ahead of the loop and run out of registers.
__forceinline__ u32 unprepared(u32 x) {
  u32 unknown[1] = {x};
  wgmma_pin(unknown);
  return unknown[0];
}

// Named barriers: 0 is __syncthreads's.
constexpr u32 kConsumerBarrier = 1, kDqFull = 2, kDqEmpty = 3;

// Warp 0: k and v once, then tile by tile q with lse and dout with delta. Rows that do not exist have lse +inf, so that P is 0.
template <class P, class Walk, class Params>
__forceinline__ void load_tiles(const Params& p, u8* memory, const BwdWork& work) {
  constexpr int BLOCK_M = P::kPanelM / 128;
  const Sequence& first = work.first;
  const int lane = threadIdx.x & 31, b = p.cu_seqlens_q != nullptr ? 0 : first.b;
  auto load = [&](const TensorMap& map, u8* tile, u64* full, int bytes, int panel_bytes, int row, int h) {
    mbarrier_expect(full, bytes);
#pragma unroll 1
    for (int panel = 0; panel < bytes / panel_bytes; ++panel) {
      tma_load(tile + panel * panel_bytes, map, full, 64 * panel, row, h, b);
    }
  };
  u64* barriers = P::barriers(memory);
  Walk walk(work);
  if (lane == 0) {
    load(p.k_map, memory, barriers + P::kKFull, P::kK, P::kPanelN, first.first_k + work.n0, first.h_k);
    load(p.v_map, memory + P::kAtV, barriers + P::kVFull, P::kV, P::kPanelN, first.first_k + work.n0, first.h_k);
    mbarrier_arrive(barriers + P::kKFull);
    mbarrier_arrive(barriers + P::kVFull);
  }
  // One tile and its row of statistics; all lanes arrive.
  auto fill = [&](const TensorMap& map, int at, int bytes, u64* full, u64* empty, u32 parity, float* to, const float* from,
                  float absent) {
    mbarrier_wait(empty, parity ^ 1);
    if (lane == 0) load(map, memory + at, full, bytes, P::kPanelM, first.first_q + walk.m0, first.h + walk.g);
    from += first.b * p.row_stride[0] + (first.h + walk.g) * p.row_stride[1] + first.first_q + walk.m0;
#pragma unroll
    for (int i = lane; i < BLOCK_M; i += 32) to[i] = walk.m0 + i < first.seqlen_q ? from[i] : absent;
    mbarrier_arrive(full);
  };
  float* rows = reinterpret_cast<float*>(memory + P::kAtRows);
#pragma unroll 1
  for (; walk.step < work.steps; walk.advance()) {
    u32 slot = walk.q_slot();
    fill(p.q_map, P::kAtQ + slot * P::kQ, P::kQ, barriers + P::kQFull + slot, barriers + P::kQEmpty + slot, walk.q_parity(),
         rows + slot * BLOCK_M, p.lse_log2, infinity());
    slot = walk.dout_slot();
    fill(p.dout_map, P::kAtDout + slot * P::kDout, P::kDout, barriers + P::kDoutFull + slot, barriers + P::kDoutEmpty + slot,
         walk.dout_parity(), rows + (P::kStagesQ + slot) * BLOCK_M, p.delta, 0.0f);
  }
}

// Blocks of keys add to a tile of dq's sums in ascending order: those that see fewer queries wait for those before them, which
// started earlier.
template <int BLOCK_N, class Params>
__forceinline__ void await_turn(const Params& p, const BwdWork& work, i64 tile, int m0) {
  const int before = max(0, m0 + work.first.diagonal - p.left) / BLOCK_N;  // blocks whose keys the tile does not see
  while (*static_cast<volatile int*>(p.turns + 1 + tile) != work.n0 / BLOCK_N - before) __nanosleep(20);
  __threadfence();
}
template <class Params>
__forceinline__ void pass_turn(const Params& p, i64 tile) {
  __threadfence();
  atomicAdd(p.turns + 1 + tile, 1);
}

// Warp 1: adds what the consumers staged to dq_sums.
template <class P, int HEADDIM, int BLOCK_M, int BLOCK_N, class Walk, class Params>
__forceinline__ void add_dq(const Params& p, u8* memory, const BwdWork& work) {
  using Tile = DqTile<BLOCK_M, HEADDIM>;
  constexpr int kStaged = 2 * Tile::kSlab;  // floats
  const float* staged = reinterpret_cast<const float*>(memory + P::kAtDq);
  const bool leader = threadIdx.x % 32 == 0;
  if (work.steps > 0) named_barrier_arrive(kDqEmpty, 128 * P::kConsumers + 32);
#pragma unroll 1
  for (Walk walk(work); walk.step < work.steps; walk.advance()) {
    const i64 tile = dq_tile<BLOCK_M>(p, work.first, work.first.h + walk.g, walk.m0);
    float* sums = p.dq_sums + tile * Tile::kFloats;
#pragma unroll 1
    for (int round = 0; round < P::kRounds; ++round) {
      const bool ends = round == P::kRounds - 1;
      named_barrier_sync(kDqFull, 128 * P::kConsumers + 32);
      if (leader) {
        if (p.turns != nullptr && round == 0) {
          await_turn<BLOCK_N>(p, work, tile, walk.m0);
          fence_async();
        }
        bulk_reduce_add(sums + round * kStaged, staged, 4 * kStaged);
        bulk_commit();
        bulk_wait_read<0>();
      }
      __syncwarp();
      if (!ends || walk.step + 1 < work.steps) named_barrier_arrive(kDqEmpty, 128 * P::kConsumers + 32);
      if (leader && p.turns != nullptr && ends) {
        bulk_wait<0>();
        fence_async();
        pass_turn(p, tile);
      }
      __syncwarp();
    }
  }
  if (!leader || p.turns == nullptr) return;
#pragma unroll 1
  for (Walk walk(work); walk.step < work.passed; walk.advance()) {
    const i64 tile = dq_tile<BLOCK_M>(p, work.first, work.first.h + walk.g, walk.m0);
    await_turn<BLOCK_N>(p, work, tile, walk.m0);
    pass_turn(p, tile);
  }
}

template <class T, class P, int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, u32 kWays, u32 kPairs, class Walk, class Params>
__forceinline__ void differentiate(const Params& p, u8* memory, const BwdWork& work, int group) {
  constexpr int kAll = 128 * P::kConsumers;
  using DsTile = TileLayout<BLOCK_N, BLOCK_M>;
  const int thread = threadIdx.x - 128, lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4;
  const int row = (P::kWide ? 0 : 64 * group) + 16 * warp, column = P::kWide ? P::kQueries * group : 0;  // of this warp's scores
  const float* rows = reinterpret_cast<const float*>(memory + P::kAtRows) + column + 2 * (lane & 3);
  u64* barriers = P::barriers(memory);
  u8* lost = memory + P::kAtLost;
  const int ds_at = pairs_at<DsTile>(row, column / 8);

  float dk[P::kColumns / 2] = {}, dv[P::kColumnsV / 2] = {}, dq[32 * P::kRounds], s[P::kQueries / 2], dp[P::kQueries / 2];
  u32 weights[P::kQueries / 4], ds[P::kQueries / 4];

  // How far this consumer's operand lies behind what is the same for both.
  constexpr int kKeyRows = P::kWide ? 0 : 64 * 128, kQueryRows = P::kWide ? P::kQueries * 128 : 0;
  auto own = [&](int bytes) { return unprepared(group * bytes); };

  Walk walk(work);
  auto issue_s = [&] {
    mbarrier_wait(barriers + P::kQFull + walk.q_slot(), walk.q_parity());
    const u64 a = wgmma_k_major(memory + own(kKeyRows));
    const u64 b = wgmma_k_major(memory + P::kAtQ + walk.q_slot() * P::kQ + own(kQueryRows));
    forget(s);
    wgmma_pin(s);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < HEADDIM; d += 16) {
      wgmma_ss<T, 0, 0>(s, wgmma_advance(a, d / 64 * P::kPanelN + d % 64 * 2), wgmma_advance(b, d / 64 * P::kPanelM + d % 64 * 2),
                        d > 0);
    }
    wgmma_commit();
  };
  auto issue_dp = [&] {
    mbarrier_wait(barriers + P::kDoutFull + walk.dout_slot(), walk.dout_parity());
    const u64 a = wgmma_k_major(memory + P::kAtV + own(kKeyRows));
    const u64 b = wgmma_k_major(memory + P::kAtDout + walk.dout_slot() * P::kDout + own(kQueryRows));
    forget(dp);
    wgmma_pin(dp);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < HEADDIM_V; d += 16) {
      wgmma_ss<T, 0, 0>(dp, wgmma_advance(a, d / 64 * P::kPanelN + d % 64 * 2), wgmma_advance(b, d / 64 * P::kPanelM + d % 64 * 2),
                        d > 0);
    }
    wgmma_commit();
  };
  // sum [64 keys, columns] += a [64, BLOCK_M] · tile [BLOCK_M, columns]: a in registers, or in shared memory for half of the
  // columns.
  auto issue_sum = [&](auto& sum, const auto& a, const u8* a_tile, const u8* tile) {
    if constexpr (P::kWide) {
      const u64 left = wgmma_k_major(a_tile), b = wgmma_mn_major(tile + own(P::kPanelM), 2 * P::kPanelM);
#pragma unroll
      for (int m = 0; m < BLOCK_M; m += 16) wgmma_ss<T, 0, 1>(sum, wgmma_advance(left, 2 * m), wgmma_advance(b, m * 128), true);
    } else {
      const u64 b = wgmma_mn_major(tile, P::kPanelM);
#pragma unroll
      for (int m = 0; m < BLOCK_M; m += 16) {
        wgmma_rs<T, 1>(sum, a[m / 4], a[m / 4 + 1], a[m / 4 + 2], a[m / 4 + 3], wgmma_advance(b, m * 128), true);
      }
    }
    wgmma_commit();
  };

  mbarrier_wait(barriers + P::kKFull, 0);
  if (kPairs != 0 || work.hides != 0) {
    keep_finite<T, P::kK, kAll>(memory, thread);
    fence_async_shared();
  }
  named_barrier_sync(kConsumerBarrier, kAll);

  // Each turn of the loop begins with P of its tile packed and dP finished, and ends with those of the next one. In between, the
  // products queue up: dv, dq, dk, the next scores, the next dP.
  Seen<P::kQueries / 2> seen;
  auto see = [&] {
    return seen_by_position<P::kQueries / 2>(p, work.first, work.n0 + row + lane / 4, walk.m0 + column + 2 * (lane & 3));
  };
  auto soften = [&] {  // the scores have come
    const float* lse = rows + walk.q_slot() * BLOCK_M;
    if constexpr (kPairs != 0) {
      Sequence sequence = work.first;
      sequence.h += walk.g;
      const int n = work.n0 + row + lane / 4, m = walk.m0 + column + 2 * (lane & 3);
      seen = see();
      pair_probabilities<T, kPairs>(s, weights, seen, p, sequence, score_rule(p, sequence), lse, n, m);
    } else {
      probabilities(s, p.scale * kLog2e, lse);
      if (!work.whole(walk.m0, BLOCK_M)) hide(s, see());
      pack_pairs<T>(weights, s);
    }
  };
  auto step = [&](auto is_last) {
    constexpr bool kLast = decltype(is_last)::value, kIsAhead = (kWays & kAhead) != 0 && !kLast;
    const u32 q_slot = walk.q_slot(), dout_slot = walk.dout_slot();
    const float* delta = rows + (P::kStagesQ + dout_slot) * BLOCK_M;
    const u8 *q_tile = memory + P::kAtQ + q_slot * P::kQ, *dout_tile = memory + P::kAtDout + dout_slot * P::kDout;
    u8* ds_tile = memory + P::kAtDs + walk.step % P::kStagesDs * P::kDs;
    if constexpr (P::kWide) {
      put_pairs<DsTile>(memory + P::kAtP, weights, unprepared(ds_at));
    } else {
      wgmma_pin(weights);
      wgmma_pin(dv);
      wgmma_fence();
      issue_sum(dv, weights, nullptr, dout_tile);
    }
    if constexpr (kPairs != 0) {
      Sequence sequence = work.first;
      sequence.h += walk.g;
      pair_gradients<kPairs>(dp, s, seen, p, sequence, delta, work.n0 + row + lane / 4, walk.m0 + column + 2 * (lane & 3));
    } else {
      score_gradients(dp, s, delta);
      if (!work.whole(walk.m0, BLOCK_M)) hide(dp, see());
    }
    pack_pairs<T>(ds, dp);
    put_pairs<DsTile>(ds_tile, ds, unprepared(ds_at));
    fence_async_shared();
    named_barrier_sync(kConsumerBarrier, kAll);

    forget(dq);
    wgmma_pin(ds);
    wgmma_pin(dk);
    wgmma_pin(dq);
    if constexpr (P::kWide) {
      wgmma_pin(dv);
      wgmma_fence();
      issue_sum(dv, weights, memory + P::kAtP, dout_tile);
    } else {
      wgmma_fence();
    }
    constexpr bool kSplitsRows = P::kRowSlabs == 2;  // consumers share dq's rows, else its columns, a panel of each in turn
    const u64 ds_columns = wgmma_mn_major(ds_tile + own(kSplitsRows ? P::kPanelN : 0), P::kPanelN);
    const u64 k_columns = wgmma_mn_major(memory + own(kSplitsRows ? 0 : P::kPanelN), (kSplitsRows ? 1 : 2) * P::kPanelN);
#pragma unroll
    for (int key = 0; key < BLOCK_N; key += 16) {
      wgmma_ss<T, 1, 1>(dq, wgmma_advance(ds_columns, key * 128), wgmma_advance(k_columns, key * 128), key > 0);
    }
    wgmma_commit();
    issue_sum(dk, ds, ds_tile, q_tile);
    walk.advance();
    wgmma_wait<2>();
    if (lane == 0) mbarrier_arrive(barriers + P::kDoutEmpty + dout_slot);
    wgmma_wait<1>();
    wgmma_pin(dq);
#pragma unroll
    for (int round = 0; round < P::kRounds; ++round) {
      named_barrier_sync(kDqEmpty, kAll + 32);
      u8* slab = memory + P::kAtDq + group * (4 * 64 * 64) + 16 * (thread % 128);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float* x = &dq[32 * round + 4 * j];
        store_shared_16(slab + j * (16 * 128),
                        make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
      }
      fence_async_shared();
      named_barrier_arrive(kDqFull, kAll + 32);
    }
    if constexpr (kIsAhead) {
      issue_s();
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    wgmma_pin(dk);
    if (lane == 0) mbarrier_arrive(barriers + P::kQEmpty + q_slot);
    if constexpr (!kLast) {
      if constexpr (!kIsAhead) issue_s();
      issue_dp();
      wgmma_wait<1>();
      wgmma_pin(s);
      soften();
      wgmma_wait<0>();
      wgmma_pin(dp);
    }
  };
  if (work.steps == 0) mbarrier_wait(barriers + P::kVFull, 0);  // dv takes v's place
  if (work.steps > 0) {
    issue_s();
    mbarrier_wait(barriers + P::kVFull, 0);
    issue_dp();
    wgmma_wait<1>();
    wgmma_pin(s);
    soften();
    wgmma_wait<0>();
    wgmma_pin(dp);
#pragma unroll 1
    while (walk.step + 1 < work.steps) step(Constant<false>{});
    step(Constant<true>{});
  }

  if (kPairs != 0 || work.hides != 0) {
    mark_lost(lost + (P::kWide ? BLOCK_N * group : 0) + row, dk, dv);
  }
  named_barrier_sync(kConsumerBarrier, kAll);  // nobody reads k and v any more
#pragma unroll
  for (int x = 0; x < P::kColumns / 2; ++x) dk[x] *= p.scale;
#pragma unroll
  for (int x = 0; x < P::kColumnsV / 2; ++x) dv[x] *= p.dropout_scale;
  // Of wide heads a consumer has the panels group, group + 2, ….
  auto stage = [&](u8* tile, const auto& sum) {
    constexpr int kCount = sizeof(sum) / 4;
    u32 a[kCount / 2];
    pack_pairs<T>(a, sum);
    using Panel = TileLayout<BLOCK_N, 64>;
#pragma unroll
    for (int panel = 0; panel < kCount / 32; ++panel) {
      const u32(&part)[16] = reinterpret_cast<const u32(&)[16]>(a[16 * panel]);
      put_pairs<Panel>(tile + (P::kWide ? 2 * panel + group : panel) * P::kPanelN, part, pairs_at<Panel>(row, 0));
    }
  };
  stage(memory, dk);
  stage(memory + P::kAtV, dv);
  named_barrier_sync(kConsumerBarrier, kAll);
  const Sequence& first = work.first;
  T* dk_rows = row_of<T>(p.dk, p.dk_stride, first.b, first.first_k, first.h_k, work.n0);
  T* dv_rows = row_of<T>(p.dv, p.dv_stride, first.b, first.first_k, first.h_k, work.n0);
  store_rows<kAll, BLOCK_N, HEADDIM>(dk_rows, p.dk_stride[1], memory, work.n1 - work.n0, p.headdim, thread);
  store_rows<kAll, BLOCK_N, HEADDIM_V>(dv_rows, p.dv_stride[1], memory + P::kAtV, work.n1 - work.n0, p.headdim_v, thread);
  if (kPairs == 0 && work.hides == 0) return;
  named_barrier_sync(kConsumerBarrier, kAll);
#pragma unroll 1
  for (int key = thread / 32; key < work.n1 - work.n0; key += kAll / 32) {
    if (lost[key] != 0 || (P::kWide && lost[BLOCK_N + key] != 0)) {
      key_again<T, (HEADDIM > HEADDIM_V ? HEADDIM : HEADDIM_V)>(p, first, work.n0 + key);
    }
  }
}

// kPairs: which of tile/bwd_sm90.cuh's kGeneral, kMask, kBias, kDropout the call has.
template <class T, int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, u32 kWays, u32 kPairs>
__global__ void __launch_bounds__(384, 1) attention_bwd_sm90_kernel(const __grid_constant__ AttentionBwdSm90Params p) {
  using P = BwdPlan<HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N>;
  u8* memory = shared_memory();
  u64* barriers = P::barriers(memory);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  BwdWork& work = *reinterpret_cast<BwdWork*>(memory + P::kAtWork);
  if (threadIdx.x == 0) {
    tma_prefetch_map(p.q_map);
    tma_prefetch_map(p.k_map);
    tma_prefetch_map(p.v_map);
    tma_prefetch_map(p.dout_map);
    for (int i = 0; i < P::kBarriers; ++i) {
      mbarrier_init(barriers + i, i < P::kQEmpty ? 32 : i < P::kKFull ? 4 * P::kConsumers : 1);
    }
    fence_barrier_init();
    // Who waits for a turn waits for blocks with lower numbers. These have begun: the hardware may begin blocks in any order.
    work = bwd_work<BLOCK_M, BLOCK_N>(p, p.turns != nullptr ? atomicAdd(p.turns, 1) : static_cast<int>(blockIdx.x));
  }
  __syncthreads();
  if (work.n0 >= work.first.seqlen_k) return;
  if constexpr (kPairs & kMask) {
    // Keys that a mask hides from all queries (padding) are not walked.
    if (p.mask_stride[2] == 0 && (p.mask_stride[1] == 0 || p.nheads == p.nheads_k)) {
      const int n = work.n0 + static_cast<int>(threadIdx.x);
      const bool shown = n < work.n1 && pairs_of<u8>(p.mask, p.mask_stride, work.first).at(0, n) != 0;
      if (__syncthreads_or(shown) == 0 && threadIdx.x == 0) {
        work.passed = work.steps;
        work.steps = 0;
      }
      __syncthreads();
    }
  }

  using Walk = QueryWalk<BLOCK_M, P::kStagesQ, P::kStagesDout>;
  if (warp < 4) {
    registers_lower<P::kProducerRegisters>();
    if (warp == 0) {
      load_tiles<P, Walk>(p, memory, work);
    } else if (warp == 1) {
      add_dq<P, HEADDIM, BLOCK_M, BLOCK_N, Walk>(p, memory, work);
    }
  } else {
    registers_raise<P::kConsumerRegisters>();
    differentiate<T, P, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, kWays, kPairs, Walk>(p, memory, work, warp / 4 - 1);
  }
}
