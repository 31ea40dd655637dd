// The K and V tiles of attention: packed on first use, because a tile that nobody sees is never touched.
#pragma once
#include "attention_scores.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class T>
constexpr bool is_f16 = false;
template <>
constexpr bool is_f16<f16> = true;

template <class T, class Cells>
struct KeyTiles {
  const AttentionParams& p;
  const Head& s;
  int64_t cells, groups;
  float *k_buffer, *v_buffer;
  int64_t n0 = 0, count = 0;  // this tile's keys
  bool v_not_finite = false;  // some value is inf or NaN: products must not touch it through a zero probability
  CellRows k_ready{};
  Columns v_ready{};

  KeyTiles(const AttentionParams& p, const Head& s, int64_t cells, int64_t groups, float* k_buffer, float* v_buffer)
      : p(p), s(s), cells(cells), groups(groups), k_buffer(k_buffer), v_buffer(v_buffer) {}

  void start(int64_t first, int64_t keys) {
    n0 = first;
    count = keys;
    k_ready.at = nullptr;
    v_ready.at = nullptr;
  }

  // round_up(count, kRows) keys: the rows themselves where they can be read in place, else a copy.
  CellRows k() {
    if (k_ready.at != nullptr) return k_ready;
    bool whole_cells = p.k_stride[1] % Cells::kPerCell == 0 && p.headdim % Cells::kPerCell == 0;
    if (sizeof(T) * Cells::kPerCell == sizeof(float) && whole_cells && p.block_table == nullptr && count % kRows == 0) {
      const T* rows = key_row<T>(p, s, p.k, p.k_stride, n0);
      return k_ready = {reinterpret_cast<const float*>(rows), p.k_stride[1] / Cells::kPerCell};
    }
    int64_t n = 0;
    for (; n < count; ++n) copy_row<Cells>(key_row<T>(p, s, p.k, p.k_stride, n0 + n), p.headdim, k_buffer + n * cells);
    for (; n < round_up(count, kRows); ++n) __builtin_memset(k_buffer + n * cells, 0, cells * sizeof(float));
    return k_ready = {k_buffer, cells};
  }

  // The values by columns: where they lie, unless they lie so far apart that they fall into few sets of the cache, else a copy
  // [groups][keys / kPerCell][kRows] cells. A copy of long rows would not stay in the cache either.
  Columns v() {
    if (v_ready.at != nullptr) return v_ready;
    bool close = p.v_stride[1] <= kCloseCells || p.headdim_v >= kCloseCells;
    bool whole_groups = p.headdim_v % kRows == 0 && count % kRows == 0 && p.block_table == nullptr;
    if (sizeof(T) == sizeof(float) && close && whole_groups) {
      const float* rows = reinterpret_cast<const float*>(key_row<T>(p, s, p.v, p.v_stride, n0));
      v_not_finite = any_not_finite(rows, p.v_stride[1], count, p.headdim_v);
      if (!v_not_finite) return v_ready = {rows, kRows, p.v_stride[1]};
    }
    return v_ready = packed_v();
  }

 private:
  static constexpr int64_t kCloseCells = 256;

  Columns packed_v() {
    int64_t padded = round_up(count, kRows), group = padded / Cells::kPerCell * kRows;
    vi bad = splat_i(0);
    int64_t step = Cells::kPerCell, n = 0;
    for (; n < count; n += step) {
      const T* a = key_row<T>(p, s, p.v, p.v_stride, n0 + n);
      const T* b = step == 2 && n + 1 < count ? key_row<T>(p, s, p.v, p.v_stride, n0 + n + 1) : nullptr;
      bad |= group_rows<Cells>(a, b, p.headdim_v, n / step, group, v_buffer);
    }
    for (; n < padded; n += step)
      for (int64_t g = 0; g < groups; ++g) __builtin_memset(v_buffer + g * group + n / step * kRows, 0, kRows * sizeof(float));
    v_not_finite = any(bad);
    return {v_buffer, group, kRows};
  }
};

// product_groups for a tile that holds inf or NaN: a zero in B contributes nothing, whatever A holds there.
template <class Cells>
static __attribute__((noinline)) void careful_product(Columns a, const float* b, int64_t groups, int64_t count, float* c,
                                                      bool accumulate) {
  for (int64_t g = 0; g < groups; ++g)
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + (g * kRows + i) * kM + v * VL;
        vf sum = accumulate ? load(to) : zero();
        for (int64_t k = 0; k < count; ++k) {
          int32_t cell = as_int(splat(a.at[g * a.group + k * a.col + i]))[0];
          vi pair = load_i(b + k * kM + v * VL);
          if constexpr (Cells::kPerCell == 2) {
            vf low = as_float(pair << 16), high = as_float(pair & (int32_t)0xffff0000);
            sum = sum + select((vi)(low == zero()), zero(), low * as_float(splat_i(cell << 16)));
            sum = sum + select((vi)(high == zero()), zero(), high * as_float(splat_i(cell & (int32_t)0xffff0000)));
          } else {
            sum = sum + select((vi)(as_float(pair) == zero()), zero(), as_float(pair) * as_float(splat_i(cell)));
          }
        }
        store(to, sum);
      }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
