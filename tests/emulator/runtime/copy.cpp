// cp.async: a copy lands when the thread that issued it waits for its group. Until then the destination may not be
// touched by anybody.
#include <cstring>

#include "async.h"
#include "device.h"
#include "memory.h"

namespace emulator {

void copy_async(void* to, const void* from, u32 bytes, bool valid) {
  const Pc pc = CALLER;
  const u32 at = shared_offset(to, bytes, bytes, "cp.async writes", pc);
  shared_write(at, bytes, pc);
  if (valid) {
    if (reinterpret_cast<u64>(from) % bytes != 0) misaligned(from, bytes, bytes, "cp.async reads", pc);
    global_access(from, bytes, Access::kRead, pc);
  }
  std::memset(arena + at, 0xff, bytes);
  std::memset(cells.state + at, kLanding, bytes);
  current->copies.push_back({at, bytes, valid ? from : nullptr});
}

void copy_commit() { current->groups.push_back(static_cast<u32>(current->copies.size())); }

namespace {

void land(Fibre& f, u32 groups) {
  const u32 count = f.groups[groups - 1];
  for (u32 i = 0; i < count; ++i) {
    const Copy& c = f.copies[i];
    if (c.from != nullptr) {
      std::memcpy(arena + c.to, c.from, c.bytes);
    } else {
      std::memset(arena + c.to, 0, c.bytes);
    }
    std::memset(cells.state + c.to, kWritten, c.bytes);
    for (u32 j = 0; j < c.bytes; ++j) cells.writer[c.to + j] = f.epoch();
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + count);
  f.groups.erase(f.groups.begin(), f.groups.begin() + groups);
  for (u32& end : f.groups) end -= count;
}

}  // namespace

void copy_wait(u32 pending) {
  const u32 groups = static_cast<u32>(current->groups.size());
  if (groups > pending) land(*current, groups - pending);
}

void copies_land_at_exit(Fibre& f) {
  if (f.copies.empty()) return;
  f.groups.push_back(static_cast<u32>(f.copies.size()));
  land(f, static_cast<u32>(f.groups.size()));
}

}  // namespace emulator
