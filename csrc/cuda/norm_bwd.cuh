#pragma once
#include <norm_params.h>

#include <tile/reduce.cuh>
#include <tile/rows.cuh>

// One row's packs of x and dy in the registers of a thread, and its statistics. Where the row ends, or there is none, zeros.
template <class T, int kWidth, int kPacks>
struct NormBwdRow {
  Pack<T, kWidth> x[kPacks], dy[kPacks];
  float mean, rstd;

  __forceinline__ void load(const NormBwdParams& p, u32 row, u32 first, u32 next) {
    const bool live = row < p.rows;
    const T* from = static_cast<const T*>(p.x) + (live ? row_start(row, p.x_size, p.x_stride) : 0);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      x[i] = live && n < p.cols ? load_pack<T, kWidth, true>(from + n) : splat<T, kWidth>(0.0f);
    }
    from = static_cast<const T*>(p.dy) + (live ? row_start(row, p.dy_size, p.dy_stride) : 0);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      dy[i] = live && n < p.cols ? load_pack<T, kWidth, true>(from + n) : splat<T, kWidth>(0.0f);
    }
    rstd = live ? p.rstd[row] : 0.0f;
    mean = live && p.mean != nullptr ? p.mean[row] : 0.0f;
  }

  // x - mean of one pack, and g = dy · weight.
  template <class W>
  __forceinline__ void terms(int i, const Pack<W, kWidth>& weight, float offset, float (&apart)[kWidth], float (&g)[kWidth]) const {
    float scale[kWidth];
    to_floats(apart, x[i]);
    to_floats(g, dy[i]);
    to_floats(scale, weight);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      apart[e] -= mean;
      g[e] *= scale[e] + offset;
    }
  }
};

// dx = rstd · (g - mean(g) - x_hat · mean(g · x_hat)) + dsum with g = dy · weight, mean(g) only for centred rows; and this
// block's partial sums of dweight = sum of dy · x_hat and dbias = sum of dy over the rows it works on.
// The `lanes` threads that share a row hold it in registers, as in norm_fwd_kernel, and load the next one meanwhile; a block
// works on threads / lanes rows at once, and on every such batch that is its turn. In a cluster the blocks share one row.
// Grid: as many blocks (clusters) as run at once, one per multiprocessor with 512 threads, so that there are few partial
// sums. Shared memory: 640 bytes, or 4 · threads · kPacks · kWidth where a block works on several rows.
// Bound by memory: 3 · sizeof(T) bytes per element (4 with dsum), and 8 · blocks / rows for the partial sums. The next row is
// always under way: 32 KiB per multiprocessor with 512 threads. 85 % of the copy bandwidth by analysis, not measured.
template <class T, class W, int kWidth, int kPacks, bool kCluster>
__global__ void __launch_bounds__(kCluster ? 384 : 512, 1) norm_bwd_kernel(const __grid_constant__ NormBwdParams p) {
  const Sharing own(p.lanes);
  u32 block = blockIdx.x, blocks = gridDim.x, first = own.lane * kWidth;
  if constexpr (kCluster) {
    cluster_arrive();
    block /= cluster_size();
    blocks /= cluster_size();
    first += cluster_rank() * own.lanes * kPacks * kWidth;
    cluster_wait();
  }
  const u32 next = own.lanes * kWidth, step = blocks * own.groups;
  auto* scratch = reinterpret_cast<SumScratch<2>*>(shared_memory());  // [2]: of even, of odd rows

  Pack<W, kWidth> weight[kPacks];
  float dweight[kPacks][kWidth], dbias[kPacks][kWidth];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    weight[i] = load_pack_or<W, kWidth>(p.weight, first + i * next, p.cols, 1.0f);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) dweight[i][e] = dbias[i][e] = 0.0f;
  }

  const float share = 1.0f / p.cols;
  NormBwdRow<T, kWidth, kPacks> now, later;
  now.load(p, block * own.groups + own.group, first, next);
  int turn = 0;
  for (u32 start = block * own.groups; start < p.rows; start += step, turn ^= 1) {
    const u32 row = start + own.group;
    Pack<T, kWidth> dsum[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) dsum[i] = splat<T, kWidth>(0.0f);
    if (p.dsum != nullptr && row < p.rows) {
      const T* from = static_cast<const T*>(p.dsum) + row_start(row, p.dsum_size, p.dsum_stride);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (first + i * next < p.cols) dsum[i] = load_pack<T, kWidth, true>(from + first + i * next);
      }
    }
    later.load(p, row + step, first, next);

    float sums[2] = {0.0f, 0.0f};  // of g · x_hat, of g
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float x_hat[kWidth], g[kWidth], dy[kWidth];
      now.terms(i, weight[i], p.weight_offset, x_hat, g);
      to_floats(dy, now.dy[i]);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        x_hat[e] *= now.rstd;
        sums[0] = fmaf(g[e], x_hat[e], sums[0]);
        sums[1] += g[e];
        dweight[i][e] = fmaf(dy[e], x_hat[e], dweight[i][e]);
        dbias[i][e] += dy[e];
      }
    }
    sum_row<kCluster>(sums, own, scratch[turn]);
    const float with_x = now.rstd * (sums[0] * share), alone = p.mean != nullptr ? sums[1] * share : 0.0f;
    T* dx = static_cast<T*>(p.dx) + static_cast<i64>(row) * p.cols;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      if (row < p.rows && n < p.cols) {
        float apart[kWidth], g[kWidth], d[kWidth];
        now.terms(i, weight[i], p.weight_offset, apart, g);
        to_floats(d, dsum[i]);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) d[e] = fmaf(now.rstd, fmaf(-apart[e], with_x, g[e] - alone), d[e]);
        store_pack(dx + n, from_floats<T>(d));
      }
    }
    now = later;
  }

  // One row of partial sums per block; its groups of threads are added first.
  auto* gathered = reinterpret_cast<float*>(shared_memory());  // [groups][next · kPacks]
  auto write = [&](float* partial, const float (&sum)[kPacks][kWidth]) {
    if (partial == nullptr) return;
    partial += static_cast<i64>(block) * p.cols;
    if (own.groups == 1) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const u32 n = first + i * next;
        if (n < p.cols) store_pack(partial + n, from_floats<float>(sum[i]));
      }
      return;
    }
    const u32 wide = next * kPacks;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) gathered[own.group * wide + first + i * next + e] = sum[i][e];
    }
    __syncthreads();
    for (u32 n = threadIdx.x; n < p.cols; n += blockDim.x) {
      float total = 0.0f;
      for (u32 group = 0; group < own.groups; ++group) total += gathered[group * wide + n];
      partial[n] = total;
    }
  };
  write(p.dweight, dweight);
  write(p.dbias, dbias);
}
