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
  int64_t k_ld, v_ld = 0;     // cells between keys; between groups of kRows columns
  bool v_not_finite = false;  // some value is inf or NaN: products must not touch it through a zero probability
  const float* k_ready = nullptr;
  bool v_ready = false;

  KeyTiles(const AttentionParams& p, const Head& s, int64_t cells, int64_t groups, float* k_buffer, float* v_buffer)
      : p(p), s(s), cells(cells), groups(groups), k_buffer(k_buffer), v_buffer(v_buffer), k_ld(cells) {}

  void start(int64_t first, int64_t keys) {
    n0 = first;
    count = keys;
    v_ld = round_up(count, kRows) / Cells::kPerCell * kRows;
    k_ready = nullptr;
    v_ready = false;
  }

  // [round_up(count, kRows)][k_ld] cells: the rows themselves where they can be read in place, else a copy.
  const float* k() {
    if (k_ready != nullptr) return k_ready;
    constexpr bool same_type = sizeof(T) * Cells::kPerCell == sizeof(float);
    bool dense = p.k_stride[1] == p.headdim && p.headdim % Cells::kPerCell == 0 && p.block_table == nullptr;
    if (same_type && dense && count % kRows == 0) {
      k_ready = reinterpret_cast<const float*>(key_row<T>(p, s, p.k, p.k_stride, n0));
      return k_ready;
    }
    int64_t n = 0;
    for (; n < count; ++n) copy_row<Cells>(key_row<T>(p, s, p.k, p.k_stride, n0 + n), p.headdim, k_buffer + n * cells);
    for (; n < round_up(count, kRows); ++n) __builtin_memset(k_buffer + n * cells, 0, cells * sizeof(float));
    return k_ready = k_buffer;
  }

  // [groups][keys / kPerCell][kRows] cells.
  const float* v() {
    if (v_ready) return v_buffer;
    v_ready = true;
    int64_t padded = round_up(count, kRows);
    vi bad = splat_i(0);
    int64_t step = Cells::kPerCell, n = 0;
    for (; n < count; n += step) {
      const T* a = key_row<T>(p, s, p.v, p.v_stride, n0 + n);
      const T* b = step == 2 && n + 1 < count ? key_row<T>(p, s, p.v, p.v_stride, n0 + n + 1) : nullptr;
      bad |= group_rows<Cells>(a, b, p.headdim_v, n / step, v_ld, v_buffer);
    }
    for (; n < padded; n += step)
      for (int64_t g = 0; g < groups; ++g) __builtin_memset(v_buffer + g * v_ld + n / step * kRows, 0, kRows * sizeof(float));
    v_not_finite = any(bad);
    return v_buffer;
  }
};

// product_groups for a tile that holds inf or NaN: a zero in B contributes nothing, whatever A holds there.
template <class Cells>
static __attribute__((noinline)) void careful_product(const float* a, int64_t group_ld, const float* b, int64_t groups,
                                                      int64_t count, float* c, bool accumulate) {
  for (int64_t g = 0; g < groups; ++g)
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + (g * kRows + i) * kM + v * VL;
        vf sum = accumulate ? load(to) : zero();
        for (int64_t k = 0; k < count; ++k) {
          int32_t cell = as_int(splat(a[g * group_ld + k * kRows + i]))[0];
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
