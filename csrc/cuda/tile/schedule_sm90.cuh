// Which work a persistent block does: blocks of BLOCK_M queries of one head. Every role of the block walks the same list.
#pragma once
#include <ptx/core.cuh>
#include <ptx/mbarrier.cuh>

struct Work {
  int b, h, m0;
};

// Number i of batch · nheads · blocks_m: heads_together heads at a time, so that their keys and values stay in the L2 cache;
// within these the longest blocks of all heads come first.
template <int BLOCK_M, class Params>
__forceinline__ Work work_of(const Params& p, int i) {
  int heads = p.batch * p.nheads;
  int part = i / (p.heads_together * p.blocks_m), first = part * p.heads_together;
  int together = min(p.heads_together, heads - first), rest = i - first * p.blocks_m;
  int block = rest / together, head = first + rest % together;
  if (p.longest_first) block = p.blocks_m - 1 - block;
  return {head / p.nheads, head % p.nheads, block * BLOCK_M};
}

// Handed out in rounds of gridDim.x, every other round backwards: as work gets shorter, who had the longest of one round gets
// the shortest of the next, and the sums stay even without asking anybody.
struct StaticSchedule {
  int total, round;
  // The next number, -1 at the end.
  __forceinline__ int next() {
    i64 base = static_cast<i64>(round) * gridDim.x;
    i64 i = base + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
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
