// Attention backward for Hopper: dk and dv of BLOCK_N keys of one head of k and v, and what these keys add to dq, with
// dS = P (dP - delta), dP = dout v^T. Grid: blocks of keys · nheads_k · batch; with kPersistent as many blocks as multiprocessors,
// which draw one work of these after another. A block keeps its k and v and walks over the queries that see them, last tile first,
// for each query head of the group. It is a producer warpgroup (warp 0 loads q, dout and their rows of lse and delta; warp 1, or
// one for each consumer, adds tiles of dq to dq_sums; warp 3 draws works) and two or three consumers, who divide the products as
// tile/plan_bwd_sm90.cuh says. This file has the consumer of the narrow and the wide plan, tile/thirds_bwd_sm90.cuh the other,
// tile/consumer_bwd_sm90.cuh what they share.
// Shared memory: BwdPlan::kBytes (155 to 219 KB): k, v, two stages of q and one or two of dout, dS (and P), a slab of dq of each
// consumer, where dv and dk pass through at the end. Registers of a consumer: dk, dv, dq, scores and dP: 128 + 96 of 240 at headdim
// 128. Bound by shared memory's bandwidth, closely followed by the tensor cores (2 (3 headdim + 2 headdim_v) flops per pair):
// docs/design/hopper-backward.md. HGMMA of a consumer per tile, but for heads of 192/128: (HEADDIM + HEADDIM_V + 2 BLOCK_M +
// BLOCK_N) / 16. Bytes per tile: 2 BLOCK_M (HEADDIM + HEADDIM_V) in, 4 BLOCK_M · HEADDIM added to dq_sums. Shah et al.,
// FlashAttention-3, arXiv:2407.08608.
#pragma once
#include <attention_bwd_sm90_params.h>

#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/opaque.cuh>
#include <ptx/registers.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>
#include <tile/bwd_sm90.cuh>
#include <tile/consumer_bwd_sm90.cuh>
#include <tile/copy.cuh>
#include <tile/lost_bwd_sm90.cuh>
#include <tile/plan_bwd_sm90.cuh>
#include <tile/roles_bwd_sm90.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax_sm90.cuh>
#include <tile/swizzle.cuh>
#include <tile/thirds_bwd_sm90.cuh>
#include <tile/work_bwd_sm90.cuh>

