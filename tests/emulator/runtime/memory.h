// What is known of each byte of shared and global memory, and the checks of an access against it.
#pragma once
#include "state.h"

namespace emulator {

// Of a byte of shared memory.
constexpr u8 kWritten = 1;   // has a value
constexpr u8 kLanding = 2;   // an asynchronous write is under way
constexpr u8 kMbarrier = 4;  // part of an mbarrier
constexpr u8 kAtomic = 8;    // last written by an atomic operation
constexpr u8 kBoxed = 16;    // times 1 to 4: brought by TMA with a swizzle of 0, 32, 64, 128 bytes
constexpr u8 boxed(u32 swizzle) { return static_cast<u8>(kBoxed * (swizzle == 128 ? 4 : swizzle / 32 + 1)); }

constexpr int kReaders = 4;  // that are remembered per byte of shared memory

// One entry per byte of the windows. Epochs; 0 is nobody.
struct Cells {
  u8* state;
  u32* writer;
  Pc* writer_pc;
  u32* reader[kReaders];
  Pc* reader_pc[kReaders];
};
extern Cells cells;

// The storage of one or more tensors that the kernel was given.
struct Range {
  u64 begin, end;
  const u8* allowed;  // per byte: 1 may be read, 2 may be written
  u32 shift;          // 1 << shift bytes per entry of the arrays below
  const char* name;
  // Who accessed an entry last: block << 32 | epoch, and 1 << 63 when that was atomic. 0 is nobody.
  u64 *writer, *reader;
  Pc *writer_pc, *reader_pc;
};
extern std::vector<Range> ranges;
// Per block, those whose global writes it has seen through atomic operations; empty: none.
extern std::vector<std::vector<bool>> ordered_after;

enum class Access { kRead, kWrite, kAtomic };

// An access of `bytes` at an offset of the arena, checked and noted.
void shared_read(u64 offset, u32 bytes, Pc pc);
void shared_write(u64 offset, u32 bytes, Pc pc);
void shared_atomic(u64 offset, u32 bytes, Pc pc);
// The same by an engine that the running thread starts: it has the thread's order, and the access is noted as `epoch`'s.
// A read asks for fence.proxy.async behind ordinary writes, a write behind ordinary reads too.
void engine_read(u64 offset, u32 bytes, u32 epoch, const char* verb, Pc pc);
void engine_write(u64 offset, u32 bytes, u32 epoch, const char* verb, Pc pc);
void global_access(const void* p, u32 bytes, Access access, Pc pc);
// A read through the path that is not coherent (ld.global.nc): of what nobody writes while the kernel runs.
void constant_read(const void* p, u32 bytes, Pc pc);
// Only whether it lies within a tensor.
void global_bounds(const void* p, u32 bytes, bool write, Pc pc);

// The offset of an address that must lie, with `bytes` behind it, in the shared memory of the thread's block, aligned.
u32 shared_offset(const void* p, u32 bytes, u32 alignment, const char* verb, Pc pc);
[[noreturn]] void misaligned(const void* p, u32 bytes, u32 alignment, const char* verb, Pc pc);

// Whether the access at that epoch happens before what the running thread does now.
bool happened(u32 epoch);
std::string place(u64 offset);

void reset_shared(u32 blocks, u32 bytes);
void reset_atomics();

}  // namespace emulator
