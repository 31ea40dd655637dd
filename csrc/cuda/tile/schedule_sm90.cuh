// Which work a persistent block does: pieces of BLOCK_M queries of one head, or with clusters of two blocks, twice as many queries
// or two heads; and which tiles of keys a piece sees. Every role of every block of a cluster walks the same list.
#pragma once
#include <ptx/core.cuh>
#include <ptx/mbarrier.cuh>
#include <tile/band.cuh>
#include <tile/sequence.cuh>

// This block's part of a piece, queries m0 … m0 + BLOCK_M - 1 of a head, and which queries the whole piece has.
struct Work {
  int b, h, m0;
  int first, rows;
};

// Number i of batch · nheads / heads_each · blocks_m pieces: heads_together heads (pairs of them) at a time, so that their keys and
// values stay in the L2 cache; within these the longest pieces of all heads come first.
template <int BLOCK_M, int kCluster, class Params>
__forceinline__ Work work_of(const Params& p, int i, int rank) {
  const bool pairs = kCluster > 1 && p.heads_each == kCluster;
  int heads = p.batch * p.nheads;
  if (pairs) heads /= kCluster;
  int part = i / (p.heads_together * p.blocks_m), first = part * p.heads_together;
  int together = min(p.heads_together, heads - first), rest = i - first * p.blocks_m;
  int block = rest / together, head = first + rest % together;
  if (p.longest_first) block = p.blocks_m - 1 - block;
  if (pairs) head = head * kCluster + rank;
  int rows = pairs ? BLOCK_M : kCluster * BLOCK_M, m0 = block * rows;
  return {head / p.nheads, head % p.nheads, pairs ? m0 : m0 + rank * BLOCK_M, m0, rows};
}

// The tiles of keys that a piece of work sees, numbered 0 … count - 1 from key lo on. Of them the 64 rows from m0 on see
// [seen_first, seen_end), and [whole_first, whole_end) as a whole.
struct Tiles {
  int lo, count, seen_first, seen_end, whole_first, whole_end;
};
template <int BLOCK_N, class Params>
__forceinline__ Tiles tiles_of(const Params& p, const Sequence& s, const Work& work, int m0) {
  Range piece = key_range<BLOCK_N>(p, s, work.first, min(work.first + work.rows, s.seqlen_q));
  Range rows = key_range<BLOCK_N>(p, s, m0, min(m0 + 64, s.seqlen_q));
  auto within = [](int low, int x, int high) { return max(low, min(x, high)); };
  Tiles t;
  t.lo = piece.lo;
  t.count = max(0, (piece.hi - t.lo + BLOCK_N - 1) / BLOCK_N);
  t.seen_first = within(0, (rows.lo - t.lo) / BLOCK_N, t.count);
  t.seen_end = within(t.seen_first, m0 < s.seqlen_q ? (rows.hi - t.lo + BLOCK_N - 1) / BLOCK_N : 0, t.count);
  t.whole_end = within(t.seen_first, max(0, rows.whole_hi - t.lo) / BLOCK_N, t.seen_end);
  t.whole_first = within(t.seen_first, (max(0, rows.whole_lo - t.lo) + BLOCK_N - 1) / BLOCK_N, t.whole_end);
  return t;
}

// Handed out in rounds, a piece to each of `walkers`, every other round backwards: as work gets shorter, who had the longest of one
// round gets the shortest of the next, and the sums stay even without asking anybody.
struct StaticSchedule {
  u32 total, walkers, walker, round;
  // The next number, -1 at the end: round · walkers + walker, or in odd rounds (round + 1) · walkers - 1 - walker.
  __forceinline__ int next() {
    u32 i = ((round + 1) & ~1u) * walkers + (walker ^ (0u - (round & 1)));
    ++round;
    return i < total ? static_cast<int>(i) : -1;
  }
};

// Handed out by a counter in global memory. One warp of the block asks (`draw`) and leaves the number in a ring of two slots for
// the other warps (`next`).
struct DynamicSchedule {
  static constexpr int kSlots = 2;
  int total;
  int* numbers;       // [kSlots] in shared memory
  u64 *full, *empty;  // [kSlots]; empty awaits one arrival of each warp that calls next
  u32 slot, parity;
  __forceinline__ void advance() {
    slot ^= 1;
    parity ^= slot == 0;
  }
  __forceinline__ int draw(int* counter) {
    int i = 0;
    if (threadIdx.x % 32 == 0) {
      i = atomicAdd(counter, 1);
      if (i >= total) i = -1;
      mbarrier_wait(&empty[slot], parity ^ 1);
      numbers[slot] = i;
      mbarrier_arrive(&full[slot]);
    }
    advance();
    return __shfl_sync(0xffffffffu, i, 0);
  }
  __forceinline__ int next() {
    mbarrier_wait(&full[slot], parity);
    int i = numbers[slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&empty[slot]);
    advance();
    return i;
  }
};
