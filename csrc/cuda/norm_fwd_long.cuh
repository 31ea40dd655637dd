#pragma once
#include <norm_fwd.cuh>

constexpr int kNormLongCopies = 8;  // groups of copies that a thread has under way at most

// norm_fwd_kernel for a row that the registers of a block do not hold. First every thread sums the packs it owns, kPacks at a
// time in its registers: mean and centred squares of these, merged into those of all before them (Chan, Golub & LeVeque
// 1979), and the threads' results likewise. Then it normalises its packs. kStaged: shared memory holds them from the one pass
// to the other, and all of them are under way from the start; a thread reads what it has copied itself, so that no barrier
// stands between. Otherwise the row is read again. In a cluster, whose blocks are as many as shared memory needs, each has
// a piece of `piece` columns.
// Grid: rows, times the blocks of a cluster. Shared memory: 320 bytes, then the block's piece of x, and of the residual
// where packs are 16 bytes. Bound by memory: 2 · sizeof(T) bytes per element, 4 · sizeof(T) with a residual, and from the L2
// cache the weights once per row; not staged, x and the residual once more, from the L2 cache while the rows in work fit it.
template <class T, class W, int kWidth, int kPacks, bool kStaged, bool kCluster>
__global__ void __launch_bounds__(kNormLongThreads, 2) norm_fwd_long_kernel(const __grid_constant__ NormFwdParams p) {
  constexpr u32 kNext = kNormLongThreads * kWidth, kChunk = kNext * kPacks;
  constexpr bool kCopied = kStaged && kBy16<T, kWidth>;
  u32 row = blockIdx.x, first = threadIdx.x * kWidth, begin = 0, end = p.cols;  // of the block's piece
  if constexpr (kCluster) {
    cluster_arrive();
    row /= cluster_size();
    begin = cluster_rank() * p.piece;
    end = min(end, begin + p.piece);
  }
  first += begin;
  const T* from = static_cast<const T*>(p.x) + row_start(row, p.x_size, p.x_stride);
  const bool added = p.residual != nullptr, centred = p.mean != nullptr;
  const T* residual = added ? static_cast<const T*>(p.residual) + row_start(row, p.residual_size, p.residual_stride) : nullptr;
  T* sum = static_cast<T*>(p.sum) + static_cast<i64>(row) * p.cols;
  T* y = static_cast<T*>(p.y) + static_cast<i64>(row) * p.cols;
  auto* scratch = reinterpret_cast<SumScratch<1>*>(shared_memory());                      // [2]
  T* staged = reinterpret_cast<T*>(shared_memory() + 2 * sizeof(SumScratch<1>)) - begin;  // [begin, end) of x, or of the sum
  T* staged_residual = staged + p.piece;

  if constexpr (kCopied) {
    u32 start = first;
    for (int group = 0; group < kNormLongCopies; ++group, start += kChunk) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const u32 n = start + i * kNext;
        if (n < end) {
          cp_async_16(staged + n, from + n);
          if (added) cp_async_16(staged_residual + n, residual + n);
        }
      }
      cp_async_commit();
    }
  }

  Pack<T, kWidth> x[kPacks];
  auto load = [&](u32 start) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = start + i * kNext;
      if constexpr (kCopied) {
        x[i] = n < end ? load_shared_pack<T, kWidth>(staged + n) : splat<T, kWidth>(0.0f);
      } else {
        x[i] = n < end ? load_pack<T, kWidth, true>(from + n) : splat<T, kWidth>(0.0f);
      }
    }
    if (added) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const u32 n = start + i * kNext;
        if (n >= end) continue;
        if constexpr (kCopied) {
          x[i] = norm_add(x[i], load_shared_pack<T, kWidth>(staged_residual + n));
        } else {
          x[i] = norm_add(x[i], load_pack<T, kWidth, true>(residual + n));
        }
      }
    }
  };

  float count = 0.0f, mean = 0.0f, spread = 0.0f;  // of this thread's columns so far; spread: sum of (x - mean)²
  for (u32 start = first; start < end; start += kChunk) {
    if constexpr (kCopied) {  // an empty group for every one that must be there
      cp_async_commit();
      cp_async_wait<kNormLongCopies>();
    }
    load(start);
    float more = 0.0f, total[1] = {0.0f}, mid = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = start + i * kNext;
      if (n < end) {
        float v[kWidth];
        to_floats(v, x[i]);
        more += kWidth;
        if (added) store_pack(sum + n, x[i]);
        if constexpr (kStaged) {
          if (added || !kCopied) store_shared_pack(staged + n, x[i]);
        }
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[0] += v[e];
      }
    }
    if (centred) mid = total[0] / more;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (start + i * kNext < end) {
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
  if constexpr (kCluster) cluster_wait();
  auto sum_all = [](float (&x)[1], SumScratch<1>& with) {
    if constexpr (kCluster) {
      sum_cluster(x, with);
    } else {
      sum_block(x, with);
    }
  };
  const float cols = p.cols;
  float total[1] = {mean * count};
  sum_all(total, scratch[0]);
  const float apart = mean - total[0] / cols;
  mean = total[0] / cols;
  total[0] = fmaf(apart * apart, count, spread);
  sum_all(total, scratch[1]);
  const float rstd = 1.0f / sqrtf(total[0] / cols + p.eps);
  if (first == 0) {
    if (centred) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }

  for (u32 start = first; start < end; start += kChunk) {
    if constexpr (!kStaged) load(start);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = start + i * kNext;
      if (n < end) {
        if constexpr (kStaged) x[i] = load_shared_pack<T, kWidth>(staged + n);
        const auto weight = load_pack_or<W, kWidth>(p.weight, n, p.cols, 1.0f),
                   bias = load_pack_or<W, kWidth>(p.bias, n, p.cols, -0.0f);
        store_pack(y + n, norm_affine(x[i], mean, rstd, weight, bias, p.weight_offset, p.round_first));
      }
    }
  }
}
