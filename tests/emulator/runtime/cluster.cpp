// Clusters, fences of the async proxy, and the pool of registers.
#include <cstring>

#include "async.h"
#include "device.h"
#include "memory.h"
#include "warp.h"

namespace emulator {
namespace {

struct {
  u32 arrived, turn;
  std::vector<Fibre*> waiting;
  std::vector<u32> turns, waits;  // per thread: how often it arrived and waited
  Clock* clock;
} barrier;

u32 live() {
  u32 n = 0;
  for (const Block& b : blocks) n += b.live;
  return n;
}

Clock* last_clock;           // of the turn that completed
std::vector<Fibre*> hungry;  // who wait for registers

void complete_if_due() {
  if (barrier.arrived == 0 || barrier.arrived < live()) return;
  last_clock = barrier.clock;
  for (Fibre* f : barrier.waiting) {
    f->clock = clocks.acquire(f->clock, last_clock);
    if (f != current) make_ready(f);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  ++barrier.turn;
  barrier.clock = clocks.zero();
  ++progress;
}

void nothing(Gather&) {}

}  // namespace

void reset_cluster() {
  barrier.arrived = barrier.turn = 0;
  barrier.waiting.clear();
  barrier.turns.assign(launch.cluster * launch.block.x * launch.block.y * launch.block.z, 0);
  barrier.waits = barrier.turns;
  barrier.clock = clocks.zero();
  last_clock = nullptr;
  hungry.clear();
}

void cluster_exits() { complete_if_due(); }

// Blocks of a cluster run at the same time, but nothing says when each begins: only who has heard of one of its threads, by the
// cluster's barrier or an mbarrier, knows that it has.
void must_have_started(u32 rank, const char* verb, Pc pc) {
  if (rank == current->block->rank) return;
  for (const Fibre* f : blocks[rank].fibres) {
    if (current->clock->of[f->id] != 0) return;
  }
  fail_here(
      pc, format("%s block %u of the cluster, which may not have started yet: no barrier of the cluster came before", verb, rank));
}

u32 cluster_rank() { return current->block->rank; }
u32 cluster_size() { return launch.cluster; }

void cluster_arrive() {
  const Pc pc = CALLER;
  gather("cluster_arrive", ~0u, true, nothing, nullptr, pc);
  if (barrier.turns[current->id] > barrier.waits[current->id]) fail_here(pc, "cluster_arrive twice without cluster_wait");
  ++barrier.turns[current->id];
  ++barrier.arrived;
  clocks.join(barrier.clock, current->clock, current->id, current->own);
  ++current->own;
  complete_if_due();
}

void cluster_wait() {
  const Pc pc = CALLER;
  gather("cluster_wait", ~0u, true, nothing, nullptr, pc);
  const u32 turns = barrier.turns[current->id];
  if (turns == barrier.waits[current->id]) fail_here(pc, "cluster_wait without cluster_arrive");
  ++barrier.waits[current->id];
  if (turns > barrier.turn) {
    barrier.waiting.push_back(current);
    wait("cluster_wait", pc);
  } else {
    current->clock = clocks.acquire(current->clock, last_clock);
  }
}

namespace {

u8* in_block(const void* p, u32 rank, const char* verb, Pc pc) {
  const u32 at = shared_offset(p, 4, 4, verb, pc);
  if (rank >= launch.cluster) fail_here(pc, format("%s block %u of a cluster of %u", verb, rank, launch.cluster));
  return arena + at % kWindow + u64{rank} * kWindow;
}

}  // namespace

u32 cluster_address(const void* p, u32 rank) {
  const u8* there = in_block(p, rank, "cluster_address in", CALLER);
  return static_cast<u32>((there - arena) % kWindow) | (rank + 1) << 24;
}

float load_cluster(const void* p, u32 rank) {
  const Pc pc = CALLER;
  const u8* there = in_block(p, rank, "load_cluster from", pc);
  shared_read(there - arena, 4, pc);
  must_have_started(rank, "load_cluster from", pc);
  float x;
  std::memcpy(&x, there, 4);
  return x;
}

void store_cluster(void* p, u32 rank, float x) {
  const Pc pc = CALLER;
  u8* there = in_block(p, rank, "store_cluster to", pc);
  shared_write(there - arena, 4, pc);
  must_have_started(rank, "store_cluster to", pc);
  std::memcpy(there, &x, 4);
}

// ---- fence.proxy.async: what the thread wrote until now, whoever sees a later clock of it sees fenced

void fence_async() {
  Fibre& f = *current;
  f.fences.push_back(f.own);
  ++f.own;
  barriers_are_fenced(&f);
}

// ---- setmaxnreg: a block gets the registers that its launch bounds give to each thread, and these are its pool

namespace {

u32 taken(const Block& b) {
  u32 n = 0;
  for (const Warp& w : b.warps) n += w.registers;
  return n;
}

// All warps of a warpgroup must execute the same instructions.
void note_change(Block& b, Warp& w, Pc pc) {
  const u32 me = current->warp, first = me / 4 * 4;
  if (b.warps.size() % 4 != 0) fail_here(pc, "setmaxnreg needs warpgroups of 4 warps");
  const size_t number = w.changes.size();
  w.changes.push_back(pc);
  for (u32 i = first; i < first + 4; ++i) {
    const auto& other = b.warps[i].changes;
    if (other.size() > number && !same_site(other[number], pc)) {
      fail_here(pc, "the warps of a warpgroup change their registers at different places, another one at " + site(other[number]));
    }
  }
}

}  // namespace

void registers_at_exit() {
  const Block& b = *current->block;
  if (b.live > 1) return;
  for (u32 w = 0; w < b.warps.size(); ++w) {
    for (u32 i = w / 4 * 4; i < w; ++i) {
      const auto& more = b.warps[i].changes.size() > b.warps[w].changes.size() ? b.warps[i] : b.warps[w];
      if (b.warps[i].changes.size() != b.warps[w].changes.size()) {
        fail_here(more.changes.back(), format("warps %u and %u of a warpgroup do not change their registers equally often", i, w));
      }
    }
  }
}

namespace {

// By one lane of the warp.
void change(u32 count, bool raise, Pc pc) {
  Block& b = *current->block;
  Warp& w = b.warps[current->warp];
  note_change(b, w, pc);
  if (!raise) {
    if (count > w.registers) fail_here(pc, format("registers_lower to %u, where the warp has %u", count, w.registers));
    w.registers = count;
    for (Fibre* f : hungry) make_ready(f);
    hungry.clear();
    ++progress;
    return;
  }
  // At first a thread may have fewer than its bounds allow, down to what is raised to: that is up to ptxas.
  if (count < w.registers && w.changes.size() > 1) {
    fail_here(pc, format("registers_raise to %u, where the warp has %u", count, w.registers));
  }
  const u32 pool = launch.registers * static_cast<u32>(b.warps.size());
  while (count > w.registers && taken(b) + count - w.registers > pool) {
    hungry.push_back(current);
    wait("registers_raise (the block's registers are taken)", pc);
  }
  if (count > w.registers) w.registers = count;
}

}  // namespace

void registers_change(u32 count, bool raise) {
  const Pc pc = CALLER;
  const char* verb = raise ? "registers_raise" : "registers_lower";
  gather(verb, ~0u, true, nothing, nullptr, pc);
  if (current->lane == 0) change(count, raise, pc);
  gather(verb, ~0u, true, nothing, nullptr, pc);
}

}  // namespace emulator
