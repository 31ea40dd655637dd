// Which keys a block of the Hopper backward has, and the walk over the tiles of queries that see them.
#pragma once
#include <ptx/core.cuh>
#include <tile/band.cuh>
#include <tile/sequence.cuh>

// What a block does. It lies in shared memory, where it takes no registers from the loop.
struct BwdWork {
  static constexpr int kBytes = 80;  // room for it
  Sequence first;                    // of the group's first head
  int n0, n1;                        // keys
  int lo, last, whole_lo, whole_hi;  // the first and the last tile of queries that see them; who sees all of the block
  int steps;                         // tiles of all heads of the group
  int hides;                         // 1: a tile holds a pair that is not seen
  int passed;  // tiles to whose sums of dq it adds nothing but takes its turn: all, where a mask hides its keys
  __forceinline__ bool whole(int m0, int rows) const { return m0 >= whole_lo && m0 + rows <= whole_hi; }
};
static_assert(sizeof(BwdWork) <= BwdWork::kBytes, "");

// Number `id` of batch · nheads_k · blocks_n: heads_together heads take turns, block by block of keys.
template <int BLOCK_M, int BLOCK_N, class Params>
__forceinline__ BwdWork bwd_work(const Params& p, int id) {
  int group = p.nheads / p.nheads_k, begin = id / (p.blocks_n * p.heads_together) * p.heads_together;
  int together = min(p.heads_together, p.batch * p.nheads_k - begin), rest = id - begin * p.blocks_n;
  int head = begin + rest % together;
  BwdWork w;
  w.first = sequence_of(p, head / p.nheads_k, head % p.nheads_k * group);
  w.n0 = rest / together * BLOCK_N;
  w.n1 = min(w.n0 + BLOCK_N, w.first.seqlen_k);
  Range range = query_range<BLOCK_M>(p, w.first, w.n0, w.n1);
  int count = max(0, (range.hi - range.lo + BLOCK_M - 1) / BLOCK_M);
  w.lo = range.lo;
  w.last = range.lo + (count - 1) * BLOCK_M;
  w.whole_lo = range.whole_lo;
  w.whole_hi = w.n1 - w.n0 == BLOCK_N ? range.whole_hi : 0;
  w.steps = count * group;
  w.passed = 0;
  w.hides = !w.whole(w.lo, count * BLOCK_M);
  return w;
}

// The walk over the tiles of queries, last one first, for each head of the group. Every role of the block walks it.
template <int BLOCK_M, int kStages, int kStagesDout>
struct QueryWalk {
  const BwdWork& work;
  int step, m0, g;  // number, first query, head of the group
  __forceinline__ QueryWalk(const BwdWork& work) : work(work), step(0), m0(work.last), g(0) {}
  __forceinline__ void advance() {
    ++step;
    m0 -= BLOCK_M;
    if (m0 < work.lo) {
      m0 = work.last;
      ++g;
    }
  }
  // Where the tiles of this step lie, and the parity of their barriers' phase.
  __forceinline__ u32 q_slot() const { return step % kStages; }
  __forceinline__ u32 q_parity() const { return step / kStages % 2; }
  __forceinline__ u32 dout_slot() const { return step % kStagesDout; }
  __forceinline__ u32 dout_parity() const { return step / kStagesDout % 2; }
};
