// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies (sm_90). A barrier is a u64,
// aligned to 8 bytes. Its phases are numbered from 0; a phase completes when its pending arrivals and its pending bytes are
// both 0, and the next one begins at once with the count of mbarrier_init. The parity of a phase is its number modulo 2, so
// a ring of buffers waits for a slot's n-th filling with parity n % 2, and for a slot that was never filled to be free with
// parity 1, which a new barrier grants at once.
// Arriving releases the thread's earlier accesses to shared memory, waiting acquires those of all that arrived. Bytes that
// a copy engine wrote are visible to whoever waited for the phase that counts them, in the generic and the async proxy.
#pragma once
#include <ptx/core.cuh>

// Phase 0 begins, awaiting `arrivals` in every phase. By one thread; before others use the barrier, fence_barrier_init and a
// barrier of the block (of the cluster, when another block uses it).
__forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes the initialisations by this thread visible to the copy engines and to the other blocks of the cluster.
__forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival by this thread in the current phase.
__forceinline__ void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One arrival, after the current phase was told to await `bytes` more (below 2^20 pending at any time). Comes before the
// copies that bring these bytes are issued, by the thread that issues them.
__forceinline__ void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// The same without an arrival.
__forceinline__ void mbarrier_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// One arrival at the barrier that lies at the same offset in the shared memory of block `rank` of this cluster.
__forceinline__ void mbarrier_arrive_remote(u64* barrier, u32 rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// The same by a thread that has read, its own or through a product it waited for, and written nothing that others of the cluster
// are to see: without the release beyond the block, for which the thread would wait until all its writes have arrived everywhere.
__forceinline__ void mbarrier_arrive_remote_read(u64* barrier, u32 rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Has the phase of this parity completed? The hardware may hold the thread for a while before it says no.
__forceinline__ bool mbarrier_try_wait(u64* barrier, u32 parity) {
  u32 done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
// Until the phase of this parity has completed: the phase under way has the other parity. Waiting for a phase two or more
// behind the current one is indistinguishable from waiting for one not begun, so that a waiter must not lag a full turn.
__forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
