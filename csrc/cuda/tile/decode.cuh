// Keys and values where they lie in a cache, paged or not, and one row of queries on its own.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <tile/copy.cuh>
#include <tile/reduce.cuh>
#include <tile/score.cuh>
#include <tile/softmax.cuh>

// One sequence of the cache. Key n lies in slot n % block_size of block table[n / block_size]; not paged, in slot n of
// "block" b.
struct CacheSequence {
  struct Place {
    int block, slot;
  };
  const int* table;  // null: not paged
  int b, block_size;

  __forceinline__ Place find(int n) const {
    if (table == nullptr) return {b, n};
    const int i = n / block_size;
    return {table[i], n - i * block_size};
  }
};
template <class Params>
__forceinline__ CacheSequence cache_sequence(const Params& p, int b) {
  return {p.block_table == nullptr ? nullptr : p.block_table + b * p.block_table_stride, b, p.block_size};
}
// A row of a head that starts at `head` in slot 0 of block 0.
template <class T>
__forceinline__ const T* row_at(const T* head, const i64 (&stride)[3], CacheSequence::Place at) {
  return head + at.block * stride[0] + at.slot * stride[1];
}

// Layout::at(row + r, chunk) from at(row, chunk), for a row below 32 / kChunks and r a multiple of that.
template <class Layout>
__forceinline__ int rows_later(int at, int r) {
  return (Layout::kPanel == 64 ? at ^ (r & 7) << 4 : at) + r * Layout::kRowBytes;
}

// A warp starts to copy rows [first, first + kShare) of a tile; lane l < kShare says in `place` where row first + l comes
// from. Rows from nullptr and columns from `columns` on become 0 and are not read. As for copy_rows_async, the caller
// commits and waits, and without `aligned` the copy is slow. first is a multiple of 8.
template <class Layout, int kShare, class T>
__forceinline__ void copy_placed_rows(u8* tile, int first, const T* place, int columns, bool aligned) {
  constexpr int kTogether = 32 / Layout::kChunks;  // rows that the warp copies at once
  static_assert(kShare % kTogether == 0 && kShare <= 32, "");
  const int lane = threadIdx.x % 32, row = lane / Layout::kChunks, chunk = lane % Layout::kChunks;
  u8* const to = tile + first * Layout::kRowBytes;
  const int from_row = Layout::at(row, chunk);
  const u64 address = reinterpret_cast<u64>(place);
  if (aligned) {
#pragma unroll
    for (int r = 0; r < kShare; r += kTogether) {
      const T* from = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, address, row + r));
      u8* const to_row = to + rows_later<Layout>(from_row, r);
#pragma unroll
      for (int panel = 0; panel < Layout::kPanels; ++panel) {
        const int d = panel * Layout::kPanel + chunk * 8;
        cp_async_16(to_row + panel * Layout::kPanelBytes, from + d, from != nullptr && d < columns);
      }
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < kShare; r += kTogether) {
      const T* from = reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, address, row + r));
#pragma unroll 1
      for (int panel = 0; panel < Layout::kPanels; ++panel) {
        const int d = panel * Layout::kPanel + chunk * 8;
        store_shared_16(to + rows_later<Layout>(from_row, r) + panel * Layout::kPanelBytes,
                        gather_8(from + d, from != nullptr ? columns - d : 0));
      }
    }
  }
}

// Eight elements as floats.
template <class T>
__forceinline__ void widen_8(float (&x)[8], uint4 bits) {
  const u32 word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(word[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// One row of queries against keys [first, last), one by one, by a warp: lane l has columns [8 l, 8 l + 8) of every row. A
// key outside of the range is not even multiplied by 0, so that what it holds does not matter. q, k and v stand at the
// row's head; top and total come in as the sink leaves them; acc is not divided by total.
template <class T, class Params>
__forceinline__ void attend_row(const Params& p, const CacheSequence& cache, const T* q, const T* k, const T* v, int aligned_with,
                                int first, int last, const ScoreRule& rule, float (&acc)[8], float& top, float& total) {
  const int d = threadIdx.x % 32 * 8;
  float q_row[8], x[8];
  widen_8<T>(q_row, gather_8(q + d, p.headdim - d));
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.0f;
#pragma unroll 1
  for (int n = first; n < last; ++n) {
    const CacheSequence::Place at = cache.find(n);
    widen_8<T>(x, gather_8(row_at(k, p.k_stride, at) + d, p.headdim - d));
    float product[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < 8; ++i) product[0] = fmaf(q_row[i], x[i], product[0]);
    sum_lanes(product, 32);
    const float s = log2_score(rule, product[0], static_cast<float>(aligned_with - n));
    const float raised = fmaxf(top, s), shift = raised == -infinity() ? 0.0f : raised;
    const float share = exp2_approx(top - shift), weight = exp2_approx(s - shift);
    top = raised;
    total = fmaf(total, share, weight);
    widen_8<T>(x, gather_8(row_at(v, p.v_stride, at) + d, p.headdim_v - d));
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] = fmaf(weight, x[i], acc[i] * share);
  }
}
