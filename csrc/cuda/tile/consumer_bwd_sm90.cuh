// What the consumers of the Hopper backward have in common, however they divide a tile (plan_bwd_sm90.cuh): how they take over k,
// their scores and dP, what becomes of these, and the walk over the tiles.
#pragma once
#include <ptx/core.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/wgmma.cuh>
#include <tile/bwd_sm90.cuh>
#include <tile/lost_bwd_sm90.cuh>
#include <tile/plan_bwd_sm90.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax.cuh>
#include <tile/softmax_sm90.cuh>
#include <tile/work_bwd_sm90.cuh>

// An accumulator that the next product overwrites: without this its old numbers would be kept in registers until then.
template <int kCount>
__forceinline__ void forget(float (&x)[kCount]) {
  float nothing[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = nothing[i];
}

// Until k has come; with `hides` what is not finite is taken out of it. thread: among all consumers.
template <class T, class P>
__forceinline__ void take_keys(u8* memory, const BwdWork& work, bool hides, int thread) {
  constexpr int kAll = 128 * P::kConsumers;
  mbarrier_wait(P::barriers(memory) + P::kKFull, work.parity<P::kIsPersistent>());
  if (!hides) return;
  keep_finite<T, P::kK, kAll>(memory, thread);
  fence_async_shared();
  named_barrier_sync(kConsumerBarrier, kAll);
}

// Scores or dP: x = a · b^T over kColumns columns, in panels of 64 that are kPanelA and kPanelB bytes apart. Issued and committed.
template <class T, int kColumns, int kPanelA, int kPanelB, int kCount>
__forceinline__ void issue_pairs(float (&x)[kCount], const u8* a_tile, const u8* b_tile) {
  const u64 a = wgmma_k_major(a_tile), b = wgmma_k_major(b_tile);
  forget(x);
  wgmma_pin(x);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < kColumns; d += 16) {
    wgmma_ss<T, 0, 0>(x, wgmma_advance(a, d / 64 * kPanelA + d % 64 * 2), wgmma_advance(b, d / 64 * kPanelB + d % 64 * 2), d > 0);
  }
  wgmma_commit();
}

// The pairs of a tile, of which `key` and `query` are this thread's first ones, counted from those of the block and of the tile.
template <bool kKeysAreRows, int kCount, class Params>
__forceinline__ Seen<kCount> seen_of_tile(const Params& p, const BwdWork& work, const TilePlace& place, int key, int query) {
  return seen_by_position<kCount, kKeysAreRows>(p, work.first, work.n0 + key, place.m0 + query);
}
__forceinline__ Sequence sequence_of_tile(const BwdWork& work, const TilePlace& place) {
  Sequence s = work.first;
  s.h += place.g;
  return s;
}

// P of raw scores, in their place and packed into `weights`; the rest is what pair_probabilities leaves for tile_gradients.
template <class T, u32 kPairs, int kCount, class Lse, class Params>
__forceinline__ void tile_probabilities(float (&s)[kCount], float (&derivatives)[kCount], u32 (&weights)[kCount / 2],
                                        Seen<kCount>& seen, const Params& p, const BwdWork& work, const TilePlace& place,
                                        const Lse& lse, int key, int query) {
  auto by_position = [&] { return seen_of_tile<Lse::kKeysAreRows, kCount>(p, work, place, key, query); };
  if constexpr (kPairs != 0) {
    const Sequence sequence = sequence_of_tile(work, place);
    seen = by_position();
    pair_probabilities<T, kPairs>(s, derivatives, weights, seen, p, sequence, score_rule(p, sequence), lse, work.n0 + key,
                                  place.m0 + query);
  } else {
    probabilities(s, p.scale * kLog2e, lse);
    if (place.whole == 0) hide(s, by_position());
    pack_pairs<T>(weights, s);
  }
}
// dS in the place of dP.
template <u32 kPairs, int kCount, class Delta, class Params>
__forceinline__ void tile_gradients(float (&dp)[kCount], const float (&s)[kCount], const float (&derivatives)[kCount],
                                    const Seen<kCount>& seen, const Params& p, const BwdWork& work, const TilePlace& place,
                                    const Delta& delta, int key, int query) {
  if constexpr (kPairs != 0) {
    pair_gradients<kPairs>(dp, s, derivatives, seen, p, sequence_of_tile(work, place), delta, work.n0 + key, place.m0 + query);
  } else {
    score_gradients(dp, s, delta);
    if (place.whole == 0) hide(dp, seen_of_tile<Delta::kKeysAreRows, kCount>(p, work, place, key, query));
  }
}

// A consumer's walk. issue_s and issue_dp issue the scores and dP of the tile that the ring is at, `finish` waits for both and
// makes P; step(Constant<is it the last one?>) does the rest of a tile and as much of the next one. Behind the walk k and v are
// free, and so is the memory where dq was staged.
template <class P, class IssueS, class IssueDp, class Finish, class Step>
__forceinline__ void walk_tiles(u64* barriers, const BwdWork& work, const typename P::Ring& ring, int group, IssueS issue_s,
                                IssueDp issue_dp, Finish finish, Step step) {
  if (work.steps > 0) {
    const int last = ring.step + work.steps - 1;
    issue_s();
    mbarrier_wait(barriers + P::kVFull, work.parity<P::kIsPersistent>());
    issue_dp();
    finish();
#pragma unroll 1
    while (ring.step < last) step(Constant<false>{});
    step(Constant<true>{});
    named_barrier_sync(kDqDone + group % P::kAdders, P::kServed + 32);
  } else {
    mbarrier_wait(barriers + P::kVFull, work.parity<P::kIsPersistent>());
    __syncwarp();
    if (P::kIsPersistent && (threadIdx.x & 31) == 0) {
      mbarrier_arrive(barriers + P::kVEmpty);
      mbarrier_arrive(barriers + P::kKEmpty);
    }
  }
}
