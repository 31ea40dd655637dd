// The two warps that serve the consumers of the Hopper forward: one brings k, v and a bias, one brings q.
#pragma once
#include <ptx/core.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/tma.cuh>
#include <tile/mask_sm90.cuh>
#include <tile/plan_sm90.cuh>
#include <tile/products_sm90.cuh>
#include <tile/ring_sm90.cuh>
#include <tile/schedule_sm90.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>

// k and v of every tile, last tile first, by a warp; k is one tile ahead of v, as consumers ask for them, and a bias comes behind
// both, as it is needed last. With kMask, tiles that the mask hides are left out: the slots of k come with the numbers of their
// tiles, and one without keys, -1, ends the work. rank: of this block in its cluster.
template <class P, int BLOCK_M, int BLOCK_N, class Ring, class Next, class Params>
__forceinline__ void load_keys(const Params& p, u8* memory, Ring keys, Ring values, Ring biases, int* numbers, int rank,
                               Next next) {
  const bool first = threadIdx.x % 32 == 0;
  auto fill = [&](Ring& ring, const TensorMap& map, u8* slots, int bytes, int n, const Sequence& s) {
    u64* full = &ring.full[ring.slot];
    mbarrier_arrive_expect(full, bytes);
    n += s.first_k + rank * P::kPart;
    for (int panel = 0; panel < bytes / P::kPanelK; ++panel) {
      u8* to = slots + ring.slot * bytes + panel * P::kPanelK + rank * P::kPart * kPanelRow;
      int b = p.cu_seqlens_q != nullptr ? 0 : s.b;
      if constexpr (P::kCluster > 1) {
        tma_load_multicast(to, map, full, (1 << P::kCluster) - 1, 64 * panel, n, s.h_k, b);
      } else {
        tma_load(to, map, full, 64 * panel, n, s.h_k, b);
      }
    }
  };
  for (int i; (i = next()) >= 0;) {
    Work work = work_of<BLOCK_M, P::kCluster>(p, i, rank);
    Sequence s = sequence_of(p, work.b, work.h);
    if (work.first >= s.seqlen_q) continue;
    Tiles tiles = tiles_of<BLOCK_N>(p, s, work, work.m0);
    auto fill_keys = [&](int j) {
      if (first) {
        keys.await_empty();
        if constexpr (P::kMasked) numbers[keys.slot] = j;
        if (j >= 0) {
          fill(keys, p.k_map, memory + P::kAtK, P::kLoadK, tiles.lo + j * BLOCK_N, s);
        } else {
          mbarrier_arrive(&keys.full[keys.slot]);
        }
      }
      keys.advance();
    };
    auto fill_values = [&](int j) {
      if (first) {
        values.await_empty();
        fill(values, p.v_map, memory + P::kAtV, P::kLoadV, tiles.lo + j * BLOCK_N, s);
      }
      values.advance();
    };
    auto fill_bias = [&](int j) {
      using Bias = typename P::Bias;
      if (first) {
        biases.await_empty();
        u64* full = &biases.full[biases.slot];
        mbarrier_arrive_expect(full, Bias::kLoad);
        u8* slot = memory + P::kAtBias + biases.slot * Bias::kBytes;
        int h = p.bias_stride[1] != 0 ? s.h : 0, b = p.bias_stride[0] != 0 ? s.b : 0;
        for (int box = 0; box < Bias::kLoad / Bias::kBox; ++box) {
          tma_load(slot + box * Bias::kBox, p.bias_map, full, tiles.lo + j * BLOCK_N + box * (Bias::kSpan / Bias::kItem),
                   Bias::kOneRow ? 0 : work.m0, h, b);
        }
      }
      biases.advance();
    };
    // Does the mask allow any pair of the piece within tile j?
    auto allows = [&](int j) {
      int m1 = min(work.first + work.rows, s.seqlen_q), n0 = tiles.lo + j * BLOCK_N, n1 = min(n0 + BLOCK_N, s.seqlen_k);
      Sequence other = s;
      other.h ^= 1;
      return any_allowed(pairs_of<u8>(p.mask, p.mask_stride, s), work.first, m1, n0, n1) ||
             (P::kCluster > 1 && p.heads_each == 2 &&
              any_allowed(pairs_of<u8>(p.mask, p.mask_stride, other), work.first, m1, n0, n1));
    };
    int before = -1;  // the tile whose k was loaded last
    for (int j = tiles.count - 1; j >= 0; --j) {
      if constexpr (P::kMasked) {
        if (!allows(j)) continue;
      }
      fill_keys(j);
      if (before >= 0) fill_values(before);
      if constexpr (P::kBiased) fill_bias(j);
      before = j;
    }
    if (P::kMasked) fill_keys(-1);
    if (before >= 0) fill_values(before);
  }
}

// The 64 queries of each consumer, by one warp.
template <class P, int BLOCK_M, class Next, class Params>
__forceinline__ void load_queries(const Params& p, u8* memory, u64* full, u64* empty, int rank, Next next) {
  u32 parity = 1;
  for (int i; (i = next()) >= 0;) {
    Work work = work_of<BLOCK_M, P::kCluster>(p, i, rank);
    Sequence s = sequence_of(p, work.b, work.h);
    if (work.first >= s.seqlen_q) continue;
    if (threadIdx.x % 32 == 0) {
      for (int group = 0; group < P::kGroups; ++group) {
        mbarrier_wait(&empty[group], parity);
        mbarrier_arrive_expect(&full[group], P::kLoadQ);
        for (int panel = 0; panel < P::kPanels; ++panel) {
          tma_load(memory + group * P::kQ + panel * P::kPanelQ, p.q_map, &full[group], 64 * panel, s.first_q + work.m0 + 64 * group,
                   s.h, p.cu_seqlens_q != nullptr ? 0 : s.b);
        }
      }
    }
    __syncwarp();
    parity ^= 1;
  }
}
