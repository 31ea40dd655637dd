// The block's barriers: bar.sync and bar.arrive, __syncthreads among them.
#include "device.h"
#include "memory.h"

namespace emulator {
namespace {

void open(Barrier& b, Block& block) {
  b.expected = b.arrived = 0;
  b.sum = 0, b.all = 1, b.any = 0;
  b.waiting.clear();
  b.warp_pc.assign(block.warps.size(), 0);
  b.lanes.assign(block.warps.size(), 0);
  b.clock = clocks.zero();
}

bool complete(const Barrier& b, const Block& block) {
  return b.arrived > 0 && b.arrived >= (b.expected != 0 ? b.expected : block.live);
}

void release(Barrier& b, Block& block) {
  block.reduced[0] = b.sum, block.reduced[1] = b.all, block.reduced[2] = b.any;
  for (Fibre* f : b.waiting) {
    f->clock = clocks.acquire(f->clock, b.clock);
    if (f != current) make_ready(f);
  }
  clocks.drop(b.clock);
  open(b, block);
  ++progress;
}

// Whether the barrier let everyone pass.
bool arrive(Barrier& b, u32 id, u32 count, Pc pc) {
  Block& block = *current->block;
  if (b.arrived > 0 && b.expected != count) {
    fail_here(pc, format("arrives at barrier %u for %u threads, where others came at ", id, count) + site(b.pc) +
                      format(" for %u", b.expected));
  }
  if (count > block.fibres.size() || count % 32 != 0) {
    fail_here(pc, format("barrier %u for %u threads; the count must be a multiple of 32 and at most the block's %u", id, count,
                         static_cast<u32>(block.fibres.size())));
  }
  Pc& before = b.warp_pc[current->warp];
  if (before != 0 && !same_site(before, pc)) {
    fail_here(pc, format("divergent: lanes of one warp reach barrier %u at different places, others at ", id) + site(before));
  }
  u32& lanes = b.lanes[current->warp];
  if (lanes & 1u << current->lane) fail_here(pc, format("arrives at barrier %u a second time in one phase", id));
  lanes |= 1u << current->lane;
  before = b.pc = pc;
  b.expected = count;
  ++b.arrived;
  clocks.join(b.clock, current->clock, current->id, current->own);
  ++current->own;
  if (!complete(b, block)) return false;
  for (u32 w = 0; w < block.warps.size(); ++w) {
    if (b.lanes[w] != 0 && (b.lanes[w] | block.warps[w].exited) != block.warps[w].existing) {
      fail_here(pc, format("divergent: only lanes 0x%08x of warp %u take part in barrier %u", b.lanes[w], w, id));
    }
  }
  return true;
}

const char* const kNames[] = {"__syncthreads", "a named barrier"};

void sync(u32 id, u32 count, Pc pc) {
  Block& block = *current->block;
  Barrier& b = block.barriers[id];
  const bool last = arrive(b, id, count, pc);
  b.waiting.push_back(current);
  if (last) {
    release(b, block);
    maybe_yield();
  } else {
    wait(kNames[id != 0 || count != 0], pc, id);
  }
}

}  // namespace

void start_barriers(Block& block) {
  for (Barrier& b : block.barriers) open(b, block);
}

// A barrier without a count waits only for threads that still run.
void thread_exits(Fibre* f) {
  Barrier& b = f->block->barriers[0];
  if (b.expected == 0 && complete(b, *f->block)) release(b, *f->block);
}

void syncthreads() { sync(0, 0, CALLER); }

int syncthreads_reduce(u32 kind, int predicate) {
  Barrier& b = current->block->barriers[0];
  b.sum += predicate != 0;
  b.all &= predicate != 0;
  b.any |= predicate != 0;
  sync(0, 0, CALLER);
  return current->block->reduced[kind];
}

namespace {
void check_id(u32 id, Pc pc) {
  if (id >= 16) fail_here(pc, format("barrier %u; a block has barriers 0 to 15", id));
}
}  // namespace

void barrier_sync(u32 id, u32 threads) {
  const Pc pc = CALLER;
  check_id(id, pc);
  sync(id, threads, pc);
}

void barrier_arrive(u32 id, u32 threads) {
  const Pc pc = CALLER;
  check_id(id, pc);
  Block& block = *current->block;
  if (arrive(block.barriers[id], id, threads, pc)) release(block.barriers[id], block);
}

}  // namespace emulator
