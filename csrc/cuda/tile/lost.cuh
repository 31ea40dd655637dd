// Values that are not finite count only for the queries that see them: 0 · NaN must not reach the others. The products run on
// tiles without such values then, and what was taken out is added to the results that it belongs to. A slow road, taken by
// blocks of queries whose results are not finite.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <tile/score.cuh>
#include <tile/swizzle.cuh>

template <class T>
__forceinline__ bool is_finite(T x) {
  return fabsf(to_float(x)) < infinity();
}

// Is any number of an accumulator NaN or infinite?
template <int kCols8>
__forceinline__ bool any_lost(const float (&acc)[kCols8][4]) {
  float lost = 0.0f;
#pragma unroll
  for (int d = 0; d < kCols8; ++d) {
#pragma unroll
    for (int e = 0; e < 4; ++e) lost = fmaf(acc[d][e], 0.0f, lost);
  }
  return lost != 0.0f;
}

// Puts 0 for what is not finite in a tile of kBytes; a barrier must follow.
template <class T, int kThreads, int kBytes>
__forceinline__ void clean_tile(u8* tile) {
  T* x = reinterpret_cast<T*>(tile);
#pragma unroll 1
  for (int i = threadIdx.x; i < kBytes / 2; i += kThreads) {
    if (!is_finite(x[i])) x[i] = from_float<T>(0.0f);
  }
}

// Adds the lost values of keys [n0, n1) to a tile of results [rows from m0 to m1, columns] in `Layout`. Each column has one
// thread. v: row 0 of the values, `stride` elements apart.
template <class T, class Layout, int kThreads, class Params>
__forceinline__ void add_lost(u8* o_tile, const Params& p, const Sequence& s, const T* v, i64 stride, int columns, int m0, int m1,
                              int n0, int n1) {
#pragma unroll 1
  for (int d = threadIdx.x; d < columns; d += kThreads) {
#pragma unroll 1
    for (int n = n0; n < n1; ++n) {
      T value = v[n * stride + d];
      if (is_finite(value)) continue;
#pragma unroll 1
      for (int m = m0; m < m1; ++m) {
        T* o = reinterpret_cast<T*>(o_tile + Layout::at(m - m0, d / 8)) + d % 8;
        if (sees<T>(p, s, m, n)) *o = from_float<T>(to_float(*o) + to_float(value));
      }
    }
  }
}
