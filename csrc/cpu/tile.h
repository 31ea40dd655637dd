// Moving tiles: rows of q, k, v, o in memory to and from the layouts that gemm.h reads, in cells of 4 bytes.
#pragma once
#include "gemm.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
FASTATTN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Interleaves the lower (upper) halves of a and b lane by lane.
FASTATTN_INLINE vi zip_low(vi a, vi b) {
#if VB == 64
  return __builtin_shuffle(a, b, (vi){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#elif VB == 32
  return __builtin_shuffle(a, b, (vi){0, 8, 1, 9, 2, 10, 3, 11});
#else
  return __builtin_shuffle(a, b, (vi){0, 4, 1, 5});
#endif
}
FASTATTN_INLINE vi zip_high(vi a, vi b) {
#if VB == 64
  return __builtin_shuffle(a, b, (vi){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#elif VB == 32
  return __builtin_shuffle(a, b, (vi){4, 12, 5, 13, 6, 14, 7, 15});
#else
  return __builtin_shuffle(a, b, (vi){2, 6, 3, 7});
#endif
}

// Sums the lanes of VL vectors, half as many vectors per stage: result[i] = sum of x[i], which is lost.
FASTATTN_INLINE vf reduce_each(vf (&x)[VL]) {
#pragma GCC unroll 4
  for (int width = VL / 2; width >= 1; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      vi a = as_int(x[i]), b = as_int(x[i + width]);
      x[i] = as_float(zip_low(a, b)) + as_float(zip_high(a, b));
    }
  return x[0];
}

// VL x VL transpose in registers: log2(VL) perfect shuffles of the rows.
FASTATTN_INLINE void transpose(vi (&r)[VL]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < VL; stage *= 2) {
    vi t[VL];
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; ++i) {
      t[2 * i] = zip_low(r[i], r[i + VL / 2]);
      t[2 * i + 1] = zip_high(r[i], r[i + VL / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) r[i] = t[i];
  }
}

// VL cells of a row, starting at cell c; the row has `cols` elements, what is past them reads as 0.
template <class Cells, class T>
FASTATTN_INLINE vi row_cells(const T* row, int64_t c, int64_t cols) {
  if constexpr (Cells::kPerCell == 2) {
    int64_t first = 2 * c, left = cols - first;
    if (left >= 2 * VL) return load_i(row + first);
    vi x = {};
    if (left > 0) __builtin_memcpy(&x, row + first, left * 2);
    return x;
  } else {
    int64_t left = cols - c;
    if (left >= VL) return as_int(load(row + c));
    return left > 0 ? as_int(load_n(row + c, left)) : splat_i(0);
  }
}

// to[cell][lane] = cell of row `lane`, lanes past `rows` are 0: the B operand made of up to kM rows.
template <class Cells, class T>
FASTATTN_INLINE void rows_to_lanes(const T* from, int64_t stride, int64_t rows, int64_t cols, float* to) {
  int64_t cells = round_up(cols, Cells::kPerCell) / Cells::kPerCell;
  for (int64_t lane = 0; lane < kM; lane += VL) {
    for (int64_t c = 0; c < cells; c += VL) {
      vi block[VL];
      for (int i = 0; i < VL; ++i) block[i] = lane + i < rows ? row_cells<Cells>(from + (lane + i) * stride, c, cols) : splat_i(0);
      transpose(block);
      int64_t n = min64(VL, cells - c);
      for (int i = 0; i < n; ++i) store_i(to + (c + i) * kM + lane, block[i]);
    }
  }
}

// Float lanes of `cells` cells times a factor: q that has been packed takes the scale of its scores.
FASTATTN_INLINE void scale_lanes(float* lanes, float factor, int64_t cells) {
  for (int64_t i = 0; i < cells * kM; i += VL) store(lanes + i, load(lanes + i) * splat(factor));
}

// Two vectors as bf16 pairs (x in the low half): the B operand of a product of probabilities. The instruction flushes denormals.
FASTATTN_INLINE vi pack_pairs(vf x, vf y) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  __m512bh both = _mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  return (vi)_mm512_permutexvar_epi16(order, (__m512i)both);
#else
  return __builtin_convertvector(narrow_bf16(x), vi) | (__builtin_convertvector(narrow_bf16(y), vi) << 16);
#endif
}

// Two columns as cells of one: 16-bit results need half the transposes.
FASTATTN_INLINE vi narrow_pair(bf16, vf x, vf y) { return (vi)((vu)round_bf16(x) >> 16) | (round_bf16(y) & (int32_t)0xffff0000); }
FASTATTN_INLINE vi narrow_pair(f16, vf x, vf y) {
  return __builtin_convertvector(narrow_f16(x), vi) | (__builtin_convertvector(narrow_f16(y), vi) << 16);
}

// The same for 2 VL columns by the conversion instruction, where there is one; false if a denormal would be lost.
template <class T, class Column>
FASTATTN_INLINE bool pack_columns(T, Column&&, vi (&)[VL]) {
  return false;
}
#if defined(__AVX512BF16__)
template <class Column>
FASTATTN_INLINE bool pack_columns(bf16, Column&& column, vi (&block)[VL]) {
  constexpr int kDenormal = 0x20;
  __mmask16 lost = 0;
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) {
    vf x = column(2 * i), y = column(2 * i + 1);
    lost |= _mm512_fpclass_ps_mask((__m512)x, kDenormal) | _mm512_fpclass_ps_mask((__m512)y, kDenormal);
    block[i] = pack_pairs(x, y);
  }
  return lost == 0;
}
#endif

// The inverse for results: row `lane` of `to` gets from[col][lane] * factor[lane], rounded to T. `around_cache`: rows are whole,
// aligned cache lines, stored without reading what was there.
template <class T>
FASTATTN_INLINE void lanes_to_rows(const float* from, const float* factor, int64_t rows, int64_t cols, T* to, int64_t stride,
                                   bool around_cache = false) {
  constexpr int kPack = 4 / sizeof(T);
  for (int64_t lane = 0; lane < kM && lane < rows; lane += VL) {
    vf scale = load(factor + lane);
    for (int64_t c = 0; c < cols; c += kPack * VL) {
      vi block[VL];
      int64_t n = min64(kPack * VL, cols - c), lanes = min64(VL, rows - lane);
      auto columns = [&](auto&& column) __attribute__((always_inline)) {
        if constexpr (kPack == 1) {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) block[i] = as_int(column(i));
        } else if (!pack_columns(T{}, column, block)) {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) block[i] = narrow_pair(T{}, column(2 * i), column(2 * i + 1));
        }
      };
      if (n == kPack * VL)
        columns([&](int64_t i) { return load(from + (c + i) * kM + lane) * scale; });
      else
        columns([&](int64_t i) { return i < n ? load(from + (c + i) * kM + lane) * scale : zero(); });
      transpose(block);
      for (int i = 0; i < lanes; ++i) {
        T* row = to + (lane + i) * stride + c;
        if (n < kPack * VL)
          __builtin_memcpy(row, &block[i], n * sizeof(T));
        else if (around_cache)
          stream_bits(row, block[i]);
        else
          store_i(row, block[i]);
      }
    }
  }
}

