// What the emulator's runtime does for a kernel: the functions behind the builtins of cuda.h and the verbs of ptx/.
// Arguments and results travel in registers, so that the checks on memory see only what the kernel itself touches.
#pragma once
#include "runtime/numbers.h"

namespace emulator {

struct Vector3 {
  unsigned x, y, z;
};

// Constant for a thread as long as it lives.
[[gnu::const]] Vector3 thread_index();
[[gnu::const]] Vector3 block_index();
[[gnu::const]] Vector3 block_size();
[[gnu::const]] Vector3 grid_size();
[[gnu::const]] u8* shared_memory();

u32 shared_address(const void* p);

// Barriers and collectives.
void syncthreads();
int syncthreads_reduce(u32 kind, int predicate);  // 0 count, 1 and, 2 or
void barrier_sync(u32 id, u32 threads);
void barrier_arrive(u32 id, u32 threads);
void syncwarp(u32 mask);
enum : u32 { kShuffle, kShuffleUp, kShuffleDown, kShuffleXor };
u64 shuffle(u32 mask, u64 value, u32 kind, u32 lane, u32 width);
u64 vote(u32 mask, bool predicate);  // the lanes that took part << 32 | those that said yes
u32 match_any(u32 mask, u64 value);
u32 active_lanes();
void sleep();
[[noreturn]] void trap();
[[noreturn]] void broken_rule();  // of ptx/core.cuh's must

// Atomic operations on shared or global memory; they return what was there before.
enum AtomicOp : u32 { kAdd, kMin, kMax, kExchange, kCompare, kAnd, kOr, kXor, kMinSigned, kMaxSigned };
u32 atomic_u32(void* p, AtomicOp op, u32 value, u32 compare);
u64 atomic_u64(void* p, AtomicOp op, u64 value, u64 compare);
float atomic_f32(void* p, float value);
// The same in one direction: sees what was before the additions that made the number; lets others see what was before it.
u32 load_acquire(const void* p);
void add_release(void* p, u32 value);

// 16 bytes of global or shared memory.
struct Words {
  u64 low, high;
};
Words load_global(const void* p);
void store_global(void* p, Words x);
Words load_shared(const void* p);
void store_shared(void* p, Words x);

void copy_async(void* to, const void* from, u32 bytes, bool valid);
void copy_commit();
void copy_wait(u32 pending);

struct Floats {
  float x, y, z, w;
};
Words ldmatrix(const void* row, u32 matrices, bool transposed);
Floats mma_bf16(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float d0, float d1, float d2, float d3);
Floats mma_f16(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float d0, float d1, float d2, float d3);

void stmatrix(void* row, u32 matrices, bool transposed, u32 r0, u32 r1, u32 r2, u32 r3);

// mbarriers and the copy engine.
void mbarrier_init(void* p, u32 arrivals);
void fence_barrier_init();
void mbarrier_arrive(void* p);
void mbarrier_arrive_expect(void* p, u32 bytes);
void mbarrier_expect(void* p, u32 bytes);
void mbarrier_arrive_remote(void* p, u32 rank);
bool mbarrier_try_wait(void* p, u32 parity);
void mbarrier_wait(void* p, u32 parity);
void fence_async();
void tma_prefetch(const void* map);
// multicast: the blocks that it goes to, 0 is the own one.
void tma_load(void* shared, const void* map, void* barrier, u32 multicast, u32 rank, int x0, int x1, int x2 = 0, int x3 = 0,
              int x4 = 0);
void tma_store(const void* map, const void* shared, bool adds, u32 rank, int x0, int x1, int x2 = 0, int x3 = 0, int x4 = 0);
void bulk_load(void* shared, const void* global, u32 bytes, void* barrier);
void bulk_store(void* global, const void* shared, u32 bytes);
void bulk_reduce_add(void* global, const void* shared, u32 bytes);
void bulk_commit();
void bulk_wait_read(u32 pending);
void bulk_wait(u32 pending);

// wgmma, clusters, registers.
enum : u32 { kAccumulate = 1, kTransposedA = 2, kTransposedB = 4, kRegisters = 8, kHalf = 16 };
void wgmma(float* d, u32 n, u32 flags, u64 a, u64 b, u32 a0, u32 a1, u32 a2, u32 a3);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(u32 pending);
u32 cluster_rank();
u32 cluster_size();
void cluster_arrive();
void cluster_wait();
u32 cluster_address(const void* p, u32 rank);
float load_cluster(const void* p, u32 rank);
void store_cluster(void* p, u32 rank, float x);
void registers_change(u32 count, bool raise);

}  // namespace emulator
