// The consumer of the Hopper backward for heads of 192: three of them. Scores are [64 queries, 96 keys], 32 keys each, and P and dS
// meet in shared memory in panels of 32 keys. A consumer sums the panel of 64 columns of dk, transposed: [64 columns, 96 keys], and
// of dv if that has 192 columns; of 128 columns it sums all for its 32 keys. Of dq it computes the same panel, [64 queries, 64
// columns]. HGMMA of a consumer per tile: HEADDIM / 16 + HEADDIM_V / 16 with n = 32 (scores, dP), BLOCK_M / 16 with n = 96 (dk), as
// many or (headdim_v 128) twice as many with n = 32 (dv), BLOCK_N / 16 with n = 64 (dq).
#pragma once
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/opaque.cuh>
#include <ptx/stmatrix.cuh>
#include <ptx/wgmma.cuh>
#include <tile/bwd_sm90.cuh>
#include <tile/consumer_bwd_sm90.cuh>
#include <tile/copy.cuh>
#include <tile/lost_bwd_sm90.cuh>
#include <tile/plan_bwd_sm90.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/swizzle.cuh>
#include <tile/work_bwd_sm90.cuh>

// A warp's 16 rows of a transposed sum [64 columns, kKeys], times scale, into a panel [kKeys, 64 columns].
template <class T, int kKeys, int kCount>
__forceinline__ void put_transposed(u8* panel, const float (&x)[kCount], float scale, int warp) {
  using Panel = TileLayout<kKeys, 64>;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < kCount / 4; j += 2) {
    u32 r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // matrices: columns 0-7, columns 8-15, then the next 8 keys of both
      const int at = 4 * (j + i / 2) + 2 * (i & 1);
      r[i] = pack<T>(x[at] * scale, x[at + 1] * scale);
    }
    stmatrix_x4_transposed(panel + Panel::at(8 * j + (lane & 7) + (lane >> 4 << 3), 2 * warp + (lane >> 3 & 1)), r);
  }
}

template <class T, class P, int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, u32 kWays, u32 kPairs, class Params>
__forceinline__ void differentiate_in_thirds(const Params& p, u8* memory, const BwdWork& work, typename P::Ring& ring, int group) {
  constexpr int kAll = 128 * P::kConsumers, kKeys = BLOCK_N / P::kConsumers;
  constexpr int kPanel = BLOCK_M * 2 * kKeys;            // bytes of a consumer's keys of P and dS
  constexpr int kTiles = HEADDIM_V == HEADDIM ? 1 : 2;   // of dv, of 64 columns
  constexpr int kKeysV = kTiles == 1 ? BLOCK_N : kKeys;  // of a consumer's dv
  using PairsTile = TileLayout<BLOCK_M, kKeys>;
  const int thread = opaque(threadIdx.x) - 128, lane = thread & 31, warp = thread / 32 % 4;
  const int key = kKeys * group + 2 * (lane & 3), query = 16 * warp + lane / 4;  // this thread's first ones
  const float* rows = reinterpret_cast<const float*>(memory + P::kAtRows) + 16 * warp + lane / 4;
  u64* barriers = P::barriers(memory);
  u32* lost = reinterpret_cast<u32*>(memory + P::kAtLost);  // [warps of consumers][4 pairs of columns]
  const int pairs_from = group * kPanel + pairs_at<PairsTile>(16 * warp, 0);

  float dk[BLOCK_N / 2] = {}, dv[kTiles][kKeysV / 2] = {}, dq[32], s[kKeys / 2], dp[kKeys / 2], derivatives[kKeys / 2];
  auto own = [&](int bytes) { return opaque(group * bytes); };

  auto issue_s = [&] {
    mbarrier_wait(barriers + P::kQFull + ring.q_slot(), ring.q_parity());
    issue_pairs<T, HEADDIM, P::kPanelM, P::kPanelN>(s, memory + P::kAtQ + ring.q_slot() * P::kQ, memory + own(kKeys * 128));
  };
  auto issue_dp = [&] {
    mbarrier_wait(barriers + P::kDoutFull + ring.dout_slot(), ring.dout_parity());
    issue_pairs<T, HEADDIM_V, P::kPanelM, P::kPanelN>(dp, memory + P::kAtDout + ring.dout_slot() * P::kDout,
                                                      memory + P::kAtV + own(kKeys * 128));
  };
  // sum [64 columns, keys] += panel [BLOCK_M, 64 columns]^T · pairs [BLOCK_M, keys].
  auto issue_sum = [&](auto& sum, const u8* panel, const u8* pairs) {
    const u64 a = wgmma_mn_major(panel, P::kPanelM), b = wgmma_descriptor<64>(pairs, kPanel, 512);
#pragma unroll
    for (int m = 0; m < BLOCK_M; m += 16) {
      wgmma_ss<T, 1, 1>(sum, wgmma_advance(a, m * 128), wgmma_advance(b, m * 2 * kKeys), true);
    }
  };

  const bool hides = kPairs != 0 || work.hides != 0;
  take_keys<T, P>(memory, work, hides, thread);

  // Each turn of the loop begins with P of its tile and finished dP, and ends with those of the next one. In between, the products
  // queue up: dv, dk, dq, the next scores, the next dP.
  Seen<kKeys / 2> seen;
  u32 pairs[kKeys / 4];
  auto finish = [&] {  // P of the tile whose scores and dP were issued
    wgmma_wait<1>();
    wgmma_pin(s);
    const u32 slot = ring.q_slot();
    tile_probabilities<T, kPairs>(s, derivatives, pairs, seen, p, work, P::place(memory, slot), OfRows(rows + slot * BLOCK_M), key,
                                  query);
    wgmma_wait<0>();
    wgmma_pin(dp);
  };
  auto step = [&](auto is_last) {
    constexpr bool kLast = decltype(is_last)::value, kIsAhead = (kWays & kAhead) != 0 && !kLast;
    if constexpr (kLast && P::kIsPersistent) {
      if (lane == 0) mbarrier_arrive(barriers + P::kVEmpty);
    }
    const u32 q_slot = ring.q_slot(), dout_slot = ring.dout_slot();
    const u8 *q_tile = memory + P::kAtQ + q_slot * P::kQ, *dout_tile = memory + P::kAtDout + dout_slot * P::kDout;
    put_pairs<PairsTile>(memory + P::kAtP, pairs, opaque(pairs_from));
    const OfRows delta(rows + (P::kStagesQ + dout_slot) * BLOCK_M);
    tile_gradients<kPairs>(dp, s, derivatives, seen, p, work, P::place(memory, q_slot), delta, key, query);
    pack_pairs<T>(pairs, dp);
    put_pairs<PairsTile>(memory + P::kAtDs, pairs, opaque(pairs_from));
    fence_async_shared();
    named_barrier_sync(kConsumerBarrier, kAll);

    forget(dq);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) wgmma_pin(dv[i]);
    wgmma_pin(dk);
    wgmma_pin(dq);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      issue_sum(dv[i], dout_tile + (kTiles == 1 ? own(P::kPanelM) : i * P::kPanelM),
                memory + P::kAtP + (kTiles == 1 ? 0 : own(kPanel)));
    }
    wgmma_commit();
    issue_sum(dk, q_tile + own(P::kPanelM), memory + P::kAtDs);
    wgmma_commit();
    const u64 ds_rows = wgmma_descriptor<64>(memory + P::kAtDs, 16, 512);
    const u64 k_columns = wgmma_mn_major(memory + own(P::kPanelN), P::kPanelN);
