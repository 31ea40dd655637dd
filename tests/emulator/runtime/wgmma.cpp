// wgmma. Every warp computes its 16 rows when its lanes have gathered, from descriptors decoded as the hardware does, and
// puts the result into the registers when the warp waits for it. Warps of a warpgroup must issue the same products.
#include <algorithm>
#include <bitset>
#include <cstring>
#include <map>
#include <memory>

#include "async.h"
#include "device.h"
#include "memory.h"
#include "warp.h"

namespace emulator {

// An accumulator under way: what its registers will hold.
struct Accumulator {
  float* registers[32];
  u32 count;                  // per lane
  u32 last;                   // number of the last product into it
  std::vector<float> values;  // [32][count]
};

// Of one warp.
struct Products {
  u32 engine = 0;
  u32 issued = 0;           // products so far
  std::vector<u32> groups;  // ends of the committed ones
  u32 done = 0;
  bool fenced = false;
  std::vector<std::unique_ptr<Accumulator>> flying;
};

namespace {

std::vector<std::unique_ptr<Products>> all_products;
// What the warps of a warpgroup have issued, by the first that came: all must issue the same.
struct Issued {
  Pc pc;
  u64 a, b;
};
std::map<const Block*, std::vector<std::vector<Issued>>> history;

Products& products_of(const Fibre& f) {
  Warp& w = f.block->warps[f.warp];
  if (w.products == nullptr) {
    all_products.push_back(std::make_unique<Products>());
    w.products = all_products.back().get();
  }
  return *w.products;
}

struct Request {
  float* d;
  u32 n;
  u32 flags;
  u64 a, b;
  u32 ra[4];
};

// ---- operands in shared memory

u32 swizzled(u32 address, u32 mode) {
  if (mode == 0) return address;
  const u32 bits = mode == 1 ? 7 : mode == 2 ? 3 : 1;  // of 16-byte pieces: 128, 64, 32 bytes
  return address ^ (address >> 3 & bits << 4);
}

// An operand [rows, 16] of 16-bit elements: `rows` along M or N, 16 along k. value[k][row].
template <float (*kConvert)(u32)>
void read_operand(u64 descriptor, bool mn_major, u32 first_row, u32 rows, float* value, u32 row_stride, u32 epoch, const char* verb,
                  Pc pc) {
  const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
            stride = (descriptor >> 32 & 0x3fff) << 4;
  const u32 base = descriptor >> 49 & 7, mode = static_cast<u32>(descriptor >> 62);
  if (base != 0)
    fail_here(pc, format("%s has base offset %u; the emulator knows tiles that begin where their swizzle does", verb, base));
  const u64 window = u64{current->block->rank} * kWindow;
  const u32 atom = mode == 0 ? 1 : mode == 1 ? 8 : mode == 2 ? 4 : 2;  // 16-byte pieces in a row of the swizzle's atom
  const u32 span = mode == 0 ? 0 : 16 * atom;
  if (mode != 0 && start % (8 * span) >= span) {
    fail_here(pc, format("%s at byte %u, which lies within an atom of the %u-byte swizzle, not in its first row", verb,
                         start - kReserved, span));
  }
  static std::bitset<kWindow / 16> taken;
  taken.reset();
  const auto piece = [&](u32 address) -> const u16* {
    const u32 at = swizzled(address, mode);
    engine_read(window + at, 16, epoch, verb, pc);
    const u8 box = cells.state[window + at] & 7 * kBoxed;
    if (box != 0 && box != boxed(span)) {
      fail_here(pc, format("%s with a swizzle of %u bytes what tma_load wrote with another", verb, span));
    }
    if (taken[at / 16]) {
      fail_here(pc, format("%s the piece at byte %u twice: the descriptor's offsets (leading %u, stride %u) overlap", verb,
                           at - kReserved, leading, stride));
    }
    taken.set(at / 16);
    return reinterpret_cast<const u16*>(arena + window + at);
  };
  if (!mn_major) {
    // Rows of the operand are rows in memory: 8 of them are an atom's, k runs along them.
    const u32 pitch = 16 * atom;
    for (u32 r = first_row; r < first_row + rows; ++r) {
      for (u32 half = 0; half < 2; ++half) {
        const u32 address = start + r % 8 * pitch + r / 8 * stride + half * (mode == 0 ? leading : 16);
        const u16* x = piece(address);
        for (u32 i = 0; i < 8; ++i) value[(8 * half + i) * row_stride + r - first_row] = kConvert(x[i]);
      }
    }
    return;
  }
  // Rows of the operand run along memory: 8 per piece; k goes down the atom's 8 rows.
  for (u32 c = first_row / 8; c < (first_row + rows) / 8; ++c) {
    for (u32 k = 0; k < 16; ++k) {
      u32 address = start;
      if (mode == 0) {
        address += c * stride + k % 8 * 16 + k / 8 * leading;
      } else {
        address += c % atom * 16 + c / atom * leading + k % 8 * 16 * atom + k / 8 * stride;
      }
      const u16* x = piece(address);
      for (u32 i = 0; i < 8; ++i) value[k * row_stride + 8 * c + i - first_row] = kConvert(x[i]);
    }
  }
}

typedef float f32x8 __attribute__((vector_size(32), aligned(4)));

template <float (*kConvert)(u32)>
void multiply(Gather& g) {
  Request* requests[32];
  for (u32 l = 0; l < 32; ++l) requests[l] = static_cast<Request*>(g.slots[l]);
  const Request& first = *requests[0];
  for (u32 l = 1; l < 32; ++l) {
    const Request& r = *requests[l];
    if (r.a != first.a || r.b != first.b || r.flags != first.flags) {
      fail_here(g.pc, format("lanes 0 and %u give wgmma different descriptors or flags", l));
    }
  }
  Fibre* me = current;
  Products& p = products_of(*me);
  if (!p.fenced) fail_here(g.pc, "wgmma without wgmma_fence since the warp's start or its last wgmma_wait");
  if (p.engine == 0) p.engine = new_engine("wgmma", g.pc);
  for (u32 l = 0; l < 32; ++l) {
    const u8* begin = reinterpret_cast<const u8*>(requests[l]->d);
    for (const Destination& late : g.lanes[l]->late) {
      if (late.begin < begin + 2 * first.n && late.end > begin) {
        fail_here(late.pc, "writes a register behind wgmma_fence that the product at " + site(g.pc) + " then uses");
      }
    }
  }
  auto& issued = history[me->block];
  issued.resize((me->block->warps.size() + 3) / 4);
  auto& group = issued[me->warp / 4];
  if (me->block->warps.size() % 4 != 0 && me->warp / 4 + 1 == issued.size()) {
    fail_here(g.pc, "wgmma needs a warpgroup of 4 warps");
  }
  if (group.size() == p.issued) group.push_back({g.pc, first.a, first.b});
  const Issued& other = group[p.issued];
  if (!same_site(other.pc, g.pc) || other.a != first.a || other.b != first.b) {
    fail_here(g.pc, "the warps of a warpgroup issue different products; another one's is at " + site(other.pc));
  }
  ++p.issued;

  // The engine is told of as the warp, by one of its lanes: any lane's order must do.
  current = g.lanes[random_number() % 32];
  const u32 n = first.n, epoch = engine_epoch(p.engine, p.issued, g.pc);
  static float a[16][16], b[16][256];
  if (first.flags & kRegisters) {
    for (u32 l = 0; l < 32; ++l) {
      const u32 r = l / 4, c = 2 * (l % 4);
      for (u32 i = 0; i < 4; ++i) {
        const u32 row = r + 8 * (i & 1), k = c + 8 * (i >> 1);
        a[k][row] = kConvert(requests[l]->ra[i] & 0xffff);
        a[k + 1][row] = kConvert(requests[l]->ra[i] >> 16);
      }
    }
  } else {
    read_operand<kConvert>(first.a, first.flags & kTransposedA, me->warp % 4 * 16, 16, &a[0][0], 16, epoch,
                           "wgmma (operand a) reads", g.pc);
  }
  read_operand<kConvert>(first.b, first.flags & kTransposedB, 0, n, &b[0][0], 256, epoch, "wgmma (operand b) reads", g.pc);
  current = me;

  Accumulator* into = nullptr;
  for (auto& x : p.flying) {
    if (x->registers[0] == first.d) into = x.get();
  }
  if (into == nullptr) {
    p.flying.push_back(std::make_unique<Accumulator>());
    into = p.flying.back().get();
    into->count = n / 2;
    into->values.assign(32 * into->count, 0.0f);
    for (u32 l = 0; l < 32; ++l) {
      into->registers[l] = requests[l]->d;
      u8* begin = reinterpret_cast<u8*>(requests[l]->d);
      if (first.flags & kAccumulate) std::memcpy(&into->values[l * into->count], begin, 4 * into->count);
      std::memset(begin, 0xff, 4 * into->count);
      g.lanes[l]->flying.push_back({begin, begin + 4 * into->count, g.pc});
      g.lanes[l]->watched = true;
    }
  } else if (into->count != n / 2) {
    fail_here(g.pc, "wgmma into registers of another product of a different shape that is under way");
  }
  into->last = p.issued;

  static float d[16][256];
  for (u32 l = 0; l < 32; ++l) {
    const float* v = &into->values[l * into->count];
    for (u32 j = 0; j < n / 8; ++j) {
      for (u32 i = 0; i < 4; ++i)
        d[l / 4 + 8 * (i >> 1)][8 * j + 2 * (l % 4) + (i & 1)] = first.flags & kAccumulate ? v[4 * j + i] : 0.0f;
    }
  }
  for (u32 m = 0; m < 16; ++m) {
    for (u32 j = 0; j < n; j += 8) {
      f32x8 sum = *reinterpret_cast<f32x8*>(&d[m][j]);
      for (u32 k = 0; k < 16; ++k) sum += a[k][m] * *reinterpret_cast<f32x8*>(&b[k][j]);
      *reinterpret_cast<f32x8*>(&d[m][j]) = sum;
    }
  }
  for (u32 l = 0; l < 32; ++l) {
    float* v = &into->values[l * into->count];
    for (u32 j = 0; j < n / 8; ++j) {
      for (u32 i = 0; i < 4; ++i) v[4 * j + i] = d[l / 4 + 8 * (i >> 1)][8 * j + 2 * (l % 4) + (i & 1)];
    }
  }
}

void watch(Gather& g, bool fenced) {
  for (Fibre* f : g.lanes) {
    f->late.clear();
    f->fenced = fenced;
    f->watched = fenced || !f->flying.empty();
  }
}

void fence_products(Gather& g) {
  products_of(*current).fenced = true;
  watch(g, true);
}

void commit_products(Gather& g) {
  Products& p = products_of(*current);
  p.groups.push_back(p.issued);
  watch(g, false);
}

void wait_products(Gather& g) {
  Products& p = products_of(*current);
  const u32 pending = *static_cast<u32*>(g.slots[current->lane]);
  const u32 count = p.groups.size() > pending ? p.groups[p.groups.size() - 1 - pending] : 0;
  p.fenced = false;
  watch(g, false);
  if (count <= p.done) return;
  p.done = count;
  for (auto& x : p.flying) {
    if (x->last > count) continue;
    for (u32 l = 0; l < 32; ++l) {
      std::memcpy(x->registers[l], &x->values[l * x->count], 4 * x->count);
      auto& flying = g.lanes[l]->flying;
      for (size_t i = 0; i < flying.size(); ++i) {
        if (flying[i].begin == reinterpret_cast<u8*>(x->registers[l])) {
          flying.erase(flying.begin() + static_cast<long>(i));
          break;
        }
      }
    }
    x.reset();
  }
  p.flying.erase(std::remove(p.flying.begin(), p.flying.end(), nullptr), p.flying.end());
  watch(g, false);
  // What the products read may be overwritten by whoever is behind this.
  Fibre* me = current;
  Clock* done = clocks.zero();
  done->of[p.engine] = count;
  for (Fibre* f : g.lanes) {
    if (f != nullptr) f->clock = clocks.acquire(f->clock, done);
  }
  clocks.drop(done);
  current = me;
}

}  // namespace

void reset_products() {
  all_products.clear();
  history.clear();
}

void products_at_exit(Fibre* f) {
  if (!f->flying.empty()) {
    fail_here(f->flying[0].pc, "the thread exits while wgmma is still computing its registers (wgmma_wait is missing)");
  }
  const auto issued = history.find(f->block);
  if (f->block->live > 1 || issued == history.end()) return;
  for (u32 w = 0; w < f->block->warps.size(); ++w) {
    const auto& group = issued->second[w / 4];
    const Products* p = f->block->warps[w].products;
    const size_t count = p != nullptr ? p->issued : 0;
    if (count < group.size())
      fail_here(group[count].pc, format("warp %u ends without a product that others of its warpgroup issued", w));
  }
}

void wgmma(float* d, u32 n, u32 flags, u64 a, u64 b, u32 a0, u32 a1, u32 a2, u32 a3) {
  Request r{d, n, flags, a, b, {a0, a1, a2, a3}};
  gather(flags & kRegisters ? "wgmma_rs" : "wgmma_ss", ~0u, true, flags & kHalf ? multiply<from_f16> : multiply<from_bf16>, &r,
         CALLER);
}
void wgmma_fence() { gather("wgmma_fence", ~0u, true, fence_products, nullptr, CALLER); }
void wgmma_commit() { gather("wgmma_commit", ~0u, true, commit_products, nullptr, CALLER); }
void wgmma_wait(u32 pending) { gather("wgmma_wait", ~0u, true, wait_products, &pending, CALLER); }

}  // namespace emulator
