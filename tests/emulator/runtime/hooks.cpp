// The calls that g++ -fsanitize=thread makes before each access to memory that others may see. The library links these
// instead of libtsan. They check and come back; they never let another fibre run.
#include "memory.h"

namespace emulator {
namespace {

[[gnu::noinline]] void register_access(const void* p, u32 bytes, bool write, Pc pc) {
  const u8* begin = static_cast<const u8*>(p);
  for (const Destination& d : current->flying) {
    if (begin < d.end && begin + bytes > d.begin) {
      fail_here(pc, std::string(write ? "writes" : "reads") + " a register that wgmma at " + site(d.pc) +
                        " is still computing (wgmma_wait is missing)");
    }
  }
  if (!write || !current->fenced) return;
  u8* from = const_cast<u8*>(begin);
  auto& late = current->late;
  if (!late.empty() && late.back().end == from) {
    late.back().end += bytes;
  } else {
    late.push_back({from, from + bytes, pc});
  }
}

extern "C" {
extern const char __executable_start[] __attribute__((weak));
extern const char _end[];
}

inline bool is_constant(const void* p) { return reinterpret_cast<u64>(p) >= library && p < static_cast<const void*>(_end); }

template <bool kWrite>
inline void touch(const void* p, u32 bytes, bool aligned, Pc pc) {
  const u64 offset = static_cast<const u8*>(p) - arena;
  if (offset >= kShared && offset < kArena) {
    if (__builtin_expect(current->watched, 0)) register_access(p, bytes, kWrite, pc);
    return;
  }
  if (aligned && (reinterpret_cast<u64>(p) & (bytes - 1)) != 0) misaligned(p, bytes, bytes, kWrite ? "writes" : "reads", pc);
  if (offset < kShared) {
    kWrite ? shared_write(offset, bytes, pc) : shared_read(offset, bytes, pc);
  } else if (kWrite || !is_constant(p)) {
    global_access(p, bytes, kWrite ? Access::kWrite : Access::kRead, pc);
  }
}

}  // namespace
}  // namespace emulator

using emulator::touch;

#define HOOKS(bytes)                                                                    \
  void __tsan_read##bytes(void* p) { touch<false>(p, bytes, true, CALLER); }            \
  void __tsan_write##bytes(void* p) { touch<true>(p, bytes, true, CALLER); }            \
  void __tsan_volatile_read##bytes(void* p) { touch<false>(p, bytes, true, CALLER); }   \
  void __tsan_volatile_write##bytes(void* p) { touch<true>(p, bytes, true, CALLER); }   \
  void __tsan_unaligned_read##bytes(void* p) { touch<false>(p, bytes, false, CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { touch<true>(p, bytes, false, CALLER); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, unsigned long bytes) { touch<false>(p, static_cast<unsigned>(bytes), false, CALLER); }
void __tsan_write_range(void* p, unsigned long bytes) { touch<true>(p, static_cast<unsigned>(bytes), false, CALLER); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
