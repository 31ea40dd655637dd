#pragma once
#include <norm_params.h>

#include <tile/reduce.cuh>
#include <tile/rows.cuh>

// x + residual, rounded to T.
template <class T, int kWidth>
__forceinline__ Pack<T, kWidth> norm_add(const Pack<T, kWidth>& x, const Pack<T, kWidth>& residual) {
  float a[kWidth], b[kWidth];
  to_floats(a, x);
  to_floats(b, residual);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) a[e] += b[e];
  return from_floats<T>(a);
}

// x_hat · (weight + offset) + bias; x_hat = (x - mean) · rstd is rounded to T first where the model does so.
template <class T, class W, int kWidth>
__forceinline__ Pack<T, kWidth> norm_affine(const Pack<T, kWidth>& x, float mean, float rstd, const Pack<W, kWidth>& weight,
                                            const Pack<W, kWidth>& bias, float offset, int round_first) {
  float y[kWidth], scale[kWidth], shift[kWidth];
  to_floats(y, x);
  to_floats(scale, weight);
  to_floats(shift, bias);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) y[e] = (y[e] - mean) * rstd;
  if (round_first) to_floats(y, from_floats<T>(y));
  if (offset != 0.0f) {  // one instruction in twelve
#pragma unroll
    for (int e = 0; e < kWidth; ++e) scale[e] += offset;
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) y[e] = fmaf(y[e], scale[e], shift[e]);
  return from_floats<T>(y);
}

// y = (x - mean) · rstd · weight + bias of whole rows, x + residual first where there is one.
// A row lies in the registers of the `lanes` threads that share it: thread t holds the packs of kWidth columns from
// (i · lanes + t) · kWidth on, i < kPacks. A thread works on kRows rows at once.
// Grid: cdiv(rows, kRows · threads / lanes). Shared memory: none while a warp holds the row, else 320 bytes.
// Bound by memory: 2 · sizeof(T) bytes per element, 4 · sizeof(T) with a residual. With 64 registers 1024 threads of 4 packs
// have up to 64 KiB under way per multiprocessor.
template <class T, class W, int kWidth, int kPacks, int kRows>
__global__ void __launch_bounds__(kRows > 1 ? 128 : 512, kRows > 1 ? 8 : 2)
    norm_fwd_kernel(const __grid_constant__ NormFwdParams p) {
  const Sharing<> own(p.lanes);
  const u32 block = blockIdx.x, first = own.lane * kWidth;                // the thread's first column
  const u32 next = own.lanes * kWidth;                                    // columns from pack to pack
  auto* scratch = reinterpret_cast<SumScratch<kRows>*>(shared_memory());  // [2]: of the mean, of the squares

  u32 row[kRows];
  Pack<T, kWidth> x[kRows][kPacks];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row[r] = (block * kRows + r) * own.groups + own.group;
    const T* from = static_cast<const T*>(p.x) + (row[r] < p.rows ? row_start(row[r], p.x_size, p.x_stride) : 0);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      x[r][i] = row[r] < p.rows && n < p.cols ? load_pack<T, kWidth, true>(from + n) : splat<T, kWidth>(0.0f);
    }
  }
  if (p.residual != nullptr) {
    Pack<T, kWidth> residual[kRows][kPacks];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T* from =
          static_cast<const T*>(p.residual) + (row[r] < p.rows ? row_start(row[r], p.residual_size, p.residual_stride) : 0);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const u32 n = first + i * next;
        if (row[r] < p.rows && n < p.cols) residual[r][i] = load_pack<T, kWidth, true>(from + n);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      T* sum = static_cast<T*>(p.sum) + static_cast<i64>(row[r]) * p.cols;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const u32 n = first + i * next;
        if (row[r] < p.rows && n < p.cols) {
          x[r][i] = norm_add(x[r][i], residual[r][i]);
          store_pack(sum + n, x[r][i]);
        }
      }
    }
  }
  constexpr bool kEarly = sizeof(W) == sizeof(T);  // the weights are under way while the statistics are summed
  Pack<W, kWidth> weight[kPacks];
  if constexpr (kEarly) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) weight[i] = load_pack_or<W, kWidth>(p.weight, first + i * next, p.cols, 1.0f);
  }

  const float cols = p.cols;
  float mean[kRows], rstd[kRows], total[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) mean[r] = total[r] = 0.0f;
  if (p.mean != nullptr) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float v[kWidth];
        to_floats(v, x[r][i]);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[r] += v[e];
      }
    }
    sum_row<false>(total, own, scratch[0]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      mean[r] = total[r] / cols;
      total[r] = 0.0f;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (first + i * next < p.cols) {
        float v[kWidth];
        to_floats(v, x[r][i]);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[r] = fmaf(v[e] - mean[r], v[e] - mean[r], total[r]);
      }
    }
  }
  sum_row<false>(total, own, scratch[1]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rstd[r] = 1.0f / sqrtf(total[r] / cols + p.eps);
    if (first == 0 && row[r] < p.rows) {
      if (p.mean != nullptr) p.mean[row[r]] = mean[r];
      p.rstd[row[r]] = rstd[r];
    }
  }

#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const u32 n = first + i * next;
    if (n < p.cols) {
      if constexpr (!kEarly) weight[i] = load_pack_or<W, kWidth>(p.weight, n, p.cols, 1.0f);
      const auto bias = load_pack_or<W, kWidth>(p.bias, n, p.cols, -0.0f);  // y - 0 is y, -0 included
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row[r] < p.rows) {
          T* y = static_cast<T*>(p.y) + static_cast<i64>(row[r]) * p.cols;
          store_pack(y + n, norm_affine(x[r][i], mean[r], rstd[r], weight[i], bias, p.weight_offset, p.round_first));
        }
      }
    }
  }
}
