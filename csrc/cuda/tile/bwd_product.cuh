// Products of one warp on tiles in TileLayout: a · bᵀ for scores, a · b for gradients. Sums are accumulators of
// mma_m16n8k16, [16 kRows, 8 kTiles] per warp. `a_tile` and `b_tile` point at the first row that the warp reads.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <tile/product.cuh>
#include <tile/swizzle.cuh>

// A constant as an argument.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <int kRows, int kTiles>
__forceinline__ void clear(float (&x)[kRows][kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[r][j][e] = 0.0f;
    }
  }
}

// sum + a bᵀ: rows of both tiles are equally wide. kTiles is even. Panels are walked in a loop that stays one, so that the
// compiler does not gather operands of the whole product in registers.
template <class T, class A, class B, int kRows, int kTiles>
__forceinline__ void add_product_transposed(float (&sum)[kRows][kTiles][4], const u8* a_tile, const u8* b_tile) {
  static_assert(kTiles % 2 == 0 && A::kPanel == B::kPanel && A::kPanels == B::kPanels, "");
  int lane_a = A::lane_a(), lane_b = B::lane_b();
#pragma unroll 1
  for (int panel = 0; panel < A::kPanels; ++panel, a_tile += A::kPanelBytes, b_tile += B::kPanelBytes) {
#pragma unroll
    for (int step = 0; step < A::kPanel / 16; ++step) {
      u32 a[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) load_a<A>(a[r], a_tile, lane_a, 16 * r, step);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        u32 b[4];
        load_b<B>(b, b_tile, lane_b, 8 * j, step);
#pragma unroll
        for (int r = 0; r < kRows; ++r) mma_m16n16k16<T>(sum[r][j], sum[r][j + 1], a[r], b);
      }
    }
  }
}

// sum + a b for 16 rows of the tile, from `row` on, which are summed over; a is their A operand. Of the tile's columns, in
// groups of 16, the warp owns every kSplit-th from group `part` on: 16 (kSplit · j + part).
template <class T, class B, int kSplit, int kRows, int kTiles>
__forceinline__ void add_product_step(float (&sum)[kRows][kTiles][4], const u32 (&a)[kRows][4], const u8* b_tile, int lane,
                                      int row) {
  static_assert(kTiles % 2 == 0 && (kSplit == 1 || kSplit == 2), "");
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {
    u32 b[4];
    load_b_transposed<B>(b, b_tile, lane, row, kSplit * j);
#pragma unroll
    for (int r = 0; r < kRows; ++r) mma_m16n16k16<T>(sum[r][2 * j], sum[r][2 * j + 1], a[r], b);
  }
}
// `lane` of the above: group part of the first kSplit, because TileLayout::move exchanges by the same bit.
template <class B>
__forceinline__ int lane_of_part(int part) {
  return B::lane_a() ^ part << 5;
}

// sum + a b for a in registers, an accumulator that is rounded to T. b_tile: the first row that is summed over.
template <class T, class B, int kSplit, int kRows, int kTiles, int kCols8>
__forceinline__ void add_product(float (&sum)[kRows][kTiles][4], const float (&a)[kRows][kCols8][4], const u8* b_tile, int part) {
  int lane = lane_of_part<B>(part);
#pragma unroll
  for (int step = 0; step < kCols8 / 2; ++step) {
    u32 a_reg[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) pack_a<T>(a_reg[r], a[r], step);
    add_product_step<T, B, kSplit>(sum, a_reg, b_tile, lane, 16 * step);
  }
}

// The same for a in a tile: its columns from 16 a_group on, 16 kSteps of them.
template <class T, class A, class B, int kSteps, int kSplit, int kRows, int kTiles>
__forceinline__ void add_product(float (&sum)[kRows][kTiles][4], const u8* a_tile, int a_group, const u8* b_tile, int part) {
  int lane = lane_of_part<B>(part);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    int lane_a = A::move(A::lane_a(), 0, a_group + step);
    u32 a[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) load_a<A>(a[r], a_tile, lane_a, 16 * r, 0);
    add_product_step<T, B, kSplit>(sum, a, b_tile, lane, 16 * step);
  }
}

// sum + aᵀ b, both tiles [16 kSteps, …], whose rows are summed over: 16 kRows columns of a from 16 a_group on and 8 kTiles of b
// from 16 b_group on. Read through lane_b, what load_b_transposed gives is the A of the transposed tile.
template <class T, class A, class B, int kSteps, int kRows, int kTiles>
__forceinline__ void add_product_of_columns(float (&sum)[kRows][kTiles][4], const u8* a_tile, const u8* b_tile, int a_group,
                                            int b_group) {
  static_assert(kTiles % 2 == 0, "");
  int at_a[kRows], at_b[kTiles / 2];
#pragma unroll
  for (int r = 0; r < kRows; ++r) at_a[r] = A::move(A::lane_b(), 0, a_group + r);
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) at_b[j] = B::move(B::lane_a(), 0, b_group + j);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    u32 a[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) load_b_transposed<A>(a[r], a_tile, at_a[r], 16 * step, 0);
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      u32 b[4];
      load_b_transposed<B>(b, b_tile, at_b[j], 16 * step, 0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) mma_m16n16k16<T>(sum[r][2 * j], sum[r][2 * j + 1], a[r], b);
    }
  }
}

// Writes x · factor as T to a tile: rows from `row` on, columns as add_product_step has them, or with kSplit 1 from group
// `part` of 16 on.
template <class T, class Layout, int kSplit, int kRows, int kTiles>
__forceinline__ void put_accumulator(u8* tile, const float (&x)[kRows][kTiles][4], float factor, int row, int part) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      int chunk = 2 * (kSplit * (j / 2) + part) + j % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u8* to = tile + Layout::at(row + 16 * r + 8 * half + (lane >> 2), chunk) + 4 * (lane & 3);
        *reinterpret_cast<u32*>(to) = pack<T>(x[r][j][2 * half] * factor, x[r][j][2 * half + 1] * factor);
      }
    }
  }
}
