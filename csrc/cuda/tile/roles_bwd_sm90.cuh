// The two warps that serve the consumers of the Hopper backward: one brings tiles in, one adds their products to dq.
#pragma once
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/flag.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/opaque.cuh>
#include <ptx/tma.cuh>
#include <tile/bwd_sm90.cuh>
#include <tile/plan_bwd_sm90.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax_sm90.cuh>
#include <tile/work_bwd_sm90.cuh>

// Warp 0: k and v, and tile by tile q with lse and dout with delta. Rows that do not exist have lse +inf, so that P is 0.
template <class P, int BLOCK_M, bool kSkips, class Params>
__forceinline__ void load_tiles(const Params& p, u8* memory, const BwdWork& work, typename P::Ring& ring) {
  const Sequence& first = work.first;
  const int lane = opaque(threadIdx.x) & 31, b = p.cu_seqlens_q != nullptr ? 0 : first.b;
  u64* barriers = P::barriers(memory);
  auto load = [&](const TensorMap& map, u8* tile, u64* full, int bytes, int panel_bytes, int row, int h) {
    mbarrier_expect(full, bytes);
#pragma unroll 1
    for (int panel = 0; panel < bytes / panel_bytes; ++panel) {
      tma_load(tile + panel * panel_bytes, map, full, 64 * panel, row, h, b);
    }
  };
  auto load_keys = [&](const TensorMap& map, int at, int bytes, u64* full, u64* empty) {
    if constexpr (P::kIsPersistent) {
      mbarrier_wait(empty, (work.number & 1) ^ 1);
      __syncwarp();  // of keys that no query sees, consumers give the place back at once: a lane that lags must not find it free
                     // again
    }
    if (lane == 0) {
      load(map, memory + at, full, bytes, P::kPanelN, first.first_k + work.n0, first.h_k);
      mbarrier_arrive(full);
    }
  };
  auto load_k_and_v = [&] {  // v is free earlier
    load_keys(p.v_map, P::kAtV, P::kV, barriers + P::kVFull, barriers + P::kVEmpty);
    load_keys(p.k_map, 0, P::kK, barriers + P::kKFull, barriers + P::kKEmpty);
  };
  // One tile and its row of statistics; all lanes arrive.
  QueryWalk<BLOCK_M> walk(work, p.nheads / p.nheads_k);
  auto fill = [&](const TensorMap& map, int at, int bytes, u64* full, u64* empty, u32 parity, float* to, const float* from,
                  float absent) {
    mbarrier_wait(empty, parity ^ 1);
    if (lane == 0) load(map, memory + at, full, bytes, P::kPanelM, first.first_q + walk.m0, first.h + walk.g);
    from += first.b * p.row_stride[0] + (first.h + walk.g) * p.row_stride[1] + first.first_q + walk.m0;
#pragma unroll
    for (int i = lane; i < BLOCK_M; i += 32) to[i] = walk.m0 + i < first.seqlen_q ? from[i] : absent;
  };
  float* rows = reinterpret_cast<float*>(memory + P::kAtRows);
  // The work before has k and v until its last tile, q and dout not so long.
  bool is_first = true;
  if (!P::kIsPersistent || work.number == 0 || work.steps == 0) load_k_and_v();
#pragma unroll 1
  for (; walk.left > 0; walk.next()) {
    if (kSkips && memory[P::kAtFlags + walk.flag()] == 0) continue;
    u32 slot = ring.q_slot();
    fill(p.q_map, P::kAtQ + slot * P::kQ, P::kQ, barriers + P::kQFull + slot, barriers + P::kQEmpty + slot, ring.q_parity(),
         rows + slot * BLOCK_M, p.lse_log2, infinity());
    if (lane == 0) P::place(memory, slot) = {walk.m0, walk.g, work.whole(walk.m0, BLOCK_M)};
    mbarrier_arrive(barriers + P::kQFull + slot);
    slot = ring.dout_slot();
    fill(p.dout_map, P::kAtDout + slot * P::kDout, P::kDout, barriers + P::kDoutFull + slot, barriers + P::kDoutEmpty + slot,
         ring.dout_parity(), rows + (P::kStagesQ + slot) * BLOCK_M, p.delta, 0.0f);
    mbarrier_arrive(barriers + P::kDoutFull + slot);
    if (P::kIsPersistent && is_first && work.number > 0) load_k_and_v();
    is_first = false;
    ++ring.step;
  }
}

