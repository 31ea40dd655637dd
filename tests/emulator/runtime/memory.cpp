#include "memory.h"

#include <algorithm>
#include <cstring>

#include "async.h"

namespace emulator {

Cells cells;
std::vector<Range> ranges;
std::vector<std::vector<bool>> ordered_after;

std::string place(u64 offset) {
  const u32 rank = static_cast<u32>(offset / kWindow), at = static_cast<u32>(offset % kWindow) - kReserved;
  const std::string where = format("shared memory at byte %u (0x%x)", at, at);
  return launch.cluster == 1 ? where : where + format(" of block %u of the cluster", rank);
}

namespace {

typedef u32 u32x16 __attribute__((vector_size(64), aligned(4)));

// Whether the accesses at that epoch happen before what the running thread does now.
inline bool ordered(u32 epoch) {
  const u32 id = epoch >> kClockBits;
  return epoch == 0 || id == current->id || (epoch & kClockMask) <= current->clock->of[id];
}

std::string by(u32 epoch, Pc pc) {
  const u32 id = epoch >> kClockBits, threads = static_cast<u32>(blocks[0].fibres.size());
  if (id >= threads * launch.cluster) return engine_name(id) + " at " + site(pc);
  return name_of(*blocks[id / threads].fibres[id % threads]) + " at " + site(pc);
}

[[noreturn]] void race(const std::string& mine, const char* theirs, u64 offset, u32 epoch, Pc before, Pc pc) {
  fail_here(pc, format("race: %s %s, which ", mine.c_str(), place(offset).c_str()) + by(epoch, before) + " " + theirs +
                    "; no barrier orders the two");
}

[[noreturn]] void bad_state(const char* verb, u64 offset, u32 bytes, Pc pc) {
  for (u32 i = 0; i < bytes; ++i) {
    const u8 state = cells.state[offset + i];
    const std::string here = std::string(verb) + " " + place(offset + i);
    if (state & kMbarrier) fail_here(pc, here + ", where an mbarrier lies");
    if (state & kLanding) {
      fail_here(pc, here + " while an asynchronous copy into it is under way, issued by " +
                        by(cells.writer[offset + i], cells.writer_pc[offset + i]));
    }
    if (!(state & kWritten)) fail_here(pc, here + ", which was never written");
  }
  fail_here(pc, std::string(verb) + " " + place(offset) + " in a state that forbids it");
}

// The reader's slot that the running thread takes, or -1 where it is noted already.
inline int slot_for(const u32 (&readers)[kReaders], u32 me) {
  int best = -1;
  for (int k = 0; k < kReaders; ++k) {
    if (readers[k] == me) return -1;
    if (best < 0 && ordered(readers[k])) best = k;
  }
  return best >= 0 ? best : static_cast<int>(random_number() % kReaders);
}

inline void read_cells(u64 offset, u32 bytes, Pc pc) {
  const u32 me = current->epoch();
  for (u32 i = 0; i < bytes;) {
    const u64 at = offset + i;
    const u32 w = cells.writer[at];
    u32 readers[kReaders];
    for (int k = 0; k < kReaders; ++k) readers[k] = cells.reader[k][at];
    u32 same = 1;
    while (i + same < bytes && cells.writer[at + same] == w && cells.reader[0][at + same] == readers[0] &&
           cells.reader[1][at + same] == readers[1] && cells.reader[2][at + same] == readers[2] &&
           cells.reader[3][at + same] == readers[3])
      ++same;
    if (!ordered(w)) race("reads", "wrote", at, w, cells.writer_pc[at], pc);
    const int k = slot_for(readers, me);
    if (k >= 0) {
      for (u32 j = 0; j < same; ++j) cells.reader[k][at + j] = me;
      for (u32 j = 0; j < same; ++j) cells.reader_pc[k][at + j] = pc;
    }
    i += same;
  }
}

// The same for 16 bytes that have one history, which is the rule. False: they have not.
inline bool read_16_cells(u64 at, Pc pc) {
  const u32 me = current->epoch(), w = cells.writer[at];
  u32x16 differ = *reinterpret_cast<u32x16*>(cells.writer + at) ^ w;
  u32 readers[kReaders];
  for (int k = 0; k < kReaders; ++k) {
    readers[k] = cells.reader[k][at];
    differ |= *reinterpret_cast<u32x16*>(cells.reader[k] + at) ^ readers[k];
  }
  u64 any[8];
  std::memcpy(any, &differ, 64);
  if (any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7]) return false;
  if (!ordered(w)) race("reads", "wrote", at, w, cells.writer_pc[at], pc);
  const int k = slot_for(readers, me);
  if (k >= 0) {
    *reinterpret_cast<u32x16*>(cells.reader[k] + at) = u32x16{} + me;
    *reinterpret_cast<u32x16*>(cells.reader_pc[k] + at) = u32x16{} + pc;
  }
  return true;
}

template <bool kIsAtomic>
inline void write_cells(u64 offset, u32 bytes, Pc pc) {
  const u32 me = current->epoch();
  for (u32 i = 0; i < bytes; ++i) {
    const u64 at = offset + i;
    const u32 w = cells.writer[at];
    if (w != me && !(kIsAtomic && (cells.state[at] & kAtomic)) && !ordered(w)) {
      race("writes", "wrote", at, w, cells.writer_pc[at], pc);
    }
    for (int k = 0; k < kReaders; ++k) {
      const u32 r = cells.reader[k][at];
      if (r != 0) {
        if (!ordered(r)) race("writes", "read", at, r, cells.reader_pc[k][at], pc);
        cells.reader[k][at] = 0;
      }
    }
    cells.writer[at] = me;
    cells.writer_pc[at] = pc;
  }
}

void check_window(u64 offset, u32 bytes, const char* verb, Pc pc) {
  const u32 rank = static_cast<u32>(offset / kWindow), at = static_cast<u32>(offset % kWindow);
  const u32 size = launch.shared_bytes;
  if (rank == current->block->rank || (rank < blocks.size() && launch.cluster > 1)) {
    if (at >= kReserved && at - kReserved + bytes <= size) {
      if (blocks[rank].live == 0)
        fail_here(pc, format("%s the shared memory of block %u of the cluster, which has ended", verb, rank));
      return;
    }
    fail_here(pc, format("out of bounds: %s %u bytes at byte %d of shared memory, of which the block has %u", verb, bytes,
                         static_cast<int>(at) - static_cast<int>(kReserved), size));
  }
  fail_here(pc, format("out of bounds: %s %u bytes in the shared memory of a block that is not in its cluster", verb, bytes));
}

// Whether all `bytes` states have the bits of `want` of those in `mask`.
inline bool states_are(u64 offset, u32 bytes, u8 mask, u8 want) {
  if (bytes == 16) {
    u64 x[2];
    std::memcpy(x, cells.state + offset, 16);
    const u64 m = mask * 0x0101010101010101u, v = want * 0x0101010101010101u;
    return (((x[0] & m) ^ v) | ((x[1] & m) ^ v)) == 0;
  }
  for (u32 i = 0; i < bytes; ++i) {
    if ((cells.state[offset + i] & mask) != want) return false;
  }
  return true;
}

}  // namespace