FASTATTN_INLINE vi not_finite(vi float_bits) { return (vi)((float_bits & 0x7f800000) == 0x7f800000); }

// Does one of `count` rows hold inf or NaN?
FASTATTN_INLINE bool any_not_finite(const float* rows, int64_t stride, int64_t count, int64_t cols) {
  vi bad = splat_i(0);
  for (int64_t n = 0; n < count; ++n, rows += stride)
    for (int64_t d = 0; d < cols; d += VL) bad |= not_finite(as_int(d + VL <= cols ? load(rows + d) : load_n(rows + d, cols - d)));
  return any(bad);
}

// One row as cells [cells], zero padded; returns lanes set where an element is inf or NaN.
template <class Cells, class T>
FASTATTN_INLINE vi copy_row(const T* row, int64_t cols, float* to) {
  int64_t cells = round_up(cols, Cells::kPerCell) / Cells::kPerCell;
  vi bad = splat_i(0);
  int64_t c = 0;
  for (; c + VL <= cells; c += VL) {
    vi x = row_cells<Cells>(row, c, cols);
    bad |= Cells::kPerCell == 2 ? not_finite(x << 16) | not_finite(x) : not_finite(x);
    store_i(to + c, x);
  }
  if (c < cells) {
    vi x = row_cells<Cells>(row, c, cols);
    bad |= Cells::kPerCell == 2 ? not_finite(x << 16) | not_finite(x) : not_finite(x);
    __builtin_memcpy(to + c, &x, (cells - c) * 4);
  }
  return bad;
}