// Blocks of keys add to a tile of dq's sums in ascending order: those that see fewer queries wait for those before them, which
// started earlier. Where consumers are apart, each has a counter of its part of the tile.
template <int BLOCK_N, class Params>
__forceinline__ void await_turn(const Params& p, const BwdWork& work, const int* turn, int m0) {
  const int before = max(0, m0 + work.first.diagonal - p.left) / BLOCK_N;  // blocks whose keys the tile does not see
  while (load_acquire(turn) != work.n0 / BLOCK_N - before) __nanosleep(20);
}

// Adds what the consumers staged to dq_sums: one warp, number `part` of as many as there are parts of dq.
template <class P, int HEADDIM, int BLOCK_M, int BLOCK_N, bool kSkips, class Params>
__forceinline__ void add_dq(const Params& p, u8* memory, const BwdWork& work, int part) {
  using Tile = DqTile<BLOCK_M, HEADDIM>;
  constexpr int kStaged = P::kConsumers / P::kAdders * Tile::kSlab;  // floats
  const float* staged = reinterpret_cast<const float*>(P::slab(memory, part));
  const bool leader = threadIdx.x % 32 == 0;
  int left = work.steps;
  if (left > 0) named_barrier_arrive(kDqEmpty + part, P::kServed + 32);
#pragma unroll 1
  for (QueryWalk<BLOCK_M> walk(work, p.nheads / p.nheads_k); walk.left > 0; walk.next()) {
    const i64 tile = dq_tile<BLOCK_M>(p, work.first, work.first.h + walk.g, walk.m0);
    int* turn = p.turns == nullptr ? nullptr : p.turns + tile * P::kAdders + part;
    if (kSkips && memory[P::kAtFlags + walk.flag()] == 0) {  // others wait for the turn all the same
      if (leader && turn != nullptr) {
        await_turn<BLOCK_N>(p, work, turn, walk.m0);
        add_release(turn, 1);
      }
      __syncwarp();
      continue;
    }
    --left;
    float* sums = p.dq_sums + tile * Tile::kFloats + part * Tile::kSlab;
#pragma unroll 1
    for (int round = 0; round < P::kRounds; ++round) {
      const bool ends = round == P::kRounds - 1;
      named_barrier_sync(kDqFull + part, P::kServed + 32);
      if (leader) {
        if (turn != nullptr && round == 0) {
          await_turn<BLOCK_N>(p, work, turn, walk.m0);
          fence_async();
        }
        bulk_reduce_add(sums + round * (P::kConsumers * Tile::kSlab), staged, 4 * kStaged);
        bulk_commit();
        bulk_wait_read<0>();
      }
      __syncwarp();
      named_barrier_arrive((ends && left == 0 ? kDqDone : kDqEmpty) + part, P::kServed + 32);
      if (leader && turn != nullptr && ends) {
        bulk_wait<0>();
        fence_async();
        add_release(turn, 1);
      }
      __syncwarp();
    }
  }
}

// By all threads of a consumer: its accumulators of dq, slab by slab, to where the adding warp takes them from.
template <class P, int kCount>
__forceinline__ void stage_dq(u8* memory, const float (&dq)[kCount], int group) {
  const int part = group % P::kAdders;
  u8* slab = P::slab(memory, group) + 16 * (threadIdx.x % 128);
#pragma unroll
  for (int round = 0; round < kCount / 32; ++round) {
    named_barrier_sync(kDqEmpty + part, P::kServed + 32);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* x = &dq[32 * round + 4 * j];
      store_shared_16(slab + j * (16 * 128),
                      make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
    }
    fence_async_shared();
    named_barrier_arrive(kDqFull + part, P::kServed + 32);
  }
}
