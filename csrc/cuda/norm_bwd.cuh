#pragma once
#include <norm_params.h>

#include <tile/reduce.cuh>
#include <tile/rows.cuh>

// Where a row of x and dy starts; a row that is not there passes for the first one, of which nothing is then read.
template <class T>
struct NormBwdRow {
  const T *x, *dy;
  float mean, rstd;
  bool live;

  __forceinline__ NormBwdRow(const NormBwdParams& p, u32 row) : live(row < p.rows) {
    x = static_cast<const T*>(p.x) + (live ? row_start(row, p.x_size, p.x_stride) : 0);
    dy = static_cast<const T*>(p.dy) + (live ? row_start(row, p.dy_size, p.dy_stride) : 0);
    rstd = live ? p.rstd[row] : 0.0f;
    mean = live && p.mean != nullptr ? p.mean[row] : 0.0f;
  }
};

// The first 16 bytes of a thread's part of shared memory, `bytes` per thread; the next ones follow by 512, after those of its
// warp, so that they are read without conflicts and found without arithmetic.
__forceinline__ u8* of_thread(u8* shared, u32 bytes) { return shared + threadIdx.x / 32 * (32 * bytes) + threadIdx.x % 32 * 16; }

// The packs of x and dy that a thread has asked for: of kStages rows, the oldest of which it works on. They come through
// shared memory, into slots that no other thread touches, so that no barrier stands between a copy and its use.
// Shared memory: 32 · kStages · kPacks bytes per thread. Where the row ends, or there is none, zeros.
template <class T, int kWidth, int kPacks, int kStages, bool kWide = kBy16<T, kWidth>>
struct NormBwdQueue {
  static constexpr u32 kBytes = 32 * kStages * kPacks;  // per thread
  u8* slots;                                            // the thread's first: its warp's lie together
  float mean[kStages], rstd[kStages];                   // of the oldest row first
  u32 stage = 0;

  __forceinline__ explicit NormBwdQueue(u8* shared) : slots(of_thread(shared, kBytes)) {}
  __forceinline__ u8* slot(u32 of_stage, int i, int of_dy) const { return slots + ((of_stage * kPacks + i) * 2 + of_dy) * 512; }
  // The first kStages rows, each `step` behind the one before.
  __forceinline__ void fill(const NormBwdParams& p, u32 row, u32 step, u32 first, u32 next) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) copy(p, row + s * step, first, next, s, mean[s], rstd[s]);
  }
  // Waits for the oldest row; kOther: of the thread's copies of other things, how many groups are younger than that.
  template <int kOther>
  __forceinline__ void wait() const {
    cp_async_wait<kStages - 1 + kOther>();
  }
  __forceinline__ Pack<T, kWidth> x(int i) const { return load_shared_pack<T, kWidth>(slot(stage, i, 0)); }
  __forceinline__ Pack<T, kWidth> dy(int i) const { return load_shared_pack<T, kWidth>(slot(stage, i, 1)); }
  // Gives up the oldest row for one that has not been asked for yet.
  __forceinline__ void replace(const NormBwdParams& p, u32 row, u32 first, u32 next) {
    float mean_later, rstd_later;
    copy(p, row, first, next, stage, mean_later, rstd_later);
#pragma unroll
    for (int s = 0; s + 1 < kStages; ++s) {
      mean[s] = mean[s + 1];
      rstd[s] = rstd[s + 1];
    }
    mean[kStages - 1] = mean_later;
    rstd[kStages - 1] = rstd_later;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  __forceinline__ void copy(const NormBwdParams& p, u32 row, u32 first, u32 next, u32 to, float& mean_of, float& rstd_of) const {
    const NormBwdRow<T> from(p, row);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      const bool valid = from.live && n < p.cols;
      cp_async_16(slot(to, i, 0), from.x + (valid ? n : 0), valid);
      cp_async_16(slot(to, i, 1), from.dy + (valid ? n : 0), valid);
    }
    cp_async_commit();
    mean_of = from.mean;
    rstd_of = from.rstd;
  }
};

// The same in registers, without stages: for rows that move element by element, and for parts of the longest rows.
template <class T, int kWidth, int kPacks>
struct NormBwdQueue<T, kWidth, kPacks, 1, false> {
  static constexpr u32 kBytes = 0;
  Pack<T, kWidth> own_x[kPacks], own_dy[kPacks];
  float mean[1], rstd[1];

