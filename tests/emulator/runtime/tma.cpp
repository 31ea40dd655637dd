// The copy engine: boxes of tensors and runs of bytes. Loads land at their mbarrier; stores read shared memory when the
// issuing thread waits for that, and write global memory when it waits for that or ends.
#include <cstring>

#include "async.h"
#include "device.h"
#include "memory.h"

namespace emulator {
namespace {

// What run.py puts into the 128 bytes of a TensorMap. Innermost first; strides in bytes.
struct Map {
  u64 magic, address;
  u32 rank, item, type, swizzle;
  u64 sizes[5], strides[5];
  u16 box[8];
};
static_assert(sizeof(Map) == 128);
constexpr u64 kMagic = 0x70616d726f736e74;
enum Type : u32 { kU8 = 0, kI32 = 3, kI64 = 5, kF16 = 6, kF32 = 7, kF64 = 8, kBf16 = 9 };

// A piece of a copy: bytes at an offset of the arena and in global memory; null lies outside of the tensor.
struct Piece {
  u64 shared;
  u8* global;
  u32 bytes;
};

const Map& map_at(const void* p, Pc pc) {
  const Map& map = *static_cast<const Map*>(p);
  if (reinterpret_cast<u64>(p) % 64 != 0 || map.magic != kMagic) fail_here(pc, "this is no TensorMap");
  return map;
}

u64 box_bytes(const Map& map) {
  u64 n = map.item;
  for (u32 d = 0; d < map.rank; ++d) n *= map.box[d];
  return n;
}

// The 16-byte pieces of the box at these coordinates, with its tile at `shared`.
std::vector<Piece> pieces_of(const Map& map, u64 shared, const int* x, u32 rank, const char* verb, Pc pc) {
  if (map.rank != rank) fail_here(pc, format("%s with %u coordinates of a map of rank %u", verb, rank, map.rank));
  // Without a swizzle 128 bytes are enough; with one the pattern begins at these multiples.
  const u32 alignment = map.swizzle == 0 ? 128 : 8 * map.swizzle;
  if (shared % alignment != 0) misaligned(arena + shared, static_cast<u32>(box_bytes(map)), alignment, verb, pc);
  const u32 row = map.box[0] * map.item;
  if (map.swizzle != 0 && row != map.swizzle) {
    fail_here(
        pc, format("%s of rows of %u bytes with a swizzle of %u: how they lie then is documented nowhere", verb, row, map.swizzle));
  }
  u64 rows = 1;
  for (u32 d = 1; d < rank; ++d) rows *= map.box[d];
  std::vector<Piece> pieces;
  pieces.reserve(rows * row / 16);
  for (u64 r = 0; r < rows; ++r) {
    bool inside = true;
    u64 address = map.address, rest = r;
    for (u32 d = 1; d < rank; ++d) {
      const i64 at = x[d] + static_cast<i64>(rest % map.box[d]);
      rest /= map.box[d];
      inside = inside && at >= 0 && at < static_cast<i64>(map.sizes[d]);
      address += at * map.strides[d];
    }
    for (u32 c = 0; c < row; c += 16) {
      u64 to = shared + r * row + c;
      if (map.swizzle != 0) to ^= (to >> 3) & (map.swizzle - 16);
      // The innermost dimension may end within the 16 bytes.
      for (u32 i = 0; i < 16;) {
        const i64 element = x[0] + static_cast<i64>((c + i) / map.item);
        const bool here = inside && element >= 0 && element < static_cast<i64>(map.sizes[0]);
        u32 end = i + map.item;
        while (end < 16) {
          const i64 next = x[0] + static_cast<i64>((c + end) / map.item);
          if ((inside && next >= 0 && next < static_cast<i64>(map.sizes[0])) != here) break;
          end += map.item;
        }
        pieces.push_back({to + i, here ? reinterpret_cast<u8*>(address + element * map.item) : nullptr, end - i});
        i = end;
      }
    }
  }
  return pieces;
}

// ---- loads

// `mark`: what else the bytes' state says then.
void load_to(std::vector<Piece> pieces, u64 barrier, u64 bytes, u8 mark, Pc pc) {
  Mbarrier& b = mbarrier_at(barrier, "a bulk load", pc);
  if (!b.fenced && b.maker != nullptr) {
    fail_here(pc, "a bulk load completes on the mbarrier at " + place(barrier) +
                      ", which was initialised without fence_barrier_init behind");
  }
  const u32 phase = b.phase, epoch = engine_epoch(b.engine, phase + 1, pc);
  for (const Piece& p : pieces) {
    engine_write(p.shared, p.bytes, epoch, "a bulk load writes", pc);
    if (p.global != nullptr) global_access(p.global, p.bytes, Access::kRead, pc);
    std::memset(arena + p.shared, 0xff, p.bytes);
  }
  start([pieces = std::move(pieces), barrier, bytes, mark, phase, pc] {
    for (const Piece& p : pieces) {
      if (p.global != nullptr) {
        std::memcpy(arena + p.shared, p.global, p.bytes);
      } else {
        std::memset(arena + p.shared, 0, p.bytes);
      }
      std::memset(cells.state + p.shared, kWritten | mark, p.bytes);
    }
    bytes_arrive(barrier, static_cast<u32>(bytes), phase, pc);
  });
}

// ---- stores

struct Store {
  std::vector<Piece> pieces;
  std::vector<u8> data;  // once read
  int type;              // of the elements that are added; -1: overwritten
  Pc pc;
};
// Of one thread. Numbers of stores count from 1; the first `read` have read shared memory, the first `written` are done.
struct Stores {
  std::vector<Store> all;
  std::vector<u32> groups;  // ends of the committed groups
  u32 read = 0, written = 0;
};
std::vector<Stores> stores;  // per thread of the cluster

Stores& stores_of(const Fibre& f) {
  if (stores.empty()) stores.resize(launch.cluster * f.block->fibres.size());
  return stores[f.id];
}

void read_until(Fibre& f, u32 count) {
  Stores& s = stores_of(f);
  for (; s.read < count; ++s.read) {
    Store& store = s.all[s.read];
    for (const Piece& p : store.pieces) store.data.insert(store.data.end(), arena + p.shared, arena + p.shared + p.bytes);
  }
}

template <class T>
void add(u8* to, const u8* from, u32 bytes) {
  for (u32 i = 0; i < bytes; i += sizeof(T)) {
    T x, y;
    std::memcpy(&x, to + i, sizeof(T));
    std::memcpy(&y, from + i, sizeof(T));
    x += y;
    std::memcpy(to + i, &x, sizeof(T));
  }
}
template <float (*kFrom)(u32), u32 (*kTo)(float)>
void add_16_bits(u8* to, const u8* from, u32 bytes) {
  for (u32 i = 0; i < bytes; i += 2) {
    u16 x, y;
    std::memcpy(&x, to + i, 2);
    std::memcpy(&y, from + i, 2);
    x = static_cast<u16>(kTo(kFrom(x) + kFrom(y)));
    std::memcpy(to + i, &x, 2);
  }
}

void write_until(Fibre& f, u32 count) {
  Stores& s = stores_of(f);
  read_until(f, count);
  for (; s.written < count; ++s.written) {
    Store& store = s.all[s.written];
    const u8* from = store.data.data();
    for (const Piece& p : store.pieces) {
      if (p.global != nullptr) {
        if (store.type < 0) std::memcpy(p.global, from, p.bytes);
        if (store.type == kF32) add<float>(p.global, from, p.bytes);
        if (store.type == kF64) add<double>(p.global, from, p.bytes);
        if (store.type == kI32) add<u32>(p.global, from, p.bytes);
        if (store.type == kI64) add<u64>(p.global, from, p.bytes);
        if (store.type == kBf16) add_16_bits<from_bf16, to_bf16>(p.global, from, p.bytes);
        if (store.type == kF16) add_16_bits<from_f16, to_f16>(p.global, from, p.bytes);
      }
      from += p.bytes;
    }
    store.pieces = {};
    store.data = {};
  }
}

void store_from(std::vector<Piece> pieces, int type, Pc pc) {
  Fibre& f = *current;
  Stores& s = stores_of(f);
  if (f.engine == 0) f.engine = new_engine("a bulk store", pc);
  const u32 epoch = engine_epoch(f.engine, static_cast<u32>(s.all.size()) + 1, pc);
  for (const Piece& p : pieces) {
    engine_read(p.shared, p.bytes, epoch, "a bulk store reads", pc);
    if (p.global != nullptr) global_access(p.global, p.bytes, type < 0 ? Access::kWrite : Access::kAtomic, pc);
  }
  s.all.push_back({std::move(pieces), {}, type, pc});
  // With some seeds the engine is quick.
  if (launch.seed % 2 == 1 && random_number() % 4 == 0) write_until(f, static_cast<u32>(s.all.size()));
}

u32 all_but(const Stores& s, u32 pending) { return s.groups.size() > pending ? s.groups[s.groups.size() - 1 - pending] : 0; }

std::vector<Piece> run_of(void* shared, const void* global, u32 bytes, const char* verb, Pc pc) {
  if (bytes % 16 != 0 || bytes == 0) fail_here(pc, format("%s %u bytes, not a multiple of 16", verb, bytes));
  if (reinterpret_cast<u64>(global) % 16 != 0) misaligned(global, bytes, 16, verb, pc);
  return {{shared_offset(shared, bytes, 16, verb, pc), static_cast<u8*>(const_cast<void*>(global)), bytes}};
}

}  // namespace

void reset_stores() { stores.clear(); }

void stores_at_exit(Fibre* f) {
  if (stores.empty()) return;
  Stores& s = stores_of(*f);
  const u32 count = static_cast<u32>(s.all.size());
  if (f->engine_done < count) {
    fail_here(s.all[f->engine_done].pc,
              "the thread exits while its bulk store may still read shared memory (bulk_wait_read is missing)");
  }
  write_until(*f, count);
}

// ---- verbs

void tma_prefetch(const void* map) { map_at(map, CALLER); }

void tma_load(void* shared, const void* map, void* barrier, u32 multicast, u32 rank, int x0, int x1, int x2, int x3, int x4) {
  const Pc pc = CALLER;
  const Map& m = map_at(map, pc);
  const int x[] = {x0, x1, x2, x3, x4};
  const u64 bytes = box_bytes(m);
  const u64 to = shared_offset(shared, static_cast<u32>(bytes), 16, "tma_load writes", pc);
  const u64 at = shared_offset(barrier, 8, 8, "tma_load completes on", pc);
  if (multicast == 0) {
    load_to(pieces_of(m, to, x, rank, "tma_load", pc), at, bytes, boxed(m.swizzle), pc);
    return;
  }
  if (multicast >> launch.cluster)
    fail_here(pc, format("tma_load_multicast to blocks 0x%x of a cluster of %u", multicast, launch.cluster));
  for (u32 b = 0; b < launch.cluster; ++b) {
    if (!(multicast >> b & 1)) continue;
    load_to(pieces_of(m, to % kWindow + u64{b} * kWindow, x, rank, "tma_load_multicast", pc), at % kWindow + u64{b} * kWindow,
            bytes, boxed(m.swizzle), pc);
  }
}

void tma_store(const void* map, const void* shared, bool adds, u32 rank, int x0, int x1, int x2, int x3, int x4) {
  const Pc pc = CALLER;
  const Map& m = map_at(map, pc);
  const int x[] = {x0, x1, x2, x3, x4};
  const char* verb = adds ? "tma_reduce_add" : "tma_store";
  const u64 from = shared_offset(shared, static_cast<u32>(box_bytes(m)), 16, verb, pc);
  store_from(pieces_of(m, from, x, rank, verb, pc), adds ? static_cast<int>(m.type) : -1, pc);
}

void bulk_load(void* shared, const void* global, u32 bytes, void* barrier) {
  const Pc pc = CALLER;
  load_to(run_of(shared, global, bytes, "bulk_load", pc), shared_offset(barrier, 8, 8, "bulk_load completes on", pc), bytes, 0, pc);
}
void bulk_store(void* global, const void* shared, u32 bytes) {
  const Pc pc = CALLER;
  store_from(run_of(const_cast<void*>(shared), global, bytes, "bulk_store", pc), -1, pc);
}
void bulk_reduce_add(void* global, const void* shared, u32 bytes) {
  const Pc pc = CALLER;
  store_from(run_of(const_cast<void*>(shared), global, bytes, "bulk_reduce_add", pc), kF32, pc);
}

void bulk_commit() {
  Stores& s = stores_of(*current);
  s.groups.push_back(static_cast<u32>(s.all.size()));
}
void bulk_wait_read(u32 pending) {
  const u32 count = all_but(stores_of(*current), pending);
  if (count == 0) return;
  read_until(*current, count);
  see_engine(current->engine, count);
  if (current->engine_done < count) current->engine_done = count;
}
void bulk_wait(u32 pending) {
  const u32 count = all_but(stores_of(*current), pending);
  if (count == 0) return;
  write_until(*current, count);
  see_engine(current->engine, count);
  if (current->engine_done < count) current->engine_done = count;
}

}  // namespace emulator