#pragma unroll
    for (int n = 0; n < BLOCK_N; n += 16) {
      wgmma_ss<T, 0, 1>(dq, wgmma_advance(ds_rows, n / kKeys * kPanel + n % kKeys * 2), wgmma_advance(k_columns, n * 128), n > 0);
    }
    wgmma_commit();
    ++ring.step;
    constexpr int kBehind = kIsAhead ? 1 : 0;
    if constexpr (kIsAhead) issue_s();
    wgmma_wait<2 + kBehind>();
    if (lane == 0) mbarrier_arrive(barriers + P::kDoutEmpty + dout_slot);
    wgmma_wait<kBehind>();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) wgmma_pin(dv[i]);
    wgmma_pin(dk);
    wgmma_pin(dq);
    if (lane == 0) mbarrier_arrive(barriers + P::kQEmpty + q_slot);
    if constexpr (kLast && P::kIsPersistent) {
      if (lane == 0) mbarrier_arrive(barriers + P::kKEmpty);
    }
    stage_dq<P>(memory, dq, group);  // behind its barrier all have done with P and dS, too
    if constexpr (!kLast) {
      if constexpr (!kIsAhead) issue_s();
      issue_dp();
      finish();
    }
  };
  walk_tiles<P>(barriers, work, ring, group, issue_s, issue_dp, finish, step);

  if (hides) {
    u32 bits = lost_columns(dk, 0);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) bits |= lost_columns(dv[i], kTiles == 1 ? 0 : kKeys / 8 * group);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, step);
    if (lane < 4) lost[16 * group + 4 * warp + lane] = bits;
  }
  u8* slab = P::slab(memory, group);
  const Sequence& first = work.first;
  const int kept = work.n1 - work.n0, first_v = kTiles == 1 ? 0 : kKeys * group, column_v = kTiles == 1 ? 64 * group : 0;
  T* dv_rows = row_of<T>(p.dv, p.dv_stride, first.b, first.first_k, first.h_k, work.n0 + first_v) + column_v;
  T* dk_rows = row_of<T>(p.dk, p.dk_stride, first.b, first.first_k, first.h_k, work.n0) + 64 * group;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) put_transposed<T, kKeysV>(slab + i * (kKeysV * 128), dv[i], p.dropout_scale, warp);
  named_barrier_sync(kOwnBarrier + group, 128);
  store_rows<128, kKeysV, 64 * kTiles>(dv_rows, p.dv_stride[1], slab, kept - first_v, p.headdim_v - column_v, thread % 128);
  named_barrier_sync(kOwnBarrier + group, 128);
  put_transposed<T, BLOCK_N>(slab, dk, p.scale, warp);
  named_barrier_sync(kOwnBarrier + group, 128);
  store_rows<128, BLOCK_N, 64>(dk_rows, p.dk_stride[1], slab, kept, p.headdim - 64 * group, thread % 128);
  named_barrier_sync(kOwnBarrier + group, 128);
  if (!hides) return;
  named_barrier_sync(kConsumerBarrier, kAll);
#pragma unroll 1
  for (int n = thread / 32; n < kept; n += kAll / 32) {
    u32 bits = 0;
    for (int i = 0; i < 4 * P::kConsumers; ++i) bits |= lost[4 * i + n % 8 / 2];
    if ((bits >> (n / 8 * 2 + (n & 1)) & 1) != 0) key_again<T, HEADDIM>(p, first, work.n0 + n);
  }
}