void shared_read(u64 offset, u32 bytes, Pc pc) {
  check_window(offset, bytes, "reads", pc);
  if (!states_are(offset, bytes, kWritten | kLanding | kMbarrier, kWritten)) bad_state("reads", offset, bytes, pc);
  if (bytes == 16 && read_16_cells(offset, pc)) return;
  read_cells(offset, bytes, pc);
}

void shared_write(u64 offset, u32 bytes, Pc pc) {
  check_window(offset, bytes, "writes", pc);
  if (!states_are(offset, bytes, kLanding | kMbarrier, 0)) bad_state("writes", offset, bytes, pc);
  write_cells<false>(offset, bytes, pc);
  std::memset(cells.state + offset, kWritten, bytes);
}

void shared_atomic(u64 offset, u32 bytes, Pc pc) {
  check_window(offset, bytes, "atomically changes", pc);
  if (!states_are(offset, bytes, kWritten | kLanding | kMbarrier, kWritten)) {
    bad_state("atomically changes", offset, bytes, pc);
  }
  write_cells<true>(offset, bytes, pc);
  std::memset(cells.state + offset, kWritten | kAtomic, bytes);
}

bool happened(u32 epoch) { return ordered(epoch); }

namespace {

// Whether the async proxy is behind what a thread read or wrote at that epoch: the thread fenced after it, and a barrier orders the
// fence before the running thread.
bool fenced(u32 epoch) {
  const u32 id = epoch >> kClockBits, threads = static_cast<u32>(blocks[0].fibres.size());
  if (epoch == 0 || id >= threads * launch.cluster) return true;
  const Fibre& writer = *blocks[id / threads].fibres[id % threads];
  const auto fence = std::lower_bound(writer.fences.begin(), writer.fences.end(), epoch & kClockMask);
  if (fence == writer.fences.end()) return false;
  return &writer == current || current->clock->of[id] > *fence;
}

[[noreturn]] void unfenced(const char* verb, u64 at, u32 epoch, Pc before, const char* theirs, Pc pc) {
  fail_here(pc, std::string(verb) + " " + place(at) + ", which " + by(epoch, before) + " " + theirs +
                    "; the asynchronous engine may not see it, fence_async_shared by that thread and then a barrier are missing");
}

}  // namespace