template <class T, class P, int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, u32 kWays, u32 kPairs, class Params>
__forceinline__ void differentiate(const Params& p, u8* memory, const BwdWork& work, typename P::Ring& ring, int group) {
  constexpr int kAll = 128 * P::kConsumers;
  using DsTile = TileLayout<BLOCK_N, BLOCK_M>;
  const int thread = opaque(threadIdx.x) - 128, lane = thread & 31, warp = thread / 32 % 4;
  const int row = (P::kWide ? 0 : 64 * group) + 16 * warp, column = P::kWide ? P::kQueries * group : 0;  // of this warp's scores
  const float* rows = reinterpret_cast<const float*>(memory + P::kAtRows) + column + 2 * (lane & 3);
  u64* barriers = P::barriers(memory);
  u8* lost = memory + P::kAtLost;
  const int key = row + lane / 4, query = column + 2 * (lane & 3);  // this thread's first ones
  const int ds_at = pairs_at<DsTile>(row, column / 8);

  float dk[P::kColumns / 2] = {}, dv[P::kColumnsV / 2] = {}, dq[32 * P::kRounds], s[P::kQueries / 2], dp[P::kQueries / 2];
  float derivatives[P::kQueries / 2];
  u32 weights[P::kQueries / 4], ds[P::kQueries / 4];

  // How far this consumer's operand lies behind what is the same for both.
  constexpr int kKeyRows = P::kWide ? 0 : 64 * 128, kQueryRows = P::kWide ? P::kQueries * 128 : 0;
  auto own = [&](int bytes) { return opaque(group * bytes); };

  auto issue_s = [&] {
    mbarrier_wait(barriers + P::kQFull + ring.q_slot(), ring.q_parity());
    issue_pairs<T, HEADDIM, P::kPanelN, P::kPanelM>(s, memory + own(kKeyRows),
                                                    memory + P::kAtQ + ring.q_slot() * P::kQ + own(kQueryRows));
  };
  auto issue_dp = [&] {
    mbarrier_wait(barriers + P::kDoutFull + ring.dout_slot(), ring.dout_parity());
    issue_pairs<T, HEADDIM_V, P::kPanelN, P::kPanelM>(dp, memory + P::kAtV + own(kKeyRows),
                                                      memory + P::kAtDout + ring.dout_slot() * P::kDout + own(kQueryRows));
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

  const bool hides = kPairs != 0 || work.hides != 0;
  take_keys<T, P>(memory, work, hides, thread);

  // Each turn of the loop begins with P of its tile packed and dP finished, and ends with those of the next one. In between, the
  // products queue up: dv, dq, dk, the next scores, the next dP.
  Seen<P::kQueries / 2> seen;
  auto finish = [&] {  // P of the tile whose scores and dP were issued
    wgmma_wait<1>();
    wgmma_pin(s);
    const u32 slot = ring.q_slot();
    tile_probabilities<T, kPairs>(s, derivatives, weights, seen, p, work, P::place(memory, slot), OfColumns{rows + slot * BLOCK_M},
                                  key, query);
    wgmma_wait<0>();
    wgmma_pin(dp);
  };
  auto step = [&](auto is_last) {
    constexpr bool kLast = decltype(is_last)::value, kIsAhead = (kWays & kAhead) != 0 && !kLast;
    if constexpr (kLast && P::kIsPersistent) {
      if (lane == 0) mbarrier_arrive(barriers + P::kVEmpty);
    }
    const u32 q_slot = ring.q_slot(), dout_slot = ring.dout_slot();
    const OfColumns delta = {rows + (P::kStagesQ + dout_slot) * BLOCK_M};
    const u8 *q_tile = memory + P::kAtQ + q_slot * P::kQ, *dout_tile = memory + P::kAtDout + dout_slot * P::kDout;
    u8* ds_tile = memory + P::kAtDs + ring.step % P::kStagesDs * P::kDs;
    if constexpr (P::kWide) {
      put_pairs<DsTile>(memory + P::kAtP, weights, opaque(ds_at));
    } else {
      wgmma_pin(weights);
      wgmma_pin(dv);
      wgmma_fence();
      issue_sum(dv, weights, nullptr, dout_tile);
    }
    tile_gradients<kPairs>(dp, s, derivatives, seen, p, work, P::place(memory, q_slot), delta, key, query);
    pack_pairs<T>(ds, dp);
    put_pairs<DsTile>(ds_tile, ds, opaque(ds_at));
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
    for (int n = 0; n < BLOCK_N; n += 16) {
      wgmma_ss<T, 1, 1>(dq, wgmma_advance(ds_columns, n * 128), wgmma_advance(k_columns, n * 128), n > 0);
    }
    wgmma_commit();
    issue_sum(dk, ds, ds_tile, q_tile);
    ++ring.step;
    wgmma_wait<2>();
    if (lane == 0) mbarrier_arrive(barriers + P::kDoutEmpty + dout_slot);
    wgmma_wait<1>();
    wgmma_pin(dq);
    if constexpr (kLast && P::kIsPersistent) {
      if (lane == 0) mbarrier_arrive(barriers + P::kKEmpty);
    }
    stage_dq<P>(memory, dq, group);
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
      finish();
    }
  };
  walk_tiles<P>(barriers, work, ring, group, issue_s, issue_dp, finish, step);

  if (hides) mark_lost(lost + (P::kWide ? BLOCK_N * group : 0) + row, dk, dv);
#pragma unroll
  for (int x = 0; x < P::kColumnsV / 2; ++x) dv[x] *= p.dropout_scale;
#pragma unroll
  for (int x = 0; x < P::kColumns / 2; ++x) dk[x] *= p.scale;
  // A consumer stages and stores its rows, or of wide heads its panels group, group + 2, ….
  u8* slab = P::slab(memory, group);
  const Sequence& first = work.first;
  auto store = [&](void* base, const i64(&stride)[3], int columns, const auto& sum) {
    constexpr int kCount = sizeof(sum) / 4;
    using Panel = TileLayout<64, 64>;
    u32 a[kCount / 2];
    pack_pairs<T>(a, sum);
#pragma unroll
    for (int panel = 0; panel < kCount / 32; ++panel) {
      const u32(&part)[16] = reinterpret_cast<const u32(&)[16]>(a[16 * panel]);
      put_pairs<Panel>(slab + panel * Panel::kBytes, part, pairs_at<Panel>(16 * warp, 0));
    }
    named_barrier_sync(kOwnBarrier + group, 128);
    const int n = work.n0 + (P::kWide ? 0 : 64 * group);
    T* rows = row_of<T>(base, stride, first.b, first.first_k, first.h_k, n);
    if constexpr (P::kWide) {
#pragma unroll
      for (int panel = 0; panel < kCount / 32; ++panel) {
        const int column = 64 * (2 * panel + group);
        store_rows<128, 64, 64>(rows + column, stride[1], slab + panel * Panel::kBytes, work.n1 - n, columns - column,
                                thread % 128);
      }
    } else {
      store_rows<128, 64, 2 * kCount>(rows, stride[1], slab, work.n1 - n, columns, thread % 128);
    }
    named_barrier_sync(kOwnBarrier + group, 128);
  };
  store(p.dv, p.dv_stride, p.headdim_v, dv);
  store(p.dk, p.dk_stride, p.headdim, dk);
  if (!hides) return;
  named_barrier_sync(kConsumerBarrier, kAll);
#pragma unroll 1
  for (int n = thread / 32; n < work.n1 - work.n0; n += kAll / 32) {
    if (lost[n] != 0 || (P::kWide && lost[BLOCK_N + n] != 0)) {
      key_again<T, (HEADDIM > HEADDIM_V ? HEADDIM : HEADDIM_V)>(p, first, work.n0 + n);
    }
  }
}

