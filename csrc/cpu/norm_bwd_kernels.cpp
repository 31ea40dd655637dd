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
constexpr int64_t kMaxBlocks = 64, kMinBlockRows = 32, kWorkspaceFloats = 4 << 20;
constexpr int64_t kChunkPacks = 128;

// float32, in pack order (rows.h), each row of `stride` elements.
struct Workspace {
  const float* weight;  // offset included, 1 where there is none
  float* partial;       // [blocks][2]: dweight, dbias
  int64_t stride;
};

// The largest |mean| * rstd up to which sums of g * x, less mean times those of g, serve for sums of g * (x - mean).
template <class X>
constexpr float kCancellation = sizeof(X) == 2 ? 16 : 2;

// Sums over a row: of g (when centred) and of g * v, where v is x, or x - mean (when shifted, then of v too).
struct Sums {
  double v, g, gv;
};

template <bool Centred, bool Shifted, class X>
FASTATTN_INLINE Sums row_sums(int64_t cols, const X* x, const X* dy, const float* weight, float mean) {
  typedef typename OrderOf<X>::order Order;
  typedef typename Order::pack pack;
  constexpr int64_t W = Order::width, kChunk = kChunkPacks * W;
  vf m = splat(mean);
  Sums sums{0, 0, 0};
  struct Chain {
    pack v, g, gv;
  };
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    int64_t end = begin + kChunk < cols ? begin + kChunk : cols, i = begin;
    pack none = splat_pack(Order{}, 0.0f);
    Chain a{none, none, none}, b = a;
    auto step = [&](Chain& to, int64_t j, auto n) __attribute__((always_inline)) {
      pack g = fetch(Order{}, dy + j, n) * take(Order{}, weight + j), v = fetch(Order{}, x + j, n);
      if constexpr (Shifted) {
        v = first(v - m, n);
        to.v += v;
      }
      if constexpr (Centred) to.g += g;
      to.gv += g * v;
    };
    for (; i + 2 * W <= end; i += 2 * W) {
      step(a, i, Whole{});
      step(b, i + W, Whole{});
    }
    for (; i + W <= end; i += W) step(a, i, Whole{});
    if (i < end) step(b, i, end - i);
    if constexpr (Shifted) sums.v += reduce_add(a.v + b.v);
    if constexpr (Centred) sums.g += reduce_add(a.g + b.g);
    sums.gv += reduce_add(a.gv + b.gv);
  }
  return sums;
}

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

// Do rows row .. row + kGroup - 1 lie one stride apart?
template <class X>
FASTATTN_INLINE bool regular(const Rows& rows, int64_t row) {
  if (rows.data == nullptr || rows.ndim <= 1) return true;
  int64_t inner = rows.shape[rows.ndim - 1];
  return row / inner == (row + kGroup - 1) / inner;
}

template <bool Centred, class X, int R>
FASTATTN_INLINE void group_bwd(const NormBwdParams& p, int64_t row, const float* weight, float* dweight, float* dbias,
                               bool around_cache) {
  typedef typename OrderOf<X>::order Order;
  typedef typename Order::pack pack;
  const Group<X> x = group_of<X>(p.x, row, R), dy = group_of<X>(p.dy, row, R), dsum = group_of<X>(p.dsum, row, R);
  int64_t cols = p.cols;
  X* dx = static_cast<X*>(p.dx) + row * cols;
  vf mean[R], rstd[R], shift[R], g_mean[R], gx_mean[R];
  bool adds = dsum.data != nullptr;
  for (int r = 0; r < R; ++r) {
    float m = Centred ? p.mean[row + r] : 0.0f, s = p.rstd[row + r];
    double n = static_cast<double>(cols), left = 0;  // of the mean, which was rounded to float32
    Sums sums;
    if (Centred && !(__builtin_fabsf(m) * s <= kCancellation<X>)) {
      sums = row_sums<Centred, true>(cols, x.row(r), dy.row(r), weight, m);
      left = sums.v / n;
    } else {
      sums = row_sums<Centred, false>(cols, x.row(r), dy.row(r), weight, 0.0f);
      sums.gv -= m * sums.g;
    }
    mean[r] = splat(m);
    rstd[r] = splat(s);
    shift[r] = splat(static_cast<float>(-left * s));
    g_mean[r] = splat(static_cast<float>(sums.g / n));
    gx_mean[r] = splat(static_cast<float>((sums.gv - left * sums.g) * s / n));
  }
  auto column = [&](int64_t i, auto n) __attribute__((always_inline)) {
    pack w = take(Order{}, weight + i), dw = splat_pack(Order{}, 0.0f), db = dw;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      pack d = fetch(Order{}, dy.row(r) + i, n), h = fetch(Order{}, x.row(r) + i, n);
      if constexpr (R > 1) {  // the next group, while this one is computed
        prefetch(x.row(r + R) + i);
        prefetch(dy.row(r + R) + i);
      }
      h = Centred ? (h - mean[r]) * rstd[r] + shift[r] : h * rstd[r];
      dw += d * h;
      db += d;
      pack g = d * w;
      if constexpr (Centred) g = apart(g) - g_mean[r];  // exactly 0 where all g are equal
      pack out = (g - h * gx_mean[r]) * rstd[r];
      if (adds) out += fetch(Order{}, dsum.row(r) + i, n);
      if (around_cache)
        stream(dx + r * cols + i, out);  // only with whole packs
      else
        emit(dx + r * cols + i, out, n);
    }
    if (dweight != nullptr) keep(dweight + i, take(Order{}, dweight + i) + dw);
    if (dbias != nullptr) keep(dbias + i, take(Order{}, dbias + i) + db);
  };
  int64_t i = 0;
  for (; i + Order::width <= cols; i += Order::width) column(i, Whole{});
  if (i < cols) column(i, cols - i);
}

template <bool Centred, class X>
void block_bwd(const NormBwdParams& p, const Workspace& work, int64_t block, int64_t begin, int64_t end, bool around_cache) {
  float* dweight = p.dweight != nullptr ? work.partial + (2 * block) * work.stride : nullptr;
  float* dbias = p.dbias != nullptr ? work.partial + (2 * block + 1) * work.stride : nullptr;
  for (int64_t i = 0; i < work.stride; ++i) {
    if (dweight != nullptr) dweight[i] = 0;
    if (dbias != nullptr) dbias[i] = 0;
  }
  int64_t row = begin;
  while (row < end) {
    bool whole = row + kGroup <= end && regular<X>(p.x, row) && regular<X>(p.dy, row) && regular<X>(p.dsum, row);
    if (whole)
      group_bwd<Centred, X, kGroup>(p, row, work.weight, dweight, dbias, around_cache);
    else
      group_bwd<Centred, X, 1>(p, row, work.weight, dweight, dbias, around_cache);
    row += whole ? kGroup : 1;
  }
  if (around_cache) stream_fence();
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
  per_block = per_block > kMinBlockRows ? (per_block + kGroup - 1) / kGroup * kGroup : kMinBlockRows;
  blocks = (p.rows + per_block - 1) / per_block;
  float* scratch = static_cast<float*>(thread_scratch((1 + 2 * blocks) * stride * 4));
  Workspace work{scratch, scratch + stride, stride};
  widen_weight<Order, W>(p, scratch);
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