void engine_read(u64 offset, u32 bytes, u32 epoch, const char* verb, Pc pc) {
  check_window(offset, bytes, verb, pc);
  if (!states_are(offset, bytes, kWritten | kLanding | kMbarrier, kWritten)) bad_state(verb, offset, bytes, pc);
  u32 good = 0, last = 0;  // a run of bytes by one writer needs one check
  for (u32 i = 0; i < bytes; ++i) {
    const u64 at = offset + i;
    const u32 w = cells.writer[at];
    if (i == 0 || w != good) {
      if (!ordered(w)) race(verb, "wrote", at, w, cells.writer_pc[at], pc);
      if (!fenced(w)) unfenced(verb, at, w, cells.writer_pc[at], "wrote", pc);
      good = w;
    }
    // An engine's older reads are behind its newer ones; an ordered reader is behind the thread that starts this one.
    u32 slot = last;
    const u32 at_last = cells.reader[last][at];
    if (at_last >> kClockBits != epoch >> kClockBits && !ordered(at_last)) {
      slot = random_number() % kReaders;
      for (int k = 0; k < kReaders; ++k) {
        const u32 r = cells.reader[k][at];
        if (r >> kClockBits == epoch >> kClockBits || ordered(r)) {
          slot = k;
          break;
        }
      }
      last = slot;
    }
    cells.reader[slot][at] = epoch;
    cells.reader_pc[slot][at] = pc;
  }
}

void engine_write(u64 offset, u32 bytes, u32 epoch, const char* verb, Pc pc) {
  check_window(offset, bytes, verb, pc);
  if (!states_are(offset, bytes, kLanding | kMbarrier, 0)) bad_state(verb, offset, bytes, pc);
  for (u32 i = 0; i < bytes; ++i) {
    const u64 at = offset + i;
    const u32 w = cells.writer[at];
    if (!ordered(w)) race(verb, "wrote", at, w, cells.writer_pc[at], pc);
    if (!fenced(w)) unfenced(verb, at, w, cells.writer_pc[at], "wrote", pc);
    for (int k = 0; k < kReaders; ++k) {
      const u32 r = cells.reader[k][at];
      if (r != 0 && !ordered(r)) race(verb, "read", at, r, cells.reader_pc[k][at], pc);
      if (!fenced(r)) unfenced(verb, at, r, cells.reader_pc[k][at], "read", pc);
      cells.reader[k][at] = 0;
    }
    cells.writer[at] = epoch;
    cells.writer_pc[at] = pc;
  }
  std::memset(cells.state + offset, kLanding, bytes);
}

void reset_shared(u32 count, u32 bytes) {
  for (u32 b = 0; b < count; ++b) {
    const u64 at = u64{b} * kWindow + kReserved;
    std::memset(arena + at, 0xff, bytes);  // NaN in every format
    std::memset(cells.state + at, 0, bytes);
    std::memset(cells.writer + at, 0, bytes * sizeof(u32));
    for (auto* reader : cells.reader) std::memset(reader + at, 0, bytes * sizeof(u32));
  }
}

void misaligned(const void* p, u32 bytes, u32 alignment, const char* verb, Pc pc) {
  const u64 offset = static_cast<const u8*>(p) - arena;
  const std::string where = offset < kShared ? place(offset) : format("global address %p", p);
  fail_here(pc, format("misaligned: %s %u bytes at ", verb, bytes) + where + format(", not a multiple of %u", alignment));
}

u32 shared_offset(const void* p, u32 bytes, u32 alignment, const char* verb, Pc pc) {
  const u64 offset = static_cast<const u8*>(p) - arena;
  if (offset >= kShared) fail_here(pc, format("%s needs an address in shared memory, got %p", verb, p));
  check_window(offset, bytes, verb, pc);
  if (offset % alignment != 0) misaligned(p, bytes, alignment, verb, pc);
  return static_cast<u32>(offset);
}

// ---- global memory

namespace {

std::string nearest(u64 at) {
  const Range* best = nullptr;
  u64 distance = ~0ull;
  for (const Range& r : ranges) {
    const u64 d = at < r.begin ? r.begin - at : at >= r.end ? at - r.end : 0;
    if (d < distance) best = &r, distance = d;
  }
  if (best == nullptr || distance > 1u << 30) return format("address 0x%llx, far from every tensor", at);
  if (at < best->begin) return format("%llu bytes before the start of %s", distance, best->name);
  if (at >= best->end) return format("%llu bytes behind the end of %s", distance, best->name);
  return format("byte %llu of %s", at - best->begin, best->name);
}

Range& range_of(u64 at, u32 bytes, const char* verb, Pc pc) {
  static size_t last = 0;
  if (last < ranges.size() && at >= ranges[last].begin && at + bytes <= ranges[last].end) return ranges[last];
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (at >= ranges[i].begin && at + bytes <= ranges[i].end) {
      last = i;
      return ranges[i];
    }
  }
  fail_here(pc, format("out of bounds: %s %u bytes of global memory at %s", verb, bytes, nearest(at).c_str()));
}

