// Instructions that the lanes of a warp execute together: they gather, and the last one to come does the work for all.
#include "warp.h"

#include <cstring>

#include "device.h"
#include "memory.h"

namespace emulator {
namespace {

Warp& warp_of(Fibre* f) { return f->block->warps[f->warp]; }

void disperse(Gather& g) {
  for (Fibre* f : g.lanes) {
    if (f != nullptr && f != current) make_ready(f);
  }
  g.verb = nullptr;
  ++progress;
}

std::string lanes(u32 mask) { return format("lanes 0x%08x", mask); }

// A lane can never meet the others when they wait for it somewhere else.
[[noreturn]] void divergent(const Gather& g, const char* verb, u32 mask, Pc pc) {
  std::string other = format("%s of mask 0x%08x at ", g.verb, g.mask) + site(g.pc);
  fail_here(pc, format("divergent: reaches %s of mask 0x%08x while ", verb, mask) + lanes(g.arrived) +
                    " of its warp wait for it in " + other);
}

}  // namespace

void gather(const char* verb, u32 mask, bool aligned, void (*finish)(Gather&), void* slot, Pc pc) {
  Warp& w = warp_of(current);
  const u32 me = 1u << current->lane;
  if (!(mask & me)) fail_here(pc, format("%s with mask 0x%08x, which lacks the calling lane", verb, mask));
  if (aligned && (w.exited || w.existing != ~0u)) {
    fail_here(pc, format("%s needs all 32 lanes, but ", verb) + lanes(w.exited | ~w.existing) + " have exited or do not exist");
  }
  Gather *mine = nullptr, *unused = nullptr;
  for (Gather& g : w.gathers) {
    if (g.verb == nullptr) {
      unused = &g;
    } else if (g.mask & me) {
      // The name is a literal, but each file may have its own copy of it.
      const bool same = std::strcmp(g.verb, verb) == 0 && g.mask == mask && same_site(g.pc, pc);
      if (same) {
        mine = &g;
      } else if (g.arrived & mask) {
        divergent(g, verb, mask, pc);
      }
    }
  }
  if (mine == nullptr) {
    if (unused == nullptr) fail_here(pc, "more than four groups of lanes of one warp wait at the same time");
    mine = unused;
    *mine = Gather{};
    mine->verb = verb, mine->finish = finish, mine->mask = mask, mine->pc = pc, mine->aligned = aligned;
  }
  mine->lanes[current->lane] = current;
  mine->slots[current->lane] = slot;
  mine->arrived |= me;
  if ((mine->arrived | w.exited | ~w.existing) == ~0u || (mine->mask & ~(mine->arrived | w.exited | ~w.existing)) == 0) {
    finish(*mine);
    disperse(*mine);
    maybe_yield();
  } else {
    wait(verb, pc);
  }
}

void lane_exits(Fibre* f) {
  Warp& w = warp_of(f);
  w.exited |= 1u << f->lane;
  for (Gather& g : w.gathers) {
    if (g.verb == nullptr || !(g.mask & 1u << f->lane)) continue;
    if (g.aligned) {
      const Index& b = f->block->index;
      fail(format("block (%u, %u, %u), ", b.x, b.y, b.z) + name_of(*f) + " exits while " + lanes(g.arrived) +
           " of its warp wait for it in " + g.verb + "\n  at " + site(g.pc));
    }
    if ((g.mask & ~(g.arrived | w.exited | ~w.existing)) == 0) {
      g.finish(g);
      disperse(g);
    }
  }
}

namespace {

// ---- __syncwarp

void order_lanes(Gather& g) {
  Clock* joined = nullptr;
  const Clock* base = nullptr;
  for (Fibre* f : g.lanes) {
    if (f == nullptr) continue;
    if (joined == nullptr) joined = clocks.copy(f->clock), base = f->clock;
    if (f->clock != base) clocks.join(joined, f->clock, f->id, f->own);
    joined->of[f->id] = f->own;
  }
  for (Fibre* f : g.lanes) {
    if (f == nullptr) continue;
    clocks.drop(f->clock);
    Clocks::share(f->clock = joined);
    ++f->own;
  }
  clocks.drop(joined);
}

// ---- shuffles and votes

struct Shuffle {
  u64 value;
  u32 kind, lane, width;
  Pc pc;
};

void exchange(Gather& g) {
  u64 result[32];
  for (u32 l = 0; l < 32; ++l) {
    if (g.lanes[l] == nullptr) continue;
    const Shuffle& s = *static_cast<Shuffle*>(g.slots[l]);
    const u32 segment = l & ~(s.width - 1), end = segment + s.width;
    u32 from = l;
    if (s.kind == kShuffle) from = segment + (s.lane & (s.width - 1));
    if (s.kind == kShuffleUp) from = l - segment >= s.lane ? l - s.lane : l;
    if (s.kind == kShuffleDown) from = l + s.lane < end ? l + s.lane : l;
    if (s.kind == kShuffleXor) from = (l ^ s.lane) < end ? l ^ s.lane : l;
    if (g.lanes[from] == nullptr) {
      fail_here(g.pc, format("lane %u shuffles from lane %u, which does not take part", l, from));
    }
    result[l] = static_cast<Shuffle*>(g.slots[from])->value;
  }
  for (u32 l = 0; l < 32; ++l) {
    if (g.lanes[l] != nullptr) static_cast<Shuffle*>(g.slots[l])->value = result[l];
  }
}

void ballot(Gather& g) {
  u32 bits = 0;
  for (u32 l = 0; l < 32; ++l) {
    if (g.lanes[l] != nullptr && *static_cast<u64*>(g.slots[l]) != 0) bits |= 1u << l;
  }
  for (u32 l = 0; l < 32; ++l) {
    if (g.lanes[l] != nullptr) *static_cast<u64*>(g.slots[l]) = u64{g.arrived} << 32 | bits;
  }
}

void match(Gather& g) {
  u64 result[32];
  for (u32 l = 0; l < 32; ++l) {
    result[l] = 0;
    for (u32 other = 0; other < 32; ++other) {
      if (g.lanes[l] != nullptr && g.lanes[other] != nullptr &&
          *static_cast<u64*>(g.slots[l]) == *static_cast<u64*>(g.slots[other])) {
        result[l] |= 1u << other;
      }
    }
  }
  for (u32 l = 0; l < 32; ++l) {
    if (g.lanes[l] != nullptr) *static_cast<u64*>(g.slots[l]) = result[l];
  }
}

}  // namespace

void syncwarp(u32 mask) { gather("__syncwarp", mask, false, order_lanes, nullptr, CALLER); }

u64 shuffle(u32 mask, u64 value, u32 kind, u32 lane, u32 width) {
  const Pc pc = CALLER;
  if (width == 0 || width > 32 || (width & (width - 1))) fail_here(pc, format("a shuffle of width %u", width));
  static const char* const kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  Shuffle s{value, kind, lane, width, pc};
  gather(kNames[kind], mask, false, exchange, &s, pc);
  return s.value;
}

u64 vote(u32 mask, bool predicate) {
  u64 value = predicate;
  gather("a vote", mask, false, ballot, &value, CALLER);
  return value;
}

u32 match_any(u32 mask, u64 value) {
  gather("__match_any_sync", mask, false, match, &value, CALLER);
  return static_cast<u32>(value);
}

u32 active_lanes() {
  const Warp& w = warp_of(current);
  return w.existing & ~w.exited;
}

}  // namespace emulator
