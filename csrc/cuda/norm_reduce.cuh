#pragma once
#include <norm_params.h>

#include <ptx/convert.cuh>

// dweight (blockIdx.y = 0) or dbias (1) of 512 / helpers columns: the sum of the partial sums of all groups of rows. Each 32
// columns belong to `helpers` warps, of which the w-th adds the groups w, w + helpers, …; then the warps' sums are added in
// order. There are no atomics, so the bits are the same every time.
// Grid: (cdiv(cols, 512 / helpers), 2). Shared memory: 2 KiB. Bound by the L2 cache: 4 · groups bytes per column.
template <class W>
__global__ void __launch_bounds__(512) norm_reduce_kernel(const __grid_constant__ NormReduceParams p) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, helpers = p.helpers;
  const u32 n = (blockIdx.x * (16 / helpers) + warp / helpers) * 32 + lane, own = warp % helpers;
  const float* partial = blockIdx.y == 0 ? p.dweight_partial : p.dbias_partial;
  W* out = static_cast<W*>(blockIdx.y == 0 ? p.dweight : p.dbias);
  if (partial == nullptr) return;
  auto* gathered = reinterpret_cast<float*>(shared_memory());  // [warps][32]
  float total = 0.0f;
  if (n < p.cols) {
#pragma unroll 8
    for (u32 group = own; group < p.groups; group += helpers) total += partial[static_cast<i64>(group) * p.cols + n];
  }
  gathered[threadIdx.x] = total;
  __syncthreads();
  if (own == 0 && n < p.cols) {
    for (u32 w = 1; w < helpers; ++w) total += gathered[threadIdx.x + w * 32];
    out[n] = from_float<W>(total);
  }
}
