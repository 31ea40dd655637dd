#pragma once
#include <norm_fwd.cuh>

// norm_fwd_kernel for a row that neither the registers of a block nor those of a cluster hold. First every thread sums the
// packs it owns, kPacks at a time in its registers: mean and centred squares of these, merged into those of all before
// them (Chan, Golub & LeVeque 1979), and the threads' results likewise. Then the row is read again and normalised.
// Grid: rows. Shared memory: 320 bytes. Bound by memory: as norm_fwd_kernel while the rows in work fit the L2 cache
// (blocks · cols · sizeof(T)), else x, and the residual, are read twice: 2/3 of that speed. Not measured.
template <class T, class W, int kWidth, int kPacks>
__global__ void __launch_bounds__(kNormLongThreads, 2) norm_fwd_long_kernel(const __grid_constant__ NormFwdParams p) {
  constexpr u32 kNext = kNormLongThreads * kWidth, kChunk = kNext * kPacks;
  const u32 row = blockIdx.x, first = threadIdx.x * kWidth;
  const T* from = static_cast<const T*>(p.x) + row_start(row, p.x_size, p.x_stride);
  const bool added = p.residual != nullptr, centred = p.mean != nullptr;
  const T* residual = added ? static_cast<const T*>(p.residual) + row_start(row, p.residual_size, p.residual_stride) : nullptr;
  T* sum = static_cast<T*>(p.sum) + static_cast<i64>(row) * p.cols;
  T* y = static_cast<T*>(p.y) + static_cast<i64>(row) * p.cols;
  auto* scratch = reinterpret_cast<SumScratch<1>*>(shared_memory());  // [2]

  Pack<T, kWidth> x[kPacks];
  auto load = [&](u32 start) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = start + i * kNext;
      x[i] = n < p.cols ? load_pack<T, kWidth, true>(from + n) : splat<T, kWidth>(0.0f);
    }
    if (added) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const u32 n = start + i * kNext;
        if (n < p.cols) x[i] = norm_add(x[i], load_pack<T, kWidth, true>(residual + n));
      }
    }
  };

  float count = 0.0f, mean = 0.0f, spread = 0.0f;  // of this thread's columns so far; spread: sum of (x - mean)²
  for (u32 start = first; start < p.cols; start += kChunk) {
    load(start);
    float more = 0.0f, total[1] = {0.0f}, mid = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = start + i * kNext;
      if (n < p.cols) {
        float v[kWidth];
        to_floats(v, x[i]);
        more += kWidth;
        if (added) store_pack(sum + n, x[i]);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[0] += v[e];
      }
    }
    if (centred) mid = total[0] / more;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (start + i * kNext < p.cols) {
        float v[kWidth];
        to_floats(v, x[i]);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) spread = fmaf(v[e] - mid, v[e] - mid, spread);
      }
    }
    const float apart = mid - mean, share = more / (count + more);
    spread = fmaf(apart * apart, count * share, spread);
    mean = fmaf(apart, share, mean);
    count += more;
  }
  const float cols = p.cols;
  float total[1] = {mean * count};
  sum_block(total, scratch[0]);
  const float apart = mean - total[0] / cols;
  mean = total[0] / cols;
  total[0] = fmaf(apart * apart, count, spread);
  sum_block(total, scratch[1]);
  const float rstd = 1.0f / sqrtf(total[0] / cols + p.eps);
  if (threadIdx.x == 0) {
    if (centred) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }

  for (u32 start = first; start < p.cols; start += kChunk) {
    load(start);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = start + i * kNext;
      if (n < p.cols) {
        const auto weight = load_pack_or<W, kWidth>(p.weight, n, p.cols, 1.0f),
                   bias = load_pack_or<W, kWidth>(p.bias, n, p.cols, -0.0f);
        store_pack(y + n, norm_affine(x[i], mean, rstd, weight, bias, p.weight_offset, p.round_first));
      }
    }
  }
}