  __forceinline__ explicit NormBwdQueue(u8* = nullptr) {}
  __forceinline__ void fill(const NormBwdParams& p, u32 row, u32, u32 first, u32 next) { replace(p, row, first, next); }
  template <int kOther>
  __forceinline__ void wait() const {}
  __forceinline__ Pack<T, kWidth> x(int i) const { return own_x[i]; }
  __forceinline__ Pack<T, kWidth> dy(int i) const { return own_dy[i]; }
  __forceinline__ void replace(const NormBwdParams& p, u32 row, u32 first, u32 next) {
    const NormBwdRow<T> from(p, row);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      const bool valid = from.live && n < p.cols;
      own_x[i] = valid ? load_pack<T, kWidth, true>(from.x + n) : splat<T, kWidth>(0.0f);
      own_dy[i] = valid ? load_pack<T, kWidth, true>(from.dy + n) : splat<T, kWidth>(0.0f);
    }
    mean[0] = from.mean;
    rstd[0] = from.rstd;
  }
};

// x_hat = (x - mean) · rstd of one pack, and g = dy · (weight + offset).
template <class T, class W, int kWidth>
__forceinline__ void norm_bwd_terms(const Pack<T, kWidth>& x, const float (&dy)[kWidth], float mean, float rstd,
                                    const Pack<W, kWidth>& weight, float offset, float (&x_hat)[kWidth], float (&g)[kWidth]) {
  float scale[kWidth];
  to_floats(x_hat, x);
  to_floats(scale, weight);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    x_hat[e] = (x_hat[e] - mean) * rstd;
    g[e] = dy[e] * (scale[e] + offset);
  }
}

