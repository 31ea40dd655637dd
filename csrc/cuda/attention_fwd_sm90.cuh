// Attention forward for Hopper: o and lse of BLOCK_M queries of one head at a time, by an online softmax over tiles of BLOCK_N
// keys. Grid: as many blocks as run at once; each walks the list of schedule_sm90.cuh. A block is a producer warpgroup, whose warps
// 0 and 1 keep the copy engine busy (k, v and a bias; q), and BLOCK_M / 64 consumers of 64 rows each, who multiply (wgmma) and take
// exponentials. Shared memory: Plan::kBytes: q, kStages tiles of k, of v and of a bias, o where kApart, barriers. Registers of a
// consumer: s and its packed copy (BLOCK_N / 2 + BLOCK_N / 4), o (HEADDIM_V / 2). Bound by the tensor cores, 2 (headdim +
// headdim_v) flops per pair, with 128 rows also by the L2 cache, at small headdim by the exponential unit: docs/design/hopper.md.
// HGMMA per tile body: HEADDIM / 16 + BLOCK_N / 16. Shah et al., FlashAttention-3, arXiv:2407.08608.
#pragma once
#include <attention_sm90_params.h>

#include <ptx/cluster.cuh>
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/registers.cuh>
#include <ptx/tma.cuh>
#include <ptx/wgmma.cuh>
#include <tile/bias_sm90.cuh>
#include <tile/epilogue_sm90.cuh>
#include <tile/lost_sm90.cuh>
#include <tile/mask_sm90.cuh>
#include <tile/philox.cuh>
#include <tile/plan_sm90.cuh>
#include <tile/products_sm90.cuh>
#include <tile/ring_sm90.cuh>
#include <tile/roles_sm90.cuh>
#include <tile/schedule_sm90.cuh>
#include <tile/score.cuh>
#include <tile/score_sm90.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax_sm90.cuh>

