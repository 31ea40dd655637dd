// The one product inside attention: C[i][lane] (+)= sum_k A(i, k) * B[k][lane], a small block of rows by kM lanes.
// A is broadcast cell by cell from memory in its natural layout, B and C have kM lanes per row. A cell is 4 bytes: a
// float, or a pair of bf16 along k for the dot-product instruction. See docs/design/cpu-attention.md for the shapes.
#pragma once
#include <type_traits>

#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Register block: kRows x kVecs accumulators, kVecs B vectors and one broadcast fill the register file.
#if VB == 64
constexpr int kRows = 8, kVecs = 2;
#else
constexpr int kRows = 4, kVecs = 3;
#endif
constexpr int kM = kVecs * VL;  // lanes: query rows (or head columns in backward) handled side by side

struct FloatCells {
  static constexpr int kPerCell = 1;
  FASTATTN_INLINE vf mul_add(vf acc, const float* a, vf b) { return fma(splat(*a), b, acc); }
};

#if defined(__AVX512BF16__)
struct PairCells {
  static constexpr int kPerCell = 2;
  FASTATTN_INLINE vf mul_add(vf acc, const float* a, vf b) {
    int32_t pair;
    __builtin_memcpy(&pair, a, 4);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
};
#endif

// Work that has nothing to do with a product but runs beside it, in small pieces: step(v) for every vector of lanes in turn,
// one after every `every` steps of the product. A core that is busy with multiply-adds has other pipes idle; out of order
// execution alone does not look far enough ahead.
struct NoSide {};
template <int v>
using Vector = std::integral_constant<int, v>;

// The number of steps of each vector of lanes, none more than of the next: at a diagonal the first lanes end first.
struct Ends {
  int64_t of[kVecs];
};

// One register block. A(i, k) = a[i * row + k * col]. epilogue(i, v, value) takes each finished vector from kFirst on.
template <class Cells, int kFirst = 0, class Epilogue, class Side = NoSide>
FASTATTN_INLINE void block_product(const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, int64_t count,
                                   Epilogue&& epilogue, Side&& side = Side{}, const Ends* ends = nullptr) {
  vf acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[i][v] = zero();
  auto steps = [&](auto first, int64_t n) __attribute__((always_inline)) {
    for (int64_t k = 0; k < n; ++k) {
      vf bk[kVecs];
#pragma GCC unroll 4
      for (int v = first; v < kVecs; ++v) bk[v] = load(b + v * VL);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int v = first; v < kVecs; ++v) acc[i][v] = Cells::mul_add(acc[i][v], a + i * row, bk[v]);
      a += col;
      b += ldb;
    }
  };
  constexpr Vector<kFirst> all{};
  if constexpr (std::is_same_v<std::decay_t<Side>, NoSide>) {
    steps(all, count);
  } else {
    static_assert(kVecs == 2 && !std::is_void_v<Side>, "pieces for two vectors of lanes");
    auto beside = [&](auto vector) __attribute__((always_inline)) {
      int64_t n = count < side.every ? count : side.every;
      steps(all, n);
      count -= n;
      side.step(vector);
    };
    while (count > 0) {
      beside(Vector<0>{});
      beside(Vector<1>{});
    }
  }
  if (ends != nullptr) {
    if constexpr (kVecs > 1) steps(Vector<1>{}, ends->of[1] - ends->of[0]);
    if constexpr (kVecs > 2) steps(Vector<2>{}, ends->of[2] - ends->of[1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = kFirst; v < kVecs; ++v) epilogue(i, v, acc[i][v]);
}

// Accumulators start at zero and are added to C at the end: a tile's partial sum is rounded on its own scale, which
// halves the error of long sums for the price of one addition per vector.
FASTATTN_INLINE void add_to(float* c, vf x) { store(c, load(c) + x); }

// Longer chains of additions are cut: the rounding of one chain grows with its length (headdim 576 broke the law).
constexpr int64_t kChain = 128;

// C[rows][kM] = A B for `rows` a multiple of kRows; A row-major [rows][lda].
template <class Cells>
static void product_rows(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t count, float* c,
                         int64_t ldc, bool accumulate) {
  for (; count > kChain; count -= kChain, a += kChain, b += kChain * ldb, accumulate = true)
    product_rows<Cells>(a, lda, b, ldb, rows, kChain, c, ldc, accumulate);
  for (int64_t r = 0; r < rows; r += kRows, a += kRows * lda, c += kRows * ldc) {
    if (accumulate)
      block_product<Cells>(a, lda, 1, b, ldb, count, [&](int i, int v, vf x) { add_to(c + i * ldc + v * VL, x); });
    else
      block_product<Cells>(a, lda, 1, b, ldb, count, [&](int i, int v, vf x) { store(c + i * ldc + v * VL, x); });
  }
}

// A tile that is read by rows, `ld` cells apart.
struct CellRows {
  const float* at;
  int64_t ld;
};

// A tile that is read by columns: kRows neighbours at a time, `col` cells from one step of the product to the next and `group`
// from kRows columns to the next kRows.
struct Columns {
  const float* at;
  int64_t group, col;
};

// C[groups * kRows][kM] += A^T B.
template <class Cells, class Side = NoSide>
FASTATTN_INLINE void product_groups(Columns a, const float* b, int64_t ldb, int64_t groups, int64_t count, float* c, int64_t ldc,
                                    bool accumulate, Side&& side = Side{}, const Ends* ends = nullptr) {
  for (int64_t g = 0; g < groups; ++g, a.at += a.group, c += kRows * ldc) {
    if (accumulate)
      block_product<Cells>(a.at, 1, a.col, b, ldb, count, [&](int i, int v, vf x) { add_to(c + i * ldc + v * VL, x); }, side, ends);
    else
      block_product<Cells>(a.at, 1, a.col, b, ldb, count, [&](int i, int v, vf x) { store(c + i * ldc + v * VL, x); }, side, ends);
  }
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
