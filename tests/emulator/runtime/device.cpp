// The functions of device.h that concern one thread.
#include "device.h"

#include <cstring>
#include <map>

#include "async.h"
#include "memory.h"

namespace emulator {

Vector3 thread_index() {
  const u32 t = current->thread, x = launch.block.x, y = launch.block.y;
  return {t % x, t / x % y, t / x / y};
}
Vector3 block_index() { return {current->block->index.x, current->block->index.y, current->block->index.z}; }
Vector3 block_size() { return {launch.block.x, launch.block.y, launch.block.z}; }
Vector3 grid_size() { return {launch.grid.x, launch.grid.y, launch.grid.z}; }
u8* shared_memory() { return current->block->shared; }

// As the hardware numbers them: from the start of the block's window; other blocks of the cluster follow at 2^24.
u32 shared_address(const void* p) {
  const u64 offset = static_cast<const u8*>(p) - arena;
  if (offset >= kShared) fail_here(CALLER, format("the address %p is not one of shared memory", p));
  const u32 rank = static_cast<u32>(offset / kWindow);
  return static_cast<u32>(offset % kWindow) | (rank != current->block->rank ? (rank + 1) << 24 : 0);
}

// A thread that polls can always go on: laggards run and operations land all the same.
static void let_others() {
  end_lag();
  land_something();
}
void sleep() {
  let_others();
  yield();
}
void trap() { fail_here(CALLER, "__trap"); }
void broken_rule() { fail_here(CALLER, "an argument that the hardware does not take"); }

namespace {

Words load(const void* p, bool shared, Pc pc) {
  if (reinterpret_cast<u64>(p) % 16 != 0) misaligned(p, 16, 16, "reads", pc);
  if (shared) {
    shared_read(shared_offset(p, 16, 16, "ld.shared reads", pc), 16, pc);
  } else {
    constant_read(p, 16, pc);
  }
  Words x;
  std::memcpy(&x, p, 16);
  return x;
}

void store(void* p, Words x, bool shared, Pc pc) {
  if (reinterpret_cast<u64>(p) % 16 != 0) misaligned(p, 16, 16, "writes", pc);
  if (shared) {
    shared_write(shared_offset(p, 16, 16, "st.shared writes", pc), 16, pc);
  } else {
    global_access(p, 16, Access::kWrite, pc);
  }
  std::memcpy(p, &x, 16);
}

}  // namespace

Words load_global(const void* p) { return load(p, false, CALLER); }
void store_global(void* p, Words x) { store(p, x, false, CALLER); }
Words load_shared(const void* p) { return load(p, true, CALLER); }
void store_shared(void* p, Words x) { store(p, x, true, CALLER); }

// ---- atomic operations

namespace {

// Integer atomics carry order (flags, counters): each takes over what the earlier ones at that address had seen. Sums of
// floats are only sums.
struct Location {
  Clock* clock;  // of the cluster that came last
  std::vector<bool> blocks;
  u32 cluster;
};
std::map<const void*, Location> locations;

void order_by(const void* p, bool acquires, bool releases) {
  Location& l = locations[p];
  Fibre& f = *current;
  const u32 cluster = f.block->linear - f.block->rank;
  const u32 count = launch.grid.x * launch.grid.y * launch.grid.z;
  const bool known = l.clock != nullptr && l.cluster == cluster;
  if (acquires && known) f.clock = clocks.acquire(f.clock, l.clock);
  if (releases) {
    Clock* next = clocks.copy(known ? l.clock : f.clock);
    clocks.join(next, f.clock, f.id, f.own);
    if (known) clocks.drop(l.clock);
    l.clock = next;
    l.cluster = cluster;
    ++f.own;
  }
  if (static_cast<const u8*>(p) >= arena && static_cast<const u8*>(p) < arena + kShared) return;
  if (ordered_after.empty()) ordered_after.resize(count);
  auto& mine = ordered_after[f.block->linear];
  mine.resize(count);
  l.blocks.resize(count);
  for (u32 i = 0; i < count && acquires; ++i) mine[i] = mine[i] || l.blocks[i];
  for (u32 i = 0; i < count && releases; ++i) l.blocks[i] = l.blocks[i] || mine[i] || i == f.block->linear;
}

void check_atomic(const void* p, u32 bytes, bool acquires, bool releases, Pc pc) {
  if (reinterpret_cast<u64>(p) % bytes != 0) misaligned(p, bytes, bytes, "atomically changes", pc);
  if (acquires || releases) order_by(p, acquires, releases);
  const u64 offset = static_cast<const u8*>(p) - arena;
  if (offset < kShared) {
    shared_atomic(offset, bytes, pc);
  } else {
    global_access(p, bytes, Access::kAtomic, pc);
  }
}

template <class T, class Signed>
T change(void* p, AtomicOp op, T value, T compare) {
  T old;
  std::memcpy(&old, p, sizeof(T));
  T next = old;
  if (op == kAdd) next = old + value;
  if (op == kMin) next = value < old ? value : old;
  if (op == kMax) next = value > old ? value : old;
  if (op == kExchange) next = value;
  if (op == kCompare) next = old == compare ? value : old;
  if (op == kAnd) next = old & value;
  if (op == kOr) next = old | value;
  if (op == kXor) next = old ^ value;
  if (op == kMinSigned) next = static_cast<Signed>(value) < static_cast<Signed>(old) ? value : old;
  if (op == kMaxSigned) next = static_cast<Signed>(value) > static_cast<Signed>(old) ? value : old;
  std::memcpy(p, &next, sizeof(T));
  return old;
}

}  // namespace

void reset_atomics() { locations.clear(); }

namespace {

// Other threads may run in between; one that polls gives them no other chance.
void take_turns(Pc pc) {
  maybe_yield();
  if (++spins % 256 == 0) let_others();
  if (spins > 1'000'000) {
    fail_here(pc, "livelock: 1 million atomic operations, and no thread had to wait or came to its end");
  }
}

}  // namespace

// The order of atomic operations is what the seed makes it.
u32 atomic_u32(void* p, AtomicOp op, u32 value, u32 compare) {
  const Pc pc = CALLER;
  take_turns(pc);
  check_atomic(p, 4, true, true, pc);
  ++progress;
  return change<u32, int>(p, op, value, compare);
}

u64 atomic_u64(void* p, AtomicOp op, u64 value, u64 compare) {
  const Pc pc = CALLER;
  take_turns(pc);
  check_atomic(p, 8, true, true, pc);
  ++progress;
  return change<u64, i64>(p, op, value, compare);
}

u32 load_acquire(const void* p) {
  const Pc pc = CALLER;
  take_turns(pc);
  check_atomic(p, 4, true, false, pc);
  u32 x;
  std::memcpy(&x, p, 4);
  return x;
}

void add_release(void* p, u32 value) {
  const Pc pc = CALLER;
  take_turns(pc);
  check_atomic(p, 4, false, true, pc);
  ++progress;
  change<u32, int>(p, kAdd, value, 0);
}

float atomic_f32(void* p, float value) {
  const Pc pc = CALLER;
  take_turns(pc);
  check_atomic(p, 4, false, false, pc);
  float old;
  std::memcpy(&old, p, 4);
  const float next = old + value;
  std::memcpy(p, &next, 4);
  return old;
}

}  // namespace emulator
