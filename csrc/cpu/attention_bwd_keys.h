// The K and V of a task of attention's backward: rows for S = K q^T and dP = V do^T, K once more by columns for dq += K^T dS.
#pragma once
#include "attention_bwd_plan.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Keys are counted from the chunk's first one; tiles of kBlockN begin at multiples of it.
template <class T, class Cells>
struct ChunkKeys {
  static constexpr bool kFloats = sizeof(T) == sizeof(float);

  const AttentionParams& p;
  int64_t cells, cells_v, groups;
  uint8_t* k_not_finite;  // per tile: some key is inf or NaN, and products must not touch it through a zero gradient

  explicit ChunkKeys(const AttentionParams& p) : p(p) {
    cells = round_up(p.headdim, Cells::kPerCell) / Cells::kPerCell;
    cells_v = round_up(p.headdim_v, Cells::kPerCell) / Cells::kPerCell;
    groups = round_up(p.headdim, kRows) / kRows;
  }

  // Scratch for `keys` of them.
  template <class Take>
  void layout(Take&& take, int64_t keys) {
    k_cells = take(keys * cells);
    k_groups = take(keys / Cells::kPerCell * groups * kRows);
    v_cells = take(keys * cells_v);
    k_not_finite = reinterpret_cast<uint8_t*>(take(keys / kBlockN / 4 + 1));
  }

  // Rows from `key` on: [cells], [cells_v].
  const float* k(int64_t key) const { return k_read + key * cells; }
  const float* v(int64_t key) const { return v_read + key * cells_v; }

  // Columns of the tile of `count` keys at tile_begin, from its key `at` on.
  Columns columns(int64_t tile_begin, int64_t count, int64_t at) const {
    constexpr int64_t kPer = Cells::kPerCell;
    if (by_columns && !k_not_finite[tile_begin / kBlockN]) return {k(tile_begin + at), kRows, cells};
    return {groups_of(tile_begin) + at / kPer * kRows, round_up(count, kRows) / kPer * kRows, kRows};
  }

  void pack(const Head& s, int64_t begin, int64_t keys) {
    const float* k_in_place = in_place(s, p.k, p.k_stride, p.headdim, begin, keys);
    const float* v_in_place = in_place(s, p.v, p.v_stride, p.headdim_v, begin, keys);
    k_read = k_in_place != nullptr ? k_in_place : k_cells;
    v_read = v_in_place != nullptr ? v_in_place : v_cells;
    by_columns = kFloats && k_in_place != nullptr && p.headdim % kRows == 0;
    for (int64_t first = 0; first < keys; first += kBlockN) {
      int64_t count = min64(kBlockN, keys - first);
      if (k_in_place == nullptr) copy_rows(s, p.k, p.k_stride, p.headdim, begin + first, count, k_cells + first * cells);
      if (v_in_place == nullptr) copy_rows(s, p.v, p.v_stride, p.headdim_v, begin + first, count, v_cells + first * cells_v);
      bool bad = !by_columns || any_not_finite(k(first), cells, count, p.headdim);
      if (bad) bad = pack_columns(s, begin + first, count, groups_of(first));
      k_not_finite[first / kBlockN] = bad;
    }
  }

 private:
  float *k_cells, *k_groups, *v_cells;
  const float *k_read, *v_read;  // the packed cells, or K and V where they lie
  bool by_columns;               // tiles without inf or NaN are read by columns where they lie

  float* groups_of(int64_t tile_begin) const { return k_groups + tile_begin / Cells::kPerCell * groups * kRows; }

  // The rows of K or V themselves, where they are cells already, one after the other; else null.
  const float* in_place(const Head& s, const void* base, const int64_t (&stride)[3], int64_t cols, int64_t begin,
                        int64_t keys) const {
    bool cells_already = sizeof(T) * Cells::kPerCell == sizeof(float) && cols % Cells::kPerCell == 0;
    if (!cells_already || stride[1] != cols || keys % kRows != 0) return nullptr;
    return reinterpret_cast<const float*>(key_row<T>(p, s, base, stride, begin));
  }

  // Rows as cells, with zeros up to a multiple of kRows.
  void copy_rows(const Head& s, const void* base, const int64_t (&stride)[3], int64_t cols, int64_t begin, int64_t count,
                 float* to) const {
    int64_t row_cells = round_up(cols, Cells::kPerCell) / Cells::kPerCell;
    for (int64_t n = 0; n < count; ++n) copy_row<Cells>(key_row<T>(p, s, base, stride, begin + n), cols, to + n * row_cells);
    __builtin_memset(to + count * row_cells, 0, (round_up(count, kRows) - count) * row_cells * sizeof(float));
  }

  // K by groups of kRows columns, with zeros up to a multiple of kRows keys; true where it holds inf or NaN.
  bool pack_columns(const Head& s, int64_t begin, int64_t count, float* to) const {
    int64_t padded = round_up(count, kRows), group_ld = padded / Cells::kPerCell * kRows;
    vi bad = splat_i(0);
    for (int64_t n = 0; n < padded; n += Cells::kPerCell) {
      int64_t k = n / Cells::kPerCell;
      if (n >= count) {
        for (int64_t g = 0; g < groups; ++g) __builtin_memset(to + g * group_ld + k * kRows, 0, kRows * sizeof(float));
        continue;
      }
      const T* row = key_row<T>(p, s, p.k, p.k_stride, begin + n);
      const T* next = n + 1 < count ? key_row<T>(p, s, p.k, p.k_stride, begin + n + 1) : nullptr;
      bad |= group_rows<Cells>(row, next, p.headdim, k, group_ld, to);
    }
    return any(bad);
  }
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
