// norm_bwd: with x_hat = (x - mean) * rstd and g = dy * weight, per row
//   dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dsum      (rms_norm: without mean and mean(g))
// and over rows dweight = sum(dy * x_hat), dbias = sum(dy).
// A task is a block of rows whose partial dweight and dbias (float32) go to its own place in a workspace; a second step adds
// the blocks in order. Blocks depend on the shape alone, so the bits do not depend on the thread count.
// Four rows at a time: the partial sums are read and written once per four rows.
// Memory-bound: 3 elements moved per element (4 with dsum), about 20 operations.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int kGroup = 4;
constexpr int64_t kMaxBlocks = 64, kWorkspaceFloats = 4 << 20;
constexpr int64_t kChunk = 128 * VL;

struct Workspace {
  const float* weight;  // [cols] float32, offset included, 1 where there is none
  float* partial;       // [blocks][2][stride]: dweight, dbias
  int64_t stride;
};

// Sums of g (when centred) and g * (x - mean) over a row.
template <bool Centred, class X>
FASTATTN_INLINE void row_sums(int64_t cols, const X* x, const X* dy, const float* weight, float mean, double* g_sum, double* gx_sum) {
  vf m = splat(mean);
  *g_sum = *gx_sum = 0;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    int64_t end = begin + kChunk < cols ? begin + kChunk : cols, i = begin;
    vf g0 = zero(), g1 = zero(), gx0 = zero(), gx1 = zero();
    auto step = [&](vf& g_acc, vf& gx_acc, int64_t j, auto n) __attribute__((always_inline)) {
      vf g = get(dy + j, n) * get(weight + j, n), v = get(x + j, n);
      if constexpr (Centred) {
        g_acc += g;
        v = v - m;
      }
      gx_acc += g * v;
    };
    for (; i + 2 * VL <= end; i += 2 * VL) {
      step(g0, gx0, i, Whole{});
      step(g1, gx1, i + VL, Whole{});
    }
    for (; i + VL <= end; i += VL) step(g0, gx0, i, Whole{});
    if (i < end) step(g1, gx1, i, end - i);
    if constexpr (Centred) *g_sum += reduce_add(g0 + g1);
    *gx_sum += reduce_add(gx0 + gx1);
  }
}

template <bool Centred, class X, int R>
FASTATTN_INLINE void group_bwd(const NormBwdParams& p, int64_t row, const float* weight, float* dweight, float* dbias, bool around_cache) {
  const X *x[R], *dy[R], *dsum[R];
  X* dx[R];
  vf mean[R], rstd[R], g_mean[R], gx_mean[R];
  int64_t cols = p.cols;
  bool adds = p.dsum.data != nullptr;
  for (int r = 0; r < R; ++r) {
    x[r] = row_of<X>(p.x, row + r);
    dy[r] = row_of<X>(p.dy, row + r);
    dsum[r] = adds ? row_of<X>(p.dsum, row + r) : nullptr;
    dx[r] = static_cast<X*>(p.dx) + (row + r) * cols;
    float m = Centred ? p.mean[row + r] : 0.0f, s = p.rstd[row + r];
    double g_sum, gx_sum;
    row_sums<Centred>(cols, x[r], dy[r], weight, m, &g_sum, &gx_sum);
    mean[r] = splat(m);
    rstd[r] = splat(s);
    g_mean[r] = splat(static_cast<float>(g_sum / static_cast<double>(cols)));
    gx_mean[r] = splat(static_cast<float>(gx_sum * s / static_cast<double>(cols)));
  }
  auto column = [&](int64_t i, auto n) __attribute__((always_inline)) {
    vf w = get(weight + i, n), dw = zero(), db = zero();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf d = get(dy[r] + i, n), h = get(x[r] + i, n);
      h = (Centred ? h - mean[r] : h) * rstd[r];
      dw += d * h;
      db += d;
      vf g = d * w;
      if constexpr (Centred) g = g - g_mean[r];
      vf out = (g - h * gx_mean[r]) * rstd[r];
      if (adds) out += get(dsum[r] + i, n);
      if (around_cache)
        stream(dx[r] + i, out);  // only with whole vectors
      else
        put(dx[r] + i, out, n);
    }
    if (dweight != nullptr) put(dweight + i, get(dweight + i, n) + dw, n);
    if (dbias != nullptr) put(dbias + i, get(dbias + i, n) + db, n);
  };
  int64_t i = 0;
  for (; i + VL <= cols; i += VL) column(i, Whole{});
  if (i < cols) column(i, cols - i);
}