// dx = rstd · (g - mean(g) - x_hat · mean(g · x_hat)) + dsum with g = dy · weight, mean(g) only for centred rows; and this
// block's partial sums of dweight = sum of dy · x_hat and dbias = sum of dy over the rows it works on.
// The `lanes` threads that share a row own the same columns of every row, as in norm_fwd_kernel, and so keep the sums of
// their columns in registers; a block works on threads / lanes rows at once, and on every such batch that is its turn. In a
// cluster the blocks share one row. Up to 2 packs of a thread stay in its registers from the first pass to the second and
// make room for those of a later row at once; more are taken from shared memory again, as are their weights and dsum.
// Grid: as many blocks (clusters) as run at once, one per multiprocessor with 512 threads, so that there are few partial
// sums. Shared memory: 640 bytes, then per thread 32 · kStages · kPacks and, for more than 2 packs, kPacks packs of the
// weights and of dsum; after the last row 4 · threads · kPacks · kWidth where a block works on several rows.
// Bound by memory: 3 · sizeof(T) bytes per element (4 with dsum), and 8 · blocks / rows for the partial sums. Always under
// way: 64 KiB per multiprocessor with 512 threads, 2 stages and 2 packs.
template <class T, class W, int kWidth, int kPacks, int kStages, bool kCluster>
__global__ void __launch_bounds__(512, 1) norm_bwd_kernel(const __grid_constant__ NormBwdParams p) {
  constexpr bool kKept = kPacks <= 2 || !kBy16<T, kWidth>;
  const Sharing<kCluster || kPacks == 4> own(p.lanes);
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
  NormBwdQueue<T, kWidth, kPacks, kStages> queue(shared_memory() + 2 * sizeof(SumScratch<2>));

  // What is not kept: the weights, and dsum of the row in work.
  constexpr u32 kWeightBytes = kPacks * sizeof(Pack<W, kWidth>);  // per thread
  u8* shared = shared_memory() + 2 * sizeof(SumScratch<2>) + queue.kBytes * blockDim.x;
  u8* weights = of_thread(shared, kWeightBytes);
  u8* dsums = of_thread(shared + kWeightBytes * blockDim.x, 16 * kPacks);
  Pack<W, kWidth> kept_weight[kKept ? kPacks : 1];
  Pack<T, kWidth> kept_dsum[kKept ? kPacks : 1];
  auto ask_for_dsum = [&](u32 row) {
    const bool live = p.dsum != nullptr && row < p.rows;
    const T* from = static_cast<const T*>(p.dsum) + (live ? row_start(row, p.dsum_size, p.dsum_stride) : 0);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      const bool valid = live && n < p.cols;
      if constexpr (kKept) {
        kept_dsum[i] = valid ? load_pack<T, kWidth, true>(from + n) : splat<T, kWidth>(0.0f);
      } else if (valid) {
        cp_async_16(dsums + i * 512, from + n);
      }
    }
    if constexpr (!kKept) cp_async_commit();
  };
  auto dsum = [&](int i) {
    if constexpr (kKept) {
      return kept_dsum[i];
    } else {
      return p.dsum != nullptr ? load_shared_pack<T, kWidth>(dsums + i * 512) : splat<T, kWidth>(0.0f);
    }
  };

  if constexpr (!kKept) ask_for_dsum(block * own.groups + own.group);
  queue.fill(p, block * own.groups + own.group, step, first, next);
  if constexpr (!kKept) cp_async_commit();  // groups are counted in pairs: dsum of the next row, x and dy of a later one
  float dweight[kPacks][kWidth], dbias[kPacks][kWidth];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const Pack<W, kWidth> loaded = load_pack_or<W, kWidth>(p.weight, first + i * next, p.cols, 1.0f);
    if constexpr (kKept) {
      kept_weight[i] = loaded;
    } else {
      store_shared_pack<512>(weights + i * (32 * sizeof(loaded)), loaded);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) dweight[i][e] = dbias[i][e] = 0.0f;
  }

  auto weight = [&](int i) {
    if constexpr (kKept) {
      return kept_weight[i];
    } else {
      return load_shared_pack<W, kWidth, 512>(weights + i * (32 * sizeof(Pack<W, kWidth>)));
    }
  };

  const float share = 1.0f / p.cols;
  int turn = 0;
  for (u32 start = block * own.groups; start < p.rows; start += step, turn ^= 1) {
    const u32 row = start + own.group;
    if constexpr (kKept) ask_for_dsum(row);
    queue.template wait<kKept ? 0 : kStages - 1>();
    const float mean = queue.mean[0], rstd = queue.rstd[0];
    float x_hat[kKept ? kPacks : 1][kWidth], g[kKept ? kPacks : 1][kWidth];
    float sums[2] = {0.0f, 0.0f};  // of g · x_hat, of g
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float dy[kWidth];
      const int at = kKept ? i : 0;
      to_floats(dy, queue.dy(i));
      norm_bwd_terms(queue.x(i), dy, mean, rstd, weight(i), p.weight_offset, x_hat[at], g[at]);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        sums[0] = fmaf(g[at][e], x_hat[at][e], sums[0]);
        sums[1] += g[at][e];
        dweight[i][e] = fmaf(dy[e], x_hat[at][e], dweight[i][e]);
        dbias[i][e] += dy[e];
      }
      if constexpr (!kKept) __syncwarp();  // or else loads of all packs come first, and registers spill
    }
    if constexpr (kKept) queue.replace(p, row + kStages * step, first, next);
    sum_row<kCluster>(sums, own, scratch[turn]);
    const float with_x = sums[0] * share, alone = p.mean != nullptr ? sums[1] * share : 0.0f;
    if constexpr (!kKept) cp_async_wait<kStages - 1>();
    T* dx = static_cast<T*>(p.dx) + static_cast<i64>(row) * p.cols;
#pragma unroll(kKept ? kPacks : 1)
    for (int i = 0; i < kPacks; ++i) {
      const u32 n = first + i * next;
      const int at = kKept ? i : 0;
      if constexpr (!kKept) {
        float dy[kWidth];
        to_floats(dy, queue.dy(i));
        norm_bwd_terms(queue.x(i), dy, mean, rstd, weight(i), p.weight_offset, x_hat[at], g[at]);
      }
      if (row < p.rows && n < p.cols) {
        float d[kWidth];
        to_floats(d, dsum(i));
#pragma unroll
        for (int e = 0; e < kWidth; ++e) d[e] = fmaf(rstd, fmaf(-x_hat[at][e], with_x, g[at][e] - alone), d[e]);
        store_pack(dx + n, from_floats<T>(d));
      }
    }
    if constexpr (!kKept) {
      ask_for_dsum(row + step);
      queue.replace(p, row + kStages * step, first, next);
    }
  }

  // One row of partial sums per block; its groups of threads are added first.
  cp_async_wait<0>();
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
