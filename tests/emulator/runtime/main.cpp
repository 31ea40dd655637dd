// The door that Python calls.
#include <sys/mman.h>

#include <cstring>

#include "memory.h"

extern "C" {
void emulator_call(const void* params);
extern const char __ehdr_start[] __attribute__((visibility("hidden")));

struct Storage {
  emulator::u64 begin, bytes;
  const emulator::u8* allowed;
  emulator::u64 granule;
  const char* name;
};

// Runs a grid of blocks. Null, or what is wrong; valid until the next run.
__attribute__((visibility("default"))) const char* emulator_run(const void* params, const unsigned* sizes, unsigned cluster,
                                                                unsigned shared_bytes, unsigned registers, unsigned seed,
                                                                unsigned engines, unsigned lag, const Storage* storages,
                                                                unsigned count, int (*same_site)(unsigned, unsigned)) {
  using namespace emulator;
  library = reinterpret_cast<u64>(__ehdr_start);
  const auto cells_for = [](u64 n, u64 size) {
    void* p = mmap(nullptr, n * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
  };
  ranges.clear();
  for (unsigned i = 0; i < count; ++i) {
    const Storage& s = storages[i];
    const u64 n = (s.bytes + s.granule - 1) / s.granule;
    Range r{s.begin, s.begin + s.bytes, s.allowed, static_cast<u32>(__builtin_ctzll(s.granule)), s.name, nullptr,
            nullptr, nullptr,           nullptr};
    u8* memory = static_cast<u8*>(cells_for(n, 24));
    if (memory == nullptr) return "no memory for the shadow of the tensors";
    r.writer = reinterpret_cast<u64*>(memory);
    r.reader = r.writer + n;
    r.writer_pc = reinterpret_cast<Pc*>(r.reader + n);
    r.reader_pc = r.writer_pc + n;
    ranges.push_back(r);
  }
  const Launch what{
      emulator_call, params, {sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]}, cluster, shared_bytes, registers, seed,
      engines,       lag};
  const char* fault = run(what, same_site);
  for (const Range& r : ranges) munmap(r.writer, ((r.end - r.begin + (1u << r.shift) - 1) >> r.shift) * 24);
  return fault;
}
}