const char* verb_of(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "atomically changes";
}

void check_allowed(const Range& r, u64 at, u32 bytes, bool write, Pc pc) {
  const u8 bit = write ? 2 : 1;
  if (bytes == 16) {
    u64 x[2];
    std::memcpy(x, r.allowed + (at - r.begin), 16);
    if ((x[0] & x[1] & bit * 0x0101010101010101u) == bit * 0x0101010101010101u) return;
  }
  for (u32 i = 0; i < bytes; ++i) {
    if (!(r.allowed[at + i - r.begin] & bit)) {
      fail_here(pc, format("out of bounds: %s %u bytes at byte %llu of %s, ", write ? "writes" : "reads", bytes, at + i - r.begin,
                           r.name) +
                        (write ? "which is no element of the tensor" : "outside of the tensor"));
    }
  }
}

// Whether what a thread did, maybe of another block, happens before what the running thread does now.
inline bool globally_ordered(u64 who) {
  if (who == 0) return true;
  const u32 block = static_cast<u32>(who >> 32) & 0x7fffffffu;
  const Block& mine = *current->block;
  // The blocks of a cluster share their clocks.
  if (block - (mine.linear - mine.rank) < launch.cluster) return ordered(static_cast<u32>(who));
  const auto& seen = ordered_after.empty() ? std::vector<bool>() : ordered_after[mine.linear];
  return !seen.empty() && seen[block];
}

[[noreturn]] void global_race(const Range& r, u64 at, const char* mine, const char* theirs, u64 who, Pc before, Pc pc) {
  const u32 block = static_cast<u32>(who >> 32) & 0x7fffffffu;
  const u32 thread = (static_cast<u32>(who) >> kClockBits) % static_cast<u32>(blocks[0].fibres.size());
  const u32 gx = launch.grid.x, gy = launch.grid.y;
  fail_here(pc, format("race: %s byte %llu of %s, which block (%u, %u, %u), thread %u ", mine, at - r.begin, r.name, block % gx,
                       block / gx % gy, block / gx / gy, thread) +
                    theirs + " at " + site(before) + "; nothing orders the two");
}

}  // namespace

void global_bounds(const void* p, u32 bytes, bool write, Pc pc) {
  const u64 at = reinterpret_cast<u64>(p);
  check_allowed(range_of(at, bytes, write ? "writes" : "reads", pc), at, bytes, write, pc);
}

void global_access(const void* p, u32 bytes, Access access, Pc pc) {
  const u64 at = reinterpret_cast<u64>(p);
  Range& r = range_of(at, bytes, verb_of(access), pc);
  check_allowed(r, at, bytes, access != Access::kRead, pc);
  constexpr u64 kAtomicBit = 1ull << 63;
  const u64 me = u64{current->block->linear} << 32 | current->epoch();
  const u64 first = (at - r.begin) >> r.shift, last = (at - r.begin + bytes - 1) >> r.shift;
  for (u64 i = first; i <= last; ++i) {
    const u64 w = r.writer[i];
    const bool both_atomic = access == Access::kAtomic && (w & kAtomicBit);
    if (w != me && !both_atomic && !globally_ordered(w)) {
      global_race(r, r.begin + (i << r.shift), verb_of(access), "wrote", w, r.writer_pc[i], pc);
    }
    if (access == Access::kRead) {
      r.reader[i] = me;
      r.reader_pc[i] = pc;
      continue;
    }
    const u64 before = r.reader[i];
    if (before != 0 && before != me && !globally_ordered(before)) {
      global_race(r, r.begin + (i << r.shift), verb_of(access), "read", before, r.reader_pc[i], pc);
    }
    r.reader[i] = 0;
    r.writer[i] = access == Access::kAtomic ? me | kAtomicBit : me;
    r.writer_pc[i] = pc;
  }
}

void constant_read(const void* p, u32 bytes, Pc pc) {
  global_access(p, bytes, Access::kRead, pc);
  const u64 at = reinterpret_cast<u64>(p);
  const Range& r = range_of(at, bytes, "reads", pc);
  const u64 first = (at - r.begin) >> r.shift, last = (at - r.begin + bytes - 1) >> r.shift;
  for (u64 i = first; i <= last; ++i) {
    if (r.writer[i] != 0) {
      fail_here(pc, format("reads byte %llu of %s as constant (ld.global.nc), which the kernel wrote at ", at - r.begin, r.name) +
                        site(r.writer_pc[i]));
    }
  }
}

}  // namespace emulator
