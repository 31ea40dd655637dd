// norm_bwd: with x_hat = (x - mean) * rstd and g = dy * weight, per row
//   dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dsum      (rms_norm: without mean and mean(g))
// and over rows dweight = sum(dy * x_hat), dbias = sum(dy).
// A task is a block of rows whose partial dweight and dbias (float32) go to its own place in a workspace; a second step adds
// the blocks in order. Blocks depend on the shape alone, and a row's arithmetic on the row alone, so the bits depend neither
// on the thread count nor on addresses. A few rows go side by side: a first pass takes their sums, a second reads them again
// from L1 or L2, so that x and dy come from memory once, and touches weight and the partial sums once for all of them.
// Memory-bound: 3 elements moved per element (4 with dsum), about 20 operations. docs/design/cpu-norms.md has the ladder.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Rows side by side: four share loads best while all is in the cache; memory prefers fewer streams.
constexpr int kCachedRows = 4, kStreamedRows = 2;
constexpr int64_t kMaxBlocks = 64, kMinBlockRows = 32, kWorkspaceFloats = 4 << 20;
constexpr int64_t kChunkPacks = 64;

// float32, in pack order (rows.h), each row of `stride` elements.
struct Workspace {
  const float* weight;  // offset included, 1 where there is none
  float* partial;       // [blocks][2]: dweight, dbias
  int64_t stride;
};

// The largest |mean| * rstd up to which sums of g * x, less mean times those of g, serve for sums of g * (x - mean).
template <class X>
constexpr float kCancellation = sizeof(X) == 2 ? 16 : 2;

// A row's sums of g (when centred) and of g * v, where v is x; or where v is x - mean, then of v too.
struct Sums {
  double v, g, gv;
};

// What dx and dweight of a row need beyond its elements.
struct Coefficients {
  float mean, rstd, shift, g_mean, gx_mean;
};

// A tensor's R rows from `row` on; they lie one stride apart, which keeps addresses in few registers.
template <class X>
struct Group {
  const X* data = nullptr;
  int64_t stride = 0;
  __attribute__((always_inline)) const X* row(int r) const { return data + r * stride; }
};

template <class X>
FASTATTN_INLINE Group<X> group_of(const Rows& rows, int64_t row, int count) {
  if (rows.data == nullptr) return {};
  const X* data = row_of<X>(rows, row);
  return {data, count > 1 ? row_of<X>(rows, row + 1) - data : 0};
}

// Do `count` rows from `row` on lie one stride apart?
FASTATTN_INLINE bool regular(const Rows& rows, int64_t row, int count) {
  if (rows.data == nullptr || rows.ndim <= 1) return true;
  int64_t inner = rows.shape[rows.ndim - 1];
  return row / inner == (row + count - 1) / inner;
}

// The sums of R rows side by side. With `mean` (of one row) v is x - mean.
template <bool Centred, bool Shifted, int R, class X>
FASTATTN_INLINE void row_sums(int64_t cols, Group<X> x, Group<X> dy, const float* weight, float mean, Sums (&sums)[R]) {
  typedef typename OrderOf<X>::order Order;
  typedef typename Order::pack pack;
  constexpr int64_t W = Order::width, kChunk = kChunkPacks * W;
  vf m = splat(mean);
  for (Sums& s : sums) s = {0, 0, 0};
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    int64_t end = begin + kChunk < cols ? begin + kChunk : cols, i = begin;
    pack sum_v[R], sum_g[R], sum_gv[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum_v[r] = sum_g[r] = sum_gv[r] = splat_pack(Order{}, 0.0f);
    auto step = [&](int64_t j, auto n) __attribute__((always_inline)) {
      pack w = take(Order{}, weight + j);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        pack g = fetch(Order{}, dy.row(r) + j, n) * w, v = fetch(Order{}, x.row(r) + j, n);
        if constexpr (Shifted) {
          v = first(v - m, n);
          sum_v[r] += v;
        }
        if constexpr (Centred) sum_g[r] += g;
        sum_gv[r] += g * v;
      }
    };
    for (; i + W <= end; i += W) step(i, Whole{});
    if (i < end) step(i, end - i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if constexpr (Shifted) sums[r].v += reduce_add(sum_v[r]);
      if constexpr (Centred) sums[r].g += reduce_add(sum_g[r]);
      sums[r].gv += reduce_add(sum_gv[r]);
    }
  }
}

