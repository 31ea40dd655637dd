// Which work a persistent block does: pieces of BLOCK_M queries of one head, or with clusters of two blocks, twice as many queries
// or two heads. Every role of every block of a cluster walks the same list.
#pragma once
#include <ptx/core.cuh>
#include <ptx/mbarrier.cuh>

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
