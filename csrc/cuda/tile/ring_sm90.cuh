// A ring of kSlots buffers in shared memory, filled by one role and read by others, as each of them sees it: `full` completes
// when a slot was filled, `empty` when all readers are done with it (ptx/mbarrier.cuh).
#pragma once
#include <ptx/core.cuh>
#include <ptx/mbarrier.cuh>

template <int kSlots>
struct Ring {
  u64 *full, *empty;  // [kSlots]
  u32 slot, parity;   // of the current filling; 0, 0 at first
  __forceinline__ Ring(u64* barriers) : full(barriers), empty(barriers + kSlots), slot(0), parity(0) {}
  __forceinline__ void await_full() { mbarrier_wait(&full[slot], parity); }
  __forceinline__ void await_empty() { mbarrier_wait(&empty[slot], parity ^ 1); }
  __forceinline__ void release() { mbarrier_arrive(&empty[slot]); }
  __forceinline__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};