template <bool Centred, class X>
void block_bwd(const NormBwdParams& p, const Workspace& work, int64_t block, int64_t begin, int64_t end, bool around_cache) {
  float* dweight = p.dweight != nullptr ? work.partial + (2 * block) * work.stride : nullptr;
  float* dbias = p.dbias != nullptr ? work.partial + (2 * block + 1) * work.stride : nullptr;
  for (int64_t i = 0; i < p.cols; ++i) {
    if (dweight != nullptr) dweight[i] = 0;
    if (dbias != nullptr) dbias[i] = 0;
  }
  int64_t row = begin;
  for (; row + kGroup <= end; row += kGroup) group_bwd<Centred, X, kGroup>(p, row, work.weight, dweight, dbias, around_cache);
  for (; row < end; ++row) group_bwd<Centred, X, 1>(p, row, work.weight, dweight, dbias, around_cache);
  if (around_cache) stream_fence();
}

template <class W>
void widen_weight(const NormBwdParams& p, float* to) {
  const W* from = static_cast<const W*>(p.weight);
  for (int64_t i = 0; i < p.cols; i += VL) {
    vf w = splat(1.0f);
    if (from != nullptr) w = (i + VL <= p.cols ? load(from + i) : load_n(from + i, p.cols - i)) + splat(p.weight_offset);
    store(to + i, w);  // the workspace is padded to whole vectors
  }
}

// to[i] = the sum over blocks, in order, of partial[block][i].
template <class W>
void add_blocks(int64_t begin, int64_t end, int64_t blocks, const float* partial, int64_t block_stride, W* to) {
  for (int64_t i = begin; i < end; i += VL) {
    vf sum = zero();
    for (int64_t b = 0; b < blocks; ++b) sum += load(partial + b * block_stride + i);
    if (i + VL <= end)
      store(to + i, sum);
    else
      store_n(to + i, sum, end - i);
  }
}

template <class W>
void reduce(const NormBwdParams& p, const Workspace& work, int64_t blocks, int nthreads) {
  constexpr int64_t kColumns = 1024;
  parallel_for(nthreads, (p.cols + kColumns - 1) / kColumns, [&](int64_t task) {
    int64_t begin = task * kColumns, end = begin + kColumns < p.cols ? begin + kColumns : p.cols;
    if (p.dweight != nullptr)
      add_blocks(begin, end, blocks, work.partial, 2 * work.stride, static_cast<W*>(p.dweight));
    if (p.dbias != nullptr)
      add_blocks(begin, end, blocks, work.partial + work.stride, 2 * work.stride, static_cast<W*>(p.dbias));
  });
}

template <class X>
void typed_bwd(const NormBwdParams& p) {
  int64_t stride = (p.cols + VL - 1) / VL * VL;
  int64_t blocks = kWorkspaceFloats / (2 * stride);
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  if (blocks < 4) blocks = 4;
  int64_t per_block = (p.rows + blocks - 1) / blocks;
  per_block = per_block > kGroup ? (per_block + kGroup - 1) / kGroup * kGroup : kGroup;
  blocks = (p.rows + per_block - 1) / per_block;
  float* scratch = static_cast<float*>(thread_scratch((1 + 2 * blocks) * stride * 4));
  Workspace work{scratch, scratch + stride, stride};
  if (p.weight_dtype == 0)
    widen_weight<float>(p, scratch);
  else if (p.weight_dtype == 1)
    widen_weight<bf16>(p, scratch);
  else
    widen_weight<f16>(p, scratch);
  int64_t moved = p.rows * p.cols * static_cast<int64_t>(sizeof(X)) * (p.dsum.data != nullptr ? 4 : 3);
  bool around_cache = moved > kNonTemporalBytes && streamable(static_cast<X*>(p.dx), p.cols);
  int nthreads = p.rows * p.cols < kParallelElements ? 1 : p.nthreads;
  parallel_for(nthreads, blocks, [&](int64_t block) {
    int64_t begin = block * per_block, end = begin + per_block < p.rows ? begin + per_block : p.rows;
    if (p.centred)
      block_bwd<true, X>(p, work, block, begin, end, around_cache);
    else
      block_bwd<false, X>(p, work, block, begin, end, around_cache);
  });
  if (p.dweight == nullptr && p.dbias == nullptr) return;
  if (p.weight_dtype == 0)
    reduce<float>(p, work, blocks, nthreads);
  else if (p.weight_dtype == 1)
    reduce<bf16>(p, work, blocks, nthreads);
  else
    reduce<f16>(p, work, blocks, nthreads);
}

}  // namespace

void norm_bwd(const NormBwdParams& p) {
  if (p.cols == 0) return;
  if (p.dtype == 0) return typed_bwd<float>(p);
  if (p.dtype == 1) return typed_bwd<bf16>(p);
  return typed_bwd<f16>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
