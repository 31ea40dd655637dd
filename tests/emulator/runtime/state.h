// What the parts of the runtime share: fibres, blocks, the cluster that is running, and how a fault ends it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "clock.h"
#include "numbers.h"

namespace emulator {

using Pc = u32;  // a return address, relative to the start of the loaded library

constexpr u32 kWindow = 1u << 18;  // of addresses for the shared memory of one block
constexpr u32 kWindows = 16;       // blocks in the largest cluster
constexpr u32 kReserved = 1024;    // of a window, below the shared memory, as on sm_90
constexpr u32 kMaxThreads = 1u << 14;
constexpr size_t kStack = 1u << 16;  // bytes per fibre
constexpr size_t kShared = size_t{kWindow} * kWindows;
constexpr size_t kArena = kShared + kStack * kMaxThreads;

struct Index {
  u32 x, y, z;
};

struct Block;

// A cp.async under way.
struct Copy {
  u32 to;  // offset in the arena
  u32 bytes;
  const void* from;  // null: zeros
};

// Registers that an asynchronous product will write.
struct Destination {
  u8* begin;
  u8* end;
  Pc pc;
};

struct Fibre {
  void* stack_pointer;
  Block* block;
  u32 thread;  // within the block
  u32 id;      // within the cluster
  u32 lane, warp;
  u32 own;  // this thread's own clock
  Clock* clock;
  const char* waits_for;  // null while it can run
  Pc waits_at;
  u32 waits_detail;
  bool exited;
  std::vector<Copy> copies;         // cp.async, oldest first
  std::vector<u32> groups;          // ends of the committed groups among them
  std::vector<Destination> flying;  // registers owned by wgmma
  std::vector<Destination> late;    // registers written since wgmma_fence
  bool fenced;                      // behind wgmma_fence, before the next commit
  bool watched;                     // fenced, or flying is not empty: accesses to registers matter
  std::vector<u32> fences;          // own at each fence.proxy.async of shared memory
  u32 engine, engine_done;          // of its bulk stores, see async.h; 0: none yet
  u32 polls;                        // value of progress at the last failed try_wait
  bool lags;                        // runs when nobody else can

  u32 epoch() const { return id << kClockBits | own; }
};

constexpr int kCollectives = 4;  // groups of lanes of one warp that gather at the same time

// Lanes of a warp on their way to a collective instruction.
struct Gather {
  const char* verb;  // null: free
  void (*finish)(Gather&);
  u32 mask, arrived;
  Pc pc;
  bool aligned;  // every lane of the warp must take part
  Fibre* lanes[32];
  void* slots[32];
};

struct Warp {
  u32 existing, exited;  // masks of lanes
  std::vector<Fibre*> ready;
  Gather gathers[kCollectives];
  Fibre* fibres[32];
  struct Products* products;  // wgmma.cpp; null: none yet
  u32 registers;              // per thread
  std::vector<Pc> changes;    // of them
};

// A barrier of the block. Number 0 without a count is __syncthreads.
struct Barrier {
  u32 expected;  // 0: every thread that has not exited
  u32 arrived;
  int sum, all, any;
  Pc pc;
  std::vector<Fibre*> waiting;
  std::vector<Pc> warp_pc;  // where the lanes of each warp arrived
  std::vector<u32> lanes;   // which of each warp
  Clock* clock;
};

struct Block {
  Index index;
  u32 linear, rank;  // in the grid, in the cluster
  u8* shared;
  u32 live;
  std::vector<Fibre*> fibres;
  std::vector<Warp> warps;
  Barrier barriers[16];
  int reduced[3];  // of the last __syncthreads_count / and / or
};

// Of the lot that the seed draws: a lane, the lane of that number in every warp, a warp, a warpgroup, a block of the cluster.
enum Lag : u32 { kNobody, kLane, kLanes, kWarp, kWarpgroup, kBlock, kAllBut = 16 };

struct Launch {
  void (*call)(const void*);
  const void* params;
  Index grid, block;
  u32 cluster, shared_bytes;
  u32 registers;  // of a thread at first
  u32 seed, engines;
  u32 lag;  // who lags: a Lag; plus kAllBut: all but these
};

extern Launch launch;
extern Fibre* current;
extern u8* arena;
extern std::vector<Block> blocks;  // of the running cluster
extern u64 progress;               // counts events that may let a polling thread pass

// Runs the grid. Null, or what is wrong. `ask` tells whether two Pcs are one place of the source.
const char* run(const Launch& what, int (*ask)(Pc, Pc));

extern u64 spins;  // atomic operations since a thread waited or ended

// Ends the run with this message, on a fibre or on the main stack. {0x12} in it stands for the source line of a Pc.
[[noreturn]] void fail(const std::string& message);
// The same, told of the running thread, at `pc`.
[[noreturn]] void fail_here(Pc pc, const std::string& message);
std::string site(Pc pc);
std::string name_of(const Fibre& f);
std::string block_name(const Block& b);
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// Whether two calls stand at the same place of the source (a compiler may have copied one).
bool same_site(Pc a, Pc b);

extern u64 library;  // where the library is loaded
inline Pc relative(void* address) { return static_cast<Pc>(reinterpret_cast<u64>(address) - library); }
#define CALLER emulator::relative(__builtin_return_address(0))

// Scheduling.
u32 random_number();
void make_ready(Fibre* f);
void wait(const char* what, Pc pc, u32 detail = 0);  // until someone makes the running thread ready
void yield();                                        // others may run
void maybe_yield();                                  // others may run, now and then
void end_lag();                                      // who lags may run now: somebody polls

void lane_exits(Fibre* f);    // warp.cpp
void thread_exits(Fibre* f);  // barrier.cpp
void start_barriers(Block& b);

}  // namespace emulator
