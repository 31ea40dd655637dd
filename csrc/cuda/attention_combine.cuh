#pragma once
#include <attention_decode_params.h>

#include <ptx/convert.cuh>
#include <ptx/math.cuh>
#include <tile/reduce.cuh>
#include <tile/rows.cuh>
#include <tile/softmax.cuh>
#include <tile/uniform.cuh>

constexpr int kCombineWarps = 8;
constexpr int kCombineAhead = 4;  // splits whose loads a warp has under way

__forceinline__ float combine_max(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// o and lse of 8 / warps_per_row rows from their splits: lse = logaddexp, o weighted by 2^lse. Splits are always added in
// the same order: warp w of a row adds splits w, w + warps_per_row, …, then the warps' sums are added.
// Grid: cdiv(rows, 8 / warps_per_row), 256 threads. Shared memory: 8 · headdim_v floats.
// Bound by memory: 4 · num_splits · (headdim_v + 1) bytes read per row, those of splits without keys not at all.
// Dao et al., Flash-Decoding (2023).
template <class T>
__global__ void __launch_bounds__(32 * kCombineWarps) attention_combine_kernel(const __grid_constant__ AttentionCombineParams p) {
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int helpers = p.warps_per_row, own = warp % helpers;
  const int row = static_cast<int>(blockIdx.x) * (kCombineWarps / helpers) + warp / helpers;
  const bool live = row < p.rows;                           // the same for all warps of a row
  float* sums = reinterpret_cast<float*>(shared_memory());  // [8, headdim_v]
  const float* part_lse = p.part_lse + (live ? row : 0);

  float top = -infinity(), sum[1] = {0.0f};
#pragma unroll 1
  for (int s = lane; s < p.num_splits; s += 32) top = fmaxf(top, part_lse[static_cast<i64>(s) * p.rows]);
  top = combine_max(top);
  const float shift = top == -infinity() ? 0.0f : top;
#pragma unroll 1
  for (int s = lane; s < p.num_splits; s += 32) sum[0] += exp2_approx(part_lse[static_cast<i64>(s) * p.rows] - shift);
  sum_lanes(sum, 32);
  const float total = sum[0];

#pragma unroll 1
  for (int first = 0; first < p.headdim_v; first += 128) {
    const int d = first + lane * 4;
    const bool inside = d < p.headdim_v;
    float acc[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[j] = 0.0f;
#pragma unroll 1
    for (int s0 = own; s0 < p.num_splits; s0 += 32 * helpers) {  // lane i holds the weight of split s0 + i · helpers
      const int mine = s0 + lane * helpers;
      const float weight = mine < p.num_splits ? exp2_approx(part_lse[static_cast<i64>(mine) * p.rows] - shift) : 0.0f;
      const int count = min(32, (p.num_splits - s0 + helpers - 1) / helpers);
#pragma unroll 1
      for (int i = 0; i < count; i += kCombineAhead) {
        float share[kCombineAhead], x[kCombineAhead][4];
#pragma unroll
        for (int u = 0; u < kCombineAhead; ++u) {
          share[u] = __shfl_sync(0xffffffffu, weight, i + u);
          const i64 from = (static_cast<i64>(s0 + (i + u) * helpers) * p.rows + row) * p.headdim_v + d;
          const bool counts = live && inside && share[u] != 0.0f;
          to_floats(x[u], counts ? load_pack<float, 4, true>(p.part + from) : splat<float, 4>(0.0f));
        }
#pragma unroll
        for (int u = 0; u < kCombineAhead; ++u) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[j] = fmaf(share[u], x[u][j], acc[j]);
        }
      }
    }
    if (inside) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[warp * p.headdim_v + d + j] = acc[j];
    }
  }
  __syncthreads();
  if (!live) return;
  const bool empty = total == 0.0f;
  const float inverse = rcp_approx(empty ? 1.0f : total);
  const float* mine = sums + (warp - own) * p.headdim_v;
  T* o = static_cast<T*>(p.o) + static_cast<i64>(row) * p.headdim_v;
#pragma unroll 1
  for (int d = own * 32 + lane; d < p.headdim_v; d += helpers * 32) {
    float x = 0.0f;
#pragma unroll 1
    for (int w = 0; w < helpers; ++w) x += mine[w * p.headdim_v + d];
    o[d] = from_float<T>(x * inverse);
  }
  if (own == 0 && lane == 0) {
    const int h = row % p.nheads, m = row / p.nheads % p.seqlen_q, b = row / p.nheads / p.seqlen_q;
    p.lse[(static_cast<i64>(b) * p.nheads + h) * p.seqlen_q + m] = log_sum(shift, total);
  }
}