// kPairs: which of tile/bwd_sm90.cuh's kGeneral, kMask, kBias, kDropout the call has.
template <class T, int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, u32 kWays, u32 kPairs>
__global__ void __launch_bounds__(BwdPlan<HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, kWays>::kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ AttentionBwdSm90Params p) {
  using P = BwdPlan<HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, kWays>;
  constexpr bool kRepeats = P::kIsPersistent, kSkips = (kPairs & kMask) != 0;
  static_assert(!kRepeats || !kSkips, "the flags of a mask are those of one work");
  u8* memory = shared_memory();
  u64* barriers = P::barriers(memory);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  BwdWork* works = reinterpret_cast<BwdWork*>(memory + P::kAtWork);
  constexpr int kDrawer = 96;
  if (threadIdx.x == kDrawer) {
    tma_prefetch_map(p.q_map);
    tma_prefetch_map(p.k_map);
    tma_prefetch_map(p.v_map);
    tma_prefetch_map(p.dout_map);
    for (int i = 0; i < P::kBarriers; ++i) mbarrier_init(barriers + i, P::arrivals(i));
    fence_barrier_init();
    works[0].number = 0;
    draw_work<BLOCK_M, BLOCK_N, kRepeats>(works[0], p);
    mbarrier_arrive(barriers + P::kWorkFull);
  }
  __syncthreads();
  const bool idle = works[0].n0 < 0;
  if constexpr (kRepeats) __syncthreads();  // all have looked before the place is drawn into again
  if (idle) return;
  if constexpr (kSkips) find_shown<BLOCK_M, P::kFlags>(p, works[0], memory + P::kAtFlags);

  // The producer's warps do the block's works one by one: does(work, ring).
  auto each_work = [&](auto does) {
    typename P::Ring ring = {0};
    if constexpr (!kRepeats) {
      does(works[0], ring);
    } else {
#pragma unroll 1
      for (int i = 0;; ++i) {
        mbarrier_wait(barriers + P::kWorkFull + i % 2, i / 2 & 1);
        const BwdWork& work = works[i % 2];
        if (work.n0 < 0) break;
        does(work, ring);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(barriers + P::kWorkEmpty + i % 2);
      }
    }
  };
  if (warp < 4) {
    registers_lower<P::kProducerRegisters>();
    if (warp == 0) {
      each_work([&](const BwdWork& work, typename P::Ring& ring) {
        load_tiles<P, BLOCK_M, kSkips>(p, memory, work, ring);
        if (kRepeats && lane == 0) mbarrier_arrive(barriers + P::kLoaded);
      });
    } else if (warp <= P::kAdders) {
      each_work(
          [&](const BwdWork& work, typename P::Ring&) { add_dq<P, HEADDIM, BLOCK_M, BLOCK_N, kSkips>(p, memory, work, warp - 1); });
    } else if (kRepeats && threadIdx.x == kDrawer) {
      // As late as may be: others wait for what has been drawn. The count lies in shared memory, registers are few.
      volatile int& drawing = *reinterpret_cast<int*>(memory + P::kAtDrawing);
      drawing = 1;
#pragma unroll 1
      for (int i = 1; works[(i + 1) % 2].n0 >= 0; i = drawing) {
        mbarrier_wait(barriers + P::kLoaded, (i - 1) & 1);
        mbarrier_wait(barriers + P::kWorkEmpty + i % 2, (i / 2 & 1) ^ 1);
        works[i % 2].number = i;
        draw_work<BLOCK_M, BLOCK_N, true>(works[i % 2], p);
        mbarrier_arrive(barriers + P::kWorkFull + drawing % 2);
        drawing = drawing + 1;
      }
    }
  } else {
    registers_raise<P::kConsumerRegisters>();
    const int group = warp / 4 - 1;
    auto multiply = [&](const BwdWork& work, typename P::Ring& ring) {
      if constexpr (P::kThirds) {
        differentiate_in_thirds<T, P, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, kWays, kPairs>(p, memory, work, ring, group);
      } else {
        differentiate<T, P, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, kWays, kPairs>(p, memory, work, ring, group);
      }
    };
    typename P::Ring ring = {0};
    if constexpr (!kRepeats) {
      multiply(works[0], ring);
    } else {  // what the consumers do lies in a place of its own, at an address that takes no register
      constexpr int kAll = 128 * P::kConsumers;
      BwdWork& work = works[2];
      int number = 0;
#pragma unroll 1
      while (true) {
        mbarrier_wait(barriers + P::kWorkFull + number % 2, number / 2 & 1);
        if (works[number % 2].n0 < 0) break;         // nothing else was written there
        named_barrier_sync(kConsumerBarrier, kAll);  // nobody reads the last one any more
        if (warp == 4 && lane < static_cast<int>(sizeof(BwdWork)) / 4) {
          reinterpret_cast<u32*>(&work)[lane] = reinterpret_cast<const u32*>(&works[number % 2])[lane];
        }
        named_barrier_sync(kConsumerBarrier, kAll);
        if (lane == 0) mbarrier_arrive(barriers + P::kWorkEmpty + number % 2);
        multiply(work, ring);
        number = work.number + 1;
      }
    }
  }
}