template <bool Centred, class X, int R>
static __attribute__((noinline)) void coefficients_of(const NormBwdParams& p, int64_t row, Group<X> x, Group<X> dy,
                                                      const float* weight, Coefficients (&rows)[R]) {
  double n = static_cast<double>(p.cols);
  Sums sums[R];
  row_sums<Centred, false>(p.cols, x, dy, weight, 0.0f, sums);
  for (int r = 0; r < R; ++r) {
    float mean = Centred ? p.mean[row + r] : 0.0f, rstd = p.rstd[row + r];
    Sums of_row[1] = {sums[r]};
    if (Centred && !(__builtin_fabsf(mean) * rstd <= kCancellation<X>))
      row_sums<Centred, true>(p.cols, Group<X>{x.row(r)}, Group<X>{dy.row(r)}, weight, mean, of_row);
    else
      of_row[0].gv -= mean * of_row[0].g;
    double left = of_row[0].v / n;  // of the mean, which was rounded to float32
    rows[r] = {mean, rstd, static_cast<float>(-left * rstd), static_cast<float>(of_row[0].g / n),
               static_cast<float>((of_row[0].gv - left * of_row[0].g) * rstd / n)};
  }
}

// The second pass over R rows: dx and, when Weighs, their part of dweight and dbias.
template <bool Centred, bool Weighs, bool Adds, bool Around, class X, int R>
static __attribute__((noinline)) void write_rows(int64_t cols, Group<X> x, Group<X> dy, Group<X> dsum, const float* weight,
                                                 const Coefficients* rows, X* dx, float* dweight, float* dbias) {
  typedef typename OrderOf<X>::order Order;
  typedef typename Order::pack pack;
  vf mean[R], rstd[R], shift[R], g_mean[R], gx_mean[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    mean[r] = splat(rows[r].mean);
    rstd[r] = splat(rows[r].rstd);
    shift[r] = splat(rows[r].shift);
    g_mean[r] = splat(rows[r].g_mean);
    gx_mean[r] = splat(rows[r].gx_mean);
  }
  auto column = [&](int64_t i, auto n) __attribute__((always_inline)) {
    pack w = take(Order{}, weight + i), dw, db;
    if constexpr (Weighs) dw = take(Order{}, dweight + i);
    if constexpr (Weighs && Centred) db = take(Order{}, dbias + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      pack d = fetch(Order{}, dy.row(r) + i, n), h = fetch(Order{}, x.row(r) + i, n);
      if constexpr (R > 1) {  // the next group, while this one is computed
        prefetch(x.row(r + R) + i);
        prefetch(dy.row(r + R) + i);
      }
      h = Centred ? (h - mean[r]) * rstd[r] + shift[r] : h * rstd[r];
      if constexpr (Weighs) dw += d * h;
      if constexpr (Weighs && Centred) db += d;
      pack g = d * w;
      if constexpr (Centred) g = apart(g) - g_mean[r];  // exactly 0 where all g are equal
      pack out = (g - h * gx_mean[r]) * rstd[r];
      if constexpr (Adds) out += fetch(Order{}, dsum.row(r) + i, n);
      if constexpr (Around)
        stream(dx + r * cols + i, out);  // only with whole packs
      else
        emit(dx + r * cols + i, out, n);
    }
    if constexpr (Weighs) keep(dweight + i, dw);
    if constexpr (Weighs && Centred) keep(dbias + i, db);
  };
  int64_t i = 0;
  for (; i + Order::width <= cols; i += Order::width) column(i, Whole{});
  if constexpr (!Around)
    if (i < cols) column(i, cols - i);
}

template <bool Centred, bool Weighs, bool Around, class X, int R>
FASTATTN_INLINE void group_bwd(const NormBwdParams& p, int64_t row, const float* weight, float* dweight, float* dbias) {
  const Group<X> x = group_of<X>(p.x, row, R), dy = group_of<X>(p.dy, row, R), dsum = group_of<X>(p.dsum, row, R);
  Coefficients rows[R];
  coefficients_of<Centred, X, R>(p, row, x, dy, weight, rows);
  auto write =
      dsum.data != nullptr ? write_rows<Centred, Weighs, true, Around, X, R> : write_rows<Centred, Weighs, false, Around, X, R>;
  write(p.cols, x, dy, dsum, weight, rows, static_cast<X*>(p.dx) + row * p.cols, dweight, dbias);
}