// VL cells whose pairs run along the rows (kPerCell == 2: (a, b)), or plain floats of row a.
template <class Cells, class T>
FASTATTN_INLINE vi column_cells(const T* a, const T* b, int64_t c, int64_t cols) {
  if constexpr (Cells::kPerCell == 2) {
    vh x = {}, y = {};
    int64_t n = min64(VL, cols - c);
    if (n == VL) {
      x = *reinterpret_cast<const vh_u*>(a + c);
      if (b != nullptr) y = *reinterpret_cast<const vh_u*>(b + c);
    } else if (n > 0) {
      __builtin_memcpy(&x, a + c, n * 2);
      if (b != nullptr) __builtin_memcpy(&y, b + c, n * 2);
    }
    return __builtin_convertvector(x, vi) | (__builtin_convertvector(y, vi) << 16);
  } else {
    return row_cells<Cells>(a, c, cols);
  }
}

// The g-th group of kRows lanes, by registers: a round trip through memory would stall on store forwarding.
template <class Part>
FASTATTN_INLINE Part lanes_part(vi x, int g) {
#if VB == 64
  return (Part)(g == 0 ? _mm512_castsi512_si256((__m512i)x) : _mm512_extracti64x4_epi64((__m512i)x, 1));
#elif VB == 32
  return (Part)(g == 0 ? _mm256_castsi256_si128((__m256i)x) : _mm256_extracti128_si256((__m256i)x, 1));
#else
  (void)g;
  return (Part)x;
#endif
}

// Two rows (one for floats) into the grouped layout of product_groups: to[group][pair index k][kRows], group_ld cells
// between groups. `cols` is padded with zeros to a multiple of kRows. Returns lanes set at inf or NaN.
template <class Cells, class T>
FASTATTN_INLINE vi group_rows(const T* a, const T* b, int64_t cols, int64_t k, int64_t group_ld, float* to) {
  vi bad = splat_i(0);
  typedef int32_t part __attribute__((vector_size(kRows * 4), aligned(4), may_alias));
  int64_t c = 0;
#if VB == 64
  if constexpr (Cells::kPerCell == 2) {  // 32 columns at a time, while both rows have them
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i most = _mm512_setzero_si512();  // magnitudes: the largest tells of inf and NaN
    for (; b != nullptr && c + 2 * VL <= cols; c += 2 * VL) {
      __m512i x = (__m512i)load_i(a + c), y = (__m512i)load_i(b + c), sign = _mm512_set1_epi16(0x7fff);
      most = _mm512_max_epu16(most, _mm512_max_epu16(_mm512_and_si512(x, sign), _mm512_and_si512(y, sign)));
      vi cells[2] = {(vi)_mm512_permutex2var_epi16(x, low, y), (vi)_mm512_permutex2var_epi16(x, high, y)};
      float* at = to + c / kRows * group_ld + k * kRows;
      for (int g = 0; g < 4; ++g) *reinterpret_cast<part*>(at + g * group_ld) = lanes_part<part>(cells[g / 2], g % 2);
    }
    bad = not_finite((vi)most << 16) | not_finite((vi)most);
  }
#endif
  for (; c < cols; c += VL) {
    vi x = column_cells<Cells>(a, b, c, cols);
    bad |= Cells::kPerCell == 2 ? not_finite(x << 16) | not_finite(x) : not_finite(x);
    float* at = to + c / kRows * group_ld + k * kRows;
#pragma GCC unroll 4
    for (int g = 0; g < VL / kRows; ++g)
      if (c + g * kRows < cols) *reinterpret_cast<part*>(at + g * group_ld) = lanes_part<part>(x, g);
  }
  return bad;
}

// Rows that will be read (or written) soon, fetched into L2 a few at a time between products.
struct Ahead {
  const char* base = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0, done = 0;
  inline void fetch(int64_t count) {
    for (int64_t end = min64(rows, done + count); done < end; ++done)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(base + done * stride + i, 0, 2);
  }
};

template <class T>
FASTATTN_INLINE Ahead ahead(const T* rows, int64_t stride, int64_t cols, int64_t count) {
  constexpr int64_t size = sizeof(T);
  return {reinterpret_cast<const char*>(rows), stride * size, cols * size, max64(0, count), 0};
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
