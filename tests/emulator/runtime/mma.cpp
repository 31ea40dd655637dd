// ldmatrix and mma.sync, computed for the warp by its last lane.
#include <cstring>

#include "device.h"
#include "memory.h"
#include "warp.h"

namespace emulator {
namespace {

struct Rows {
  const void* row;
  u32 matrices;
  bool transposed;
  u32 result[4];
};

void load_matrices(Gather& g) {
  const Rows& first = *static_cast<Rows*>(g.slots[0]);
  Fibre* me = current;
  for (u32 i = 0; i < first.matrices; ++i) {
    u16 matrix[8][8];
    for (u32 r = 0; r < 8; ++r) {
      current = g.lanes[8 * i + r];  // reports are about the lane that gave the address
      const void* row = static_cast<Rows*>(g.slots[8 * i + r])->row;
      shared_read(shared_offset(row, 16, 16, "ldmatrix reads", g.pc), 16, g.pc);
      std::memcpy(matrix[r], row, 16);
    }
    for (u32 l = 0; l < 32; ++l) {
      const u32 r = l / 4, c = 2 * (l % 4);
      const u32 low = first.transposed ? matrix[c][r] : matrix[r][c];
      const u32 high = first.transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      static_cast<Rows*>(g.slots[l])->result[i] = high << 16 | low;
    }
  }
  current = me;
}

struct StoredRows {
  void* row;
  u32 matrices;
  bool transposed;
  u32 value[4];
};

void store_matrices(Gather& g) {
  const StoredRows& first = *static_cast<StoredRows*>(g.slots[0]);
  Fibre* me = current;
  for (u32 i = 0; i < first.matrices; ++i) {
    u16 matrix[8][8];
    for (u32 l = 0; l < 32; ++l) {
      const u32 r = l / 4, c = 2 * (l % 4), x = static_cast<StoredRows*>(g.slots[l])->value[i];
      (first.transposed ? matrix[c][r] : matrix[r][c]) = static_cast<u16>(x);
      (first.transposed ? matrix[c + 1][r] : matrix[r][c + 1]) = static_cast<u16>(x >> 16);
    }
    for (u32 r = 0; r < 8; ++r) {
      current = g.lanes[8 * i + r];
      void* row = static_cast<StoredRows*>(g.slots[8 * i + r])->row;
      shared_write(shared_offset(row, 16, 16, "stmatrix writes", g.pc), 16, g.pc);
      std::memcpy(row, matrix[r], 16);
    }
  }
  current = me;
}

struct Product {
  u32 a[4], b[2];
  float d[4];
};

typedef float f32x8 __attribute__((vector_size(32)));

template <float (*kConvert)(u32)>
void multiply(Gather& g) {
  float a[16][16];
  f32x8 b[16], d[16];
  for (u32 l = 0; l < 32; ++l) {
    const Product& p = *static_cast<Product*>(g.slots[l]);
    const u32 r = l / 4, c = 2 * (l % 4);
    for (u32 i = 0; i < 4; ++i) {
      float* at = &a[r + 8 * (i & 1)][c + 8 * (i >> 1)];
      at[0] = kConvert(p.a[i] & 0xffff);
      at[1] = kConvert(p.a[i] >> 16);
    }
    for (u32 i = 0; i < 2; ++i) {
      b[c + 8 * i][r] = kConvert(p.b[i] & 0xffff);
      b[c + 8 * i + 1][r] = kConvert(p.b[i] >> 16);
    }
    for (u32 i = 0; i < 4; ++i) d[r + 8 * (i >> 1)][c + (i & 1)] = p.d[i];
  }
  for (u32 m = 0; m < 16; ++m) {
    for (u32 k = 0; k < 16; ++k) d[m] += a[m][k] * b[k];
  }
  for (u32 l = 0; l < 32; ++l) {
    Product& p = *static_cast<Product*>(g.slots[l]);
    const u32 r = l / 4, c = 2 * (l % 4);
    for (u32 i = 0; i < 4; ++i) p.d[i] = d[r + 8 * (i >> 1)][c + (i & 1)];
  }
}

}  // namespace

Words ldmatrix(const void* row, u32 matrices, bool transposed) {
  Rows r{row, matrices, transposed, {}};
  static const char* const kNames[] = {"ldmatrix_x2", "ldmatrix_x2_transposed", "ldmatrix_x4", "ldmatrix_x4_transposed"};
  gather(kNames[(matrices == 4 ? 2 : 0) + transposed], ~0u, true, load_matrices, &r, CALLER);
  return {u64{r.result[1]} << 32 | r.result[0], u64{r.result[3]} << 32 | r.result[2]};
}

void stmatrix(void* row, u32 matrices, bool transposed, u32 r0, u32 r1, u32 r2, u32 r3) {
  StoredRows r{row, matrices, transposed, {r0, r1, r2, r3}};
  static const char* const kNames[] = {"stmatrix_x2", "stmatrix_x2_transposed", "stmatrix_x4", "stmatrix_x4_transposed"};
  gather(kNames[(matrices == 4 ? 2 : 0) + transposed], ~0u, true, store_matrices, &r, CALLER);
}

Floats mma_bf16(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float d0, float d1, float d2, float d3) {
  Product p{{a0, a1, a2, a3}, {b0, b1}, {d0, d1, d2, d3}};
  gather("mma_m16n8k16<bf16>", ~0u, true, multiply<from_bf16>, &p, CALLER);
  return {p.d[0], p.d[1], p.d[2], p.d[3]};
}

Floats mma_f16(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float d0, float d1, float d2, float d3) {
  Product p{{a0, a1, a2, a3}, {b0, b1}, {d0, d1, d2, d3}};
  gather("mma_m16n8k16<f16>", ~0u, true, multiply<from_f16>, &p, CALLER);
  return {p.d[0], p.d[1], p.d[2], p.d[3]};
}

}  // namespace emulator