template <bool Centred, bool Weighs, bool Around, class X>
void block_bwd(const NormBwdParams& p, const Workspace& work, int64_t block, int64_t begin, int64_t end) {
  constexpr int R = Around ? kStreamedRows : kCachedRows;
  float *dweight = work.partial + 2 * block * work.stride, *dbias = dweight + work.stride;
  if (Weighs) __builtin_memset(dweight, 0, (Centred ? 2 : 1) * work.stride * sizeof(float));
  int64_t row = begin;
  while (row < end) {
    bool whole = row + R <= end && regular(p.x, row, R) && regular(p.dy, row, R) && regular(p.dsum, row, R);
    if (whole)
      group_bwd<Centred, Weighs, Around, X, R>(p, row, work.weight, dweight, dbias);
    else
      group_bwd<Centred, Weighs, false, X, 1>(p, row, work.weight, dweight, dbias);
    row += whole ? R : 1;
  }
  if (Around) stream_fence();
}

template <bool Centred, class X>
auto block_kernel(bool weighs, bool around) {
  if (weighs) return around ? block_bwd<Centred, true, true, X> : block_bwd<Centred, true, false, X>;
  return around ? block_bwd<Centred, false, true, X> : block_bwd<Centred, false, false, X>;
}

template <class Order, class W>
void widen_weight(const NormBwdParams& p, float* to) {
  const W* from = static_cast<const W*>(p.weight);
  for (int64_t i = 0; i < p.cols; i += Order::width) {
    auto w = splat_pack(Order{}, 1.0f);
    if (from != nullptr) {
      int64_t left = p.cols - i;
      w = (left >= Order::width ? fetch(Order{}, from + i, Whole{}) : fetch(Order{}, from + i, left)) + splat(p.weight_offset);
    }
    keep(to + i, w);
  }
}

// to[i] = the sum over blocks, in order, of partial[block][i].
template <class Order, class W>
void add_blocks(int64_t begin, int64_t end, int64_t blocks, const float* partial, int64_t block_stride, W* to) {
  for (int64_t i = begin; i < end; i += Order::width) {
    auto sum = splat_pack(Order{}, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) sum += take(Order{}, partial + b * block_stride + i);
    if (i + Order::width <= end)
      emit(to + i, sum, Whole{});
    else
      emit(to + i, sum, end - i);
  }
}

template <class X, class W>
void blocks_bwd(const NormBwdParams& p) {
  typedef typename OrderOf<X>::order Order;
  int64_t stride = (p.cols + Order::width - 1) / Order::width * Order::width;
  int64_t blocks = kWorkspaceFloats / (2 * stride);
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  if (blocks < 4) blocks = 4;
  int64_t per_block = (p.rows + blocks - 1) / blocks;
  per_block = per_block > kMinBlockRows ? (per_block + kCachedRows - 1) / kCachedRows * kCachedRows : kMinBlockRows;
  blocks = (p.rows + per_block - 1) / per_block;
  float* scratch = static_cast<float*>(thread_scratch((1 + 2 * blocks) * stride * 4));
  Workspace work{scratch, scratch + stride, stride};
  widen_weight<Order, W>(p, scratch);
  int64_t moved = p.rows * p.cols * static_cast<int64_t>(sizeof(X)) * (p.dsum.data != nullptr ? 4 : 3);
  bool around_cache = moved > kNonTemporalBytes && streamable(static_cast<X*>(p.dx), p.cols);
  int nthreads = p.rows * p.cols < kParallelElements ? 1 : p.nthreads;
  auto run = p.centred ? block_kernel<true, X>(p.dweight != nullptr || p.dbias != nullptr, around_cache)
                       : block_kernel<false, X>(p.dweight != nullptr, around_cache);
  parallel_for(nthreads, blocks, [&](int64_t block) {
    int64_t begin = block * per_block, end = begin + per_block < p.rows ? begin + per_block : p.rows;
    run(p, work, block, begin, end);
  });
  if (p.dweight == nullptr && p.dbias == nullptr) return;
  constexpr int64_t kColumns = 1024;
  parallel_for(nthreads, (p.cols + kColumns - 1) / kColumns, [&](int64_t task) {
    int64_t begin = task * kColumns, end = begin + kColumns < p.cols ? begin + kColumns : p.cols;
    if (p.dweight != nullptr) add_blocks<Order>(begin, end, blocks, work.partial, 2 * stride, static_cast<W*>(p.dweight));
    if (p.dbias != nullptr) add_blocks<Order>(begin, end, blocks, work.partial + stride, 2 * stride, static_cast<W*>(p.dbias));
  });
}

}  // namespace

void norm_bwd(const NormBwdParams& p) {
  if (p.cols == 0) return;
  bool wide = p.weight_dtype == 0;
  if (p.dtype == 0) return blocks_bwd<float, float>(p);
  if (p.dtype == 1) return wide ? blocks_bwd<bf16, float>(p) : blocks_bwd<bf16, bf16>(p);
  return wide ? blocks_bwd<f16, float>(p) : blocks_bwd<f16, f16>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
