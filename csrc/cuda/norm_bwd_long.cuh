#pragma once
#include <norm_bwd.cuh>

constexpr int kNormColumnsWarps = 8;

// dx of a row that norm_bwd_kernel cannot hold: the two means, then the row is read again.
// Grid: rows. Shared memory: 320 bytes. Bound by memory: 3 · sizeof(T) bytes per element while the rows in work fit the L2
// cache, else 5 · sizeof(T). Not measured.
template <class T, class W, int kWidth, int kPacks>
__global__ void __launch_bounds__(kNormLongThreads, 1) norm_bwd_long_kernel(const __grid_constant__ NormBwdParams p) {
  constexpr u32 kNext = kNormLongThreads * kWidth, kChunk = kNext * kPacks;
  const u32 row = blockIdx.x, first = threadIdx.x * kWidth;
  const float share = 1.0f / p.cols;
  auto* scratch = reinterpret_cast<SumScratch<2>*>(shared_memory());  // [1]

  NormBwdQueue<T, kWidth, kPacks, 1, false> part;
  auto terms = [&](int i, u32 n, float (&x_hat)[kWidth], float (&g)[kWidth]) {
    float dy[kWidth];
    to_floats(dy, part.dy(i));
    const auto weight = load_pack_or<W, kWidth>(p.weight, n, p.cols, 1.0f);
    norm_bwd_terms(part.x(i), dy, part.mean[0], part.rstd[0], weight, p.weight_offset, x_hat, g);
  };
  float sums[2] = {0.0f, 0.0f};  // of g · x_hat, of g
  for (u32 start = first; start < p.cols; start += kChunk) {
    part.replace(p, row, start, kNext);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float x_hat[kWidth], g[kWidth];
      terms(i, start + i * kNext, x_hat, g);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        sums[0] = fmaf(g[e], x_hat[e], sums[0]);
        sums[1] += g[e];
      }
    }
  }
  sum_block(sums, scratch[0]);
  const float with_x = sums[0] * share, alone = p.mean != nullptr ? sums[1] * share : 0.0f;

  T* dx = static_cast<T*>(p.dx) + static_cast<i64>(row) * p.cols;
  const T* dsum = p.dsum != nullptr ? static_cast<const T*>(p.dsum) + row_start(row, p.dsum_size, p.dsum_stride) : nullptr;
  for (u32 start = first; start < p.cols; start += kChunk) {
    part.replace(p, row, start, kNext);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = start + i * kNext;
      if (n < p.cols) {
        float x_hat[kWidth], g[kWidth], d[kWidth];
        terms(i, n, x_hat, g);
        to_floats(d, dsum != nullptr ? load_pack<T, kWidth, true>(dsum + n) : splat<T, kWidth>(0.0f));
#pragma unroll
        for (int e = 0; e < kWidth; ++e) d[e] = fmaf(part.rstd[0], fmaf(-x_hat[e], with_x, g[e] - alone), d[e]);
        store_pack(dx + n, from_floats<T>(d));
      }
    }
  }
}

// Partial sums of dweight and dbias for such rows: of every group of rows (blockIdx.y) over 32 · kWidth columns (blockIdx.x).
// Warp w adds the rows w, w + 8, … of its group, kRows of them under way at once; then the warps' sums are added in order.
// Grid: (cdiv(cols, 32 · kWidth), groups). Shared memory: 1024 · kWidth bytes.
// Bound by memory: x and dy are read once more, 2 · sizeof(T) bytes per element. Not measured.
template <class T, int kWidth, int kRows>
__global__ void __launch_bounds__(32 * kNormColumnsWarps) norm_bwd_columns_kernel(const __grid_constant__ NormBwdParams p) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, step = gridDim.y * kNormColumnsWarps;
  const u32 n = (blockIdx.x * 32 + lane) * kWidth;
  auto* gathered = reinterpret_cast<float*>(shared_memory());  // [warps][32 · kWidth]
  float dweight[kWidth], dbias[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) dweight[e] = dbias[e] = 0.0f;
  if (n < p.cols) {
    for (u32 start = blockIdx.y * kNormColumnsWarps + warp; start < p.rows; start += step * kRows) {
      NormBwdQueue<T, kWidth, 1, 1, false> rows[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) rows[r].replace(p, start + r * step, n, 0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float x[kWidth], dy[kWidth];
        to_floats(x, rows[r].x(0));
        to_floats(dy, rows[r].dy(0));
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          dweight[e] = fmaf(dy[e], (x[e] - rows[r].mean[0]) * rows[r].rstd[0], dweight[e]);
          dbias[e] += dy[e];
        }
      }
    }
  }
  auto write = [&](float* partial, const float (&own)[kWidth]) {
    if (partial == nullptr) return;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kWidth; ++e) gathered[(warp * 32 + lane) * kWidth + e] = own[e];
    __syncthreads();
    for (u32 i = threadIdx.x; i < 32 * kWidth; i += blockDim.x) {
      const u32 column = blockIdx.x * 32 * kWidth + i;
      float total = 0.0f;
      for (u32 w = 0; w < kNormColumnsWarps; ++w) total += gathered[w * 32 * kWidth + i];
      if (column < p.cols) partial[static_cast<i64>(blockIdx.y) * p.cols + column] = total;
    }
  };
  write(p.dweight, dweight);
  write(p.dbias, dbias);
}