// One consumer: 64 rows of every piece of work.
template <class T, class P, int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, u32 kPairs, class Ring, class Next, class Params>
__forceinline__ void consume(const Params& p, u8* memory, Ring keys, Ring values, Ring biases, const int* numbers, u64* q_full,
                             u64* q_empty, int group, int rank, Next next) {
  constexpr bool kOverlaps = P::kHas(kOverlap), kTurns = P::kHas(kPingPong) && P::kGroups > 1;
  constexpr bool kRescaleLate = kOverlaps && HEADDIM_V > 128;  // behind the next scores' issue: o is long to walk
  constexpr bool kMasked = P::kMasked, kAllHidden = kMasked || (kPairs & (kBias | kTile)) == kBias;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  u8* q = memory + group * P::kQ;
  u8* staging = P::kHas(kApart) ? memory + P::kAtO + group * P::kO : q;
  u32 q_parity = 0;

  auto turn = [&] {
    if constexpr (kTurns) named_barrier_sync(kTurnBarrier + group, 256);
  };
  auto pass_turn = [&] {
    if constexpr (kTurns) named_barrier_arrive(kTurnBarrier + (group + 1) % P::kGroups, 256);
  };
  auto release = [&](Ring& ring) {
    if constexpr (P::kCluster > 1) {  // to both that load
      if (lane < P::kCluster) mbarrier_arrive_remote_read(&ring.empty[ring.slot], lane);
    } else {
      if (lane == 0) ring.release();
    }
    ring.advance();
  };
  auto release_bias = [&] {
    fence_async_shared();  // ordinary loads have read what TMA overwrites next
    __syncwarp();
    if (lane == 0) biases.release();
    biases.advance();
  };

  for (int i; (i = next()) >= 0;) {
    const Work work = work_of<BLOCK_M, P::kCluster>(p, i, rank);
    const Sequence sequence = sequence_of(p, work.b, work.h);
    if (work.first >= sequence.seqlen_q) continue;
    const int m0 = work.m0 + 64 * group, m = m0 + 16 * warp;  // of this group, of this warp
    const Tiles tiles = tiles_of<BLOCK_N>(p, sequence, work, m0);
    const ScoreRule rule = score_rule(p, sequence);
    const float factor = kPairs & (kGeneral | kBias) ? 1.0f : rule.scale;
    const u32 head = work.b * p.nheads + work.h;
    Philox philox = {};
    if constexpr (kPairs & kDropout) philox = load_philox(p.philox);

    float s[BLOCK_N / 8][4], o[HEADDIM_V / 8][4];
    u32 probabilities[BLOCK_N / 4];
    float top[2], total[2], share[2];
    bool rescales = false;
    start_rows<T>(p, work.h, top, total);
#pragma unroll
    for (int j = 0; j < HEADDIM_V / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;

    // What the first product needs is awaited a tile ahead, behind the exponentials: it keeps them from sinking behind the wait for
    // the second product, and the first one from waiting where nothing else runs. Random words need the registers.
    constexpr bool kAhead = kOverlaps && !(kPairs & kDropout);
    auto await_next = [&](int j) {
      if (kAhead && j > 0) keys.await_full();
    };
    auto issue_s = [&](bool awaited) {
      if (!awaited) keys.await_full();
      turn();
      wgmma_pin(flat(s));
      wgmma_fence();
      issue_scores<T, HEADDIM, BLOCK_N>(s, q, memory + P::kAtK + keys.slot * P::kLoadK);
      wgmma_commit();
    };
    auto issue_o = [&] {
      values.await_full();
      wgmma_pin(flat(o));
      wgmma_pin(probabilities);
      wgmma_fence();
      issue_values<T, HEADDIM_V, BLOCK_N>(o, probabilities, memory + P::kAtV + values.slot * P::kLoadV);
      wgmma_commit();
    };
    u32 seen[2];
    auto look = [&](int j) {  // while the scores are on their way
      if constexpr (kPairs & kMask) {
        load_seen<BLOCK_N / 8>(seen, pairs_of<u8>(p.mask, p.mask_stride, sequence),
                               corner_of(p, sequence, m, tiles.lo + j * BLOCK_N));
      }
    };
    auto soften = [&](auto hidden, int j) {
      constexpr bool kHidden = decltype(hidden)::value;
      const int n0 = tiles.lo + j * BLOCK_N;
      finish_scores<T, kPairs, kHidden>(s, p, sequence, rule, corner_of(p, sequence, m, n0), seen, [&] {
        biases.await_full();
        const u8* tile = memory + P::kAtBias + biases.slot * P::Bias::kBytes;
        add_tile<T, typename P::Bias>(s, kPairs & kGeneral ? 1.0f : rule.scale, tile, 64 * group + 16 * warp);
        release_bias();
      });
      online_softmax_sm90<kHidden || P::kBiased, P::kHas(kLazy), P::kHas(kPolynomial)>(s, top, total, share, factor);
      rescales = grew<P::kHas(kLazy)>(share, total);
      if constexpr (kPairs & kDropout) drop(s, philox, p.dropout_threshold, m, n0, head);
    };
    auto pass = [&] {  // a tile that none of these rows sees
      keys.await_full();
      turn();
      pass_turn();
      __syncwarp();  // a lane that lags must not find the slot filled again
      release(keys);
      if constexpr (P::kBiased) {
        biases.await_full();
        release_bias();
      }
      values.await_full();
      __syncwarp();
      release(values);
    };
    auto step = [&](auto hidden, int j) {
      if constexpr (kOverlaps) {
        issue_s(kAhead || kMasked);
        if (kRescaleLate && rescales) rescale(o, share);
        issue_o();
        pass_turn();
        look(j);
        wgmma_wait<1>();
        wgmma_pin(flat(s));
        release(keys);
        soften(hidden, j);
        wgmma_pin(flat(s));
        await_next(j);
        wgmma_wait<0>();
        wgmma_pin(flat(o));
        wgmma_pin(flat(s));
        release(values);
        pack_probabilities<T>(probabilities, s);
        if (!kRescaleLate && rescales) rescale(o, share);
      } else {
        issue_s(kMasked);
        pass_turn();
        look(j);
        wgmma_wait<0>();
        wgmma_pin(flat(s));
        release(keys);
        soften(hidden, j);
        pack_probabilities<T>(probabilities, s);
        if (rescales) rescale(o, share);
        issue_o();
        wgmma_wait<0>();
        wgmma_pin(flat(o));
        release(values);
      }
    };

    mbarrier_wait(&q_full[group], q_parity);
    q_parity ^= 1;
    auto following = [&](int j) {  // the tile after j, -1 behind the last one
      if constexpr (!kMasked) return j - 1;
      keys.await_full();
      j = numbers[keys.slot];
      __syncwarp();
      if (j < 0) release(keys);
      return j;
    };
    int j = following(tiles.count);
    for (; j >= tiles.seen_end; j = following(j)) pass();
    const bool some = j >= tiles.seen_first;
    if (kOverlaps && some) {
      issue_s(kMasked);
      pass_turn();
      look(j);
      wgmma_wait<0>();
      wgmma_pin(flat(s));
      release(keys);
      soften(Constant<true>{}, j);
      await_next(j);
      pack_probabilities<T>(probabilities, s);
      j = following(j);
    }
    for (; j >= (kAllHidden ? tiles.seen_first : tiles.whole_end); j = following(j)) step(Constant<true>{}, j);
    if constexpr (!kAllHidden) {
      for (; j >= tiles.whole_first; --j) step(Constant<false>{}, j);
      for (; j >= tiles.seen_first; --j) step(Constant<true>{}, j);
    }
    if constexpr (P::kHas(kApart)) {
      __syncwarp();  // a lane that lags, where no tile was seen, must not find q's memory filled again
      if (lane == 0) mbarrier_arrive(&q_empty[group]);
    }
    if (kOverlaps && some) {
      if (kRescaleLate && rescales) rescale(o, share);
      issue_o();
      wgmma_wait<0>();
      wgmma_pin(flat(o));
      release(values);
    }
    for (; j >= 0; j = following(j)) pass();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = row_sum(total[r]);
      share[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
      if constexpr (kPairs & kDropout) share[r] *= p.dropout_scale;
    }
    if (lane % 4 == 0) {
      float* lse = p.lse + work.b * p.lse_stride[0] + work.h * p.lse_stride[1] + sequence.first_q;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int row = m + lane / 4 + 8 * r;
        if (row < sequence.seqlen_q) lse[row] = log_sum(top[r], total[r]);
      }
    }
    if (leader) bulk_wait_read<0>();
    named_barrier_sync(kStageBarrier + group, 128);  // the copy engine and the products are done with the staging memory
    stage_rows<T>(staging, o, share, 16 * warp);
    if (p.hides) {
      mend_rows<T, HEADDIM_V>(staging, o, p, sequence, m, 16 * warp, top, total);
    }
    fence_async_shared();
    named_barrier_sync(kStageBarrier + group, 128);
    const int rows = min(64, sequence.seqlen_q - m0);
    if (rows == 64 || p.cu_seqlens_q == nullptr) {
      if (leader && rows > 0) {
        store_staged<HEADDIM_V>(p.o_map, staging, sequence.first_q + m0, work.h, p.cu_seqlens_q != nullptr ? 0 : work.b);
      }
    } else {
      T* first = row_of<T>(p.o, p.o_stride, work.b, sequence.first_q, work.h, m0);
      store_ragged<T, HEADDIM_V>(first, p.o_stride[1], staging, rows, p.headdim_v);
      fence_async_shared();  // the next q comes into the memory that was read
      named_barrier_sync(kStageBarrier + group, 128);
    }
    if (!P::kHas(kApart) && leader) {
      bulk_wait_read<0>();
      mbarrier_arrive(&q_empty[group]);
    }
  }
  if (leader) bulk_wait_read<0>();
}

