// mbarriers: phases that complete when the arrivals and the bytes they await have come.
#include <cstring>
#include <map>

#include "async.h"
#include "device.h"
#include "memory.h"

namespace emulator {
namespace {

std::map<u64, Mbarrier> barriers;  // by offset in the arena

std::string state_of(const Mbarrier& b) {
  return format(" (phase %u, parity %u, awaits %u of %u arrivals and %lld bytes)", b.phase, b.phase & 1, b.pending, b.count,
                b.bytes);
}

u32 offset_of(const void* p, const char* verb, Pc pc) { return shared_offset(p, 8, 8, verb, pc); }

void complete_if_due(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  if (b.done != nullptr) clocks.drop(b.done);
  b.done = b.clock;
  b.done->of[b.engine] = b.phase;  // the operations of phase p have epoch p + 1
  b.clock = clocks.zero();
  ++progress;
  auto waiters = std::move(b.waiters);
  b.waiters.clear();
  for (const auto& w : waiters) {
    if ((b.phase & 1) != w.parity) {
      make_ready(w.fibre);
    } else {
      b.waiters.push_back(w);
    }
  }
}

void arrive_at(u64 offset, const char* verb, Pc pc) {
  Mbarrier& b = mbarrier_at(offset, verb, pc);
  if (b.pending == 0) {
    fail_here(pc, format("%s, but all %u arrivals of phase %u have come already", verb, b.count, b.phase) + state_of(b));
  }
  --b.pending;
  clocks.join(b.clock, current->clock, current->id, current->own);
  ++current->own;
  complete_if_due(b);
  maybe_yield();
}

void expect_at(u64 offset, u32 bytes, const char* verb, Pc pc) {
  Mbarrier& b = mbarrier_at(offset, verb, pc);
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) fail_here(pc, format("%s: %lld bytes pending, 2^20 or more", verb, b.bytes));
}

}  // namespace

void reset_mbarriers() { barriers.clear(); }

Mbarrier& mbarrier_at(u64 offset, const char* verb, Pc pc) {
  const auto found = barriers.find(offset);
  if (found == barriers.end()) fail_here(pc, format("%s at ", verb) + place(offset) + ", where no mbarrier was initialised");
  if (current != nullptr && !happened(cells.writer[offset])) {
    fail_here(pc, format("%s at ", verb) + place(offset) + ", which another thread initialised at " + site(found->second.pc) +
                      "; no barrier orders the two");
  }
  return found->second;
}

void bytes_arrive(u64 offset, u32 bytes, u32 phase, Pc pc) {
  Mbarrier& b = barriers.at(offset);
  if (b.phase != phase) {
    fail(block_name(blocks[offset / kWindow]) + format(": wrong transaction count: phase %u of the mbarrier at ", phase) +
         place(offset) + " completed before the copy that counts to it\n  at " + site(pc));
  }
  b.bytes -= bytes;
  complete_if_due(b);
}

void barriers_are_fenced(Fibre* maker) {
  for (auto& [offset, b] : barriers) {
    if (b.maker == maker) b.fenced = true;
  }
}

bool release_polls() {
  bool any = false;
  for (auto& [offset, b] : barriers) {
    auto waiters = std::move(b.waiters);
    b.waiters.clear();
    for (const auto& w : waiters) {
      if (w.soft && w.fibre->polls != progress) {
        w.fibre->polls = static_cast<u32>(progress);
        make_ready(w.fibre);
        any = true;
      } else {
        b.waiters.push_back(w);
      }
    }
  }
  return any;
}

std::string waiting_detail(const Fibre& f) {
  for (const auto& [offset, b] : barriers) {
    for (const auto& w : b.waiters) {
      if (w.fibre == &f) return format(" for parity %u of ", w.parity) + place(offset) + state_of(b);
    }
  }
  if (f.waits_for == nullptr || std::strcmp(f.waits_for, "a named barrier") != 0) return "";
  const Barrier& b = f.block->barriers[f.waits_detail];
  return format(" %u (%u of %u threads are there)", f.waits_detail, b.arrived, b.expected);
}

// ---- verbs

void mbarrier_init(void* p, u32 arrivals) {
  const Pc pc = CALLER;
  const u32 at = offset_of(p, "mbarrier_init", pc);
  if (arrivals == 0 || arrivals >= 1 << 20) fail_here(pc, format("mbarrier_init for %u arrivals", arrivals));
  if (barriers.count(at) != 0) fail_here(pc, "mbarrier_init of an mbarrier, made at " + site(barriers[at].pc));
  shared_write(at, 8, pc);
  std::memset(cells.state + at, kWritten | kMbarrier, 8);
  Mbarrier& b = barriers[at];
  b.engine = new_engine("a bulk load", pc);
  b.count = b.pending = arrivals;
  b.bytes = 0;
  b.phase = 0;
  b.fenced = false;
  b.maker = current;
  b.pc = pc;
  b.clock = clocks.zero();
  b.done = nullptr;
}

void fence_barrier_init() { barriers_are_fenced(current); }

void mbarrier_arrive(void* p) {
  const Pc pc = CALLER;
  arrive_at(offset_of(p, "mbarrier_arrive", pc), "mbarrier_arrive", pc);
}
void mbarrier_arrive_expect(void* p, u32 bytes) {
  const Pc pc = CALLER;
  const u32 at = offset_of(p, "mbarrier_arrive_expect", pc);
  expect_at(at, bytes, "mbarrier_arrive_expect", pc);
  arrive_at(at, "mbarrier_arrive_expect", pc);
}
void mbarrier_expect(void* p, u32 bytes) {
  const Pc pc = CALLER;
  expect_at(offset_of(p, "mbarrier_expect", pc), bytes, "mbarrier_expect", pc);
}
void mbarrier_arrive_remote(void* p, u32 rank) {
  const Pc pc = CALLER;
  const u32 at = offset_of(p, "mbarrier_arrive_remote", pc);
  if (rank >= launch.cluster) fail_here(pc, format("mbarrier_arrive_remote at block %u of a cluster of %u", rank, launch.cluster));
  if (blocks[rank].live == 0) fail_here(pc, format("mbarrier_arrive_remote at block %u of the cluster, which has ended", rank));
  must_have_started(rank, "mbarrier_arrive_remote at", pc);
  arrive_at(at % kWindow + u64{rank} * kWindow, "mbarrier_arrive_remote", pc);
}

namespace {

bool wait_at(void* p, u32 parity, bool soft, const char* verb, Pc pc) {
  const u32 at = offset_of(p, verb, pc);
  if (parity > 1) fail_here(pc, format("%s with parity %u", verb, parity));
  Mbarrier& b = mbarrier_at(at, verb, pc);
  if ((b.phase & 1) == parity) {
    const u32 phase = b.phase;
    b.waiters.push_back({current, parity, soft});
    wait(verb, pc);
    if (b.phase == phase) return false;
    if (b.phase > phase + 1) {
      fail_here(pc,
                format("%s for phase %u, while the barrier ran a full turn to phase %u: the hardware may miss the phase and wait "
                       "for ever",
                       verb, phase, b.phase));
    }
  }
  if (b.done != nullptr) current->clock = clocks.acquire(current->clock, b.done);
  return true;
}

}  // namespace

bool mbarrier_try_wait(void* p, u32 parity) { return wait_at(p, parity, true, "mbarrier_try_wait", CALLER); }
void mbarrier_wait(void* p, u32 parity) { wait_at(p, parity, false, "mbarrier_wait", CALLER); }

}  // namespace emulator