template <class T, int HEADDIM, int HEADDIM_V, int BLOCK_M, int BLOCK_N, int kStages, u32 kWays, u32 kPairs>
__global__ void __launch_bounds__(2 * BLOCK_M + 128, BLOCK_M == 64 && HEADDIM_V <= 192 ? 2 : 1)
    attention_fwd_sm90_kernel(const __grid_constant__ AttentionSm90Params p) {
  using P = Plan<HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, kStages, kWays, kPairs>;
  constexpr int kGroups = P::kGroups, kCluster = P::kCluster;
  u8* memory = shared_memory();
  u64* barriers = reinterpret_cast<u64*>(memory + P::kAtBarriers);
  Ring<kStages> keys(barriers), values(barriers + 2 * kStages), biases(barriers + 4 * kStages);
  u64 *q_full = barriers + 6 * kStages, *q_empty = q_full + kGroups, *work_full = q_empty + kGroups;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    tma_prefetch_map(p.q_map);
    tma_prefetch_map(p.k_map);
    tma_prefetch_map(p.v_map);
    tma_prefetch_map(p.o_map);
    if constexpr (P::kBiased) tma_prefetch_map(p.bias_map);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&keys.full[i], 1);
      mbarrier_init(&values.full[i], 1);
      mbarrier_init(&biases.full[i], 1);
      mbarrier_init(&keys.empty[i], 4 * kGroups * kCluster);
      mbarrier_init(&values.empty[i], 4 * kGroups * kCluster);
      mbarrier_init(&biases.empty[i], 4 * kGroups);
    }
    for (int i = 0; i < kGroups; ++i) {
      mbarrier_init(&q_full[i], 1);
      mbarrier_init(&q_empty[i], P::kHas(kApart) ? 4 : 1);
    }
    for (int i = 0; i < DynamicSchedule::kSlots; ++i) {
      mbarrier_init(&work_full[i], 1);
      mbarrier_init(&work_full[DynamicSchedule::kSlots + i], 4 * kGroups + 1);
    }
    fence_barrier_init();
  }
  if constexpr (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  StaticSchedule rounds = {static_cast<u32>(p.pieces), gridDim.x / kCluster, blockIdx.x / kCluster, 0};
  int* numbers = reinterpret_cast<int*>(memory + P::kAtNumbers);
  DynamicSchedule drawn = {p.pieces, numbers, work_full, work_full + DynamicSchedule::kSlots, 0, 0};
  int* tile_numbers = numbers + DynamicSchedule::kSlots;
  auto next = [&] { return P::kHas(kDynamic) ? drawn.next() : rounds.next(); };
  if (warp < 4) {
    registers_lower<P::kProducerRegisters>();
    if (warp == 0) {
      load_keys<P, BLOCK_M, BLOCK_N>(p, memory, keys, values, biases, tile_numbers, rank,
                                     [&] { return P::kHas(kDynamic) ? drawn.draw(p.counter) : rounds.next(); });
    } else if (warp == 1) {
      load_queries<P, BLOCK_M>(p, memory, q_full, q_empty, rank, next);
    }
  } else {
    registers_raise<P::kConsumerRegisters>();
    const int group = warp / 4 - 1;
    if (P::kHas(kPingPong) && kGroups > 1 && group == kGroups - 1) named_barrier_arrive(kTurnBarrier, 256);
    consume<T, P, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, kPairs>(p, memory, keys, values, biases, tile_numbers, q_full, q_empty,
                                                                group, rank, next);
    if (P::kHas(kPingPong) && kGroups > 1 && group == 0) named_barrier_sync(kTurnBarrier, 256);  // the turn nobody took
  }
  if constexpr (kCluster > 1) {  // until the other block no longer reaches into this one's memory
    __syncwarp();
    cluster_sync();
  }
}
