// norm_fwd: y = (x - mean) * rstd * weight + bias per row (layer_norm), or x * rstd * (weight + offset) (rms_norm); with a
// residual, x + residual rounded to its type is what is normalised and is written too.
// A task is a run of rows of about 64 KB, so that a row is in the cache when the second and third pass read it.
// Memory-bound: 2 elements moved per element normalised (4 with residual), about 12 operations.
// Statistics in two passes (mean, then squares around it), float32 within 2048 elements and double across them.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kTaskBytes = 64 << 10;
constexpr int64_t kChunkPacks = 128;

// The sum of term(i, count) over a row: four chains per chunk, chunks added in double.
template <class Order, class Term>
FASTATTN_INLINE double row_sum(int64_t cols, Term term) {
  typedef typename Order::pack pack;
  constexpr int64_t W = Order::width, kChunk = kChunkPacks * W;
  double total = 0;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    int64_t end = begin + kChunk < cols ? begin + kChunk : cols, i = begin;
    pack a = splat_pack(Order{}, 0.0f), b = a, c = a, d = a;
    for (; i + 4 * W <= end; i += 4 * W) {
      a += term(i, Whole{});
      b += term(i + W, Whole{});
      c += term(i + 2 * W, Whole{});
      d += term(i + 3 * W, Whole{});
    }
    for (; i + W <= end; i += W) a += term(i, Whole{});
    if (i < end) b += term(i, end - i);
    total += reduce_add((a + b) + (c + d));
  }
  return total;
}

struct Moments {
  float mean, rstd;
};

// once(i, count) yields the row's elements on the first pass, again(i, count) on the second.
template <bool Centred, class Order, class Once, class Again>
FASTATTN_INLINE Moments moments(int64_t cols, double eps, Once once, Again again) {
  double mean = 0, squares;
  if constexpr (Centred) {
    mean = row_sum<Order>(cols, once) / static_cast<double>(cols);
    vf m = splat(static_cast<float>(mean));
    squares = row_sum<Order>(cols, [&](int64_t i, auto n) __attribute__((always_inline)) {
      auto d = again(i, n) - m;
      return first(d * d, n);
    });
  } else {
    squares = row_sum<Order>(cols, [&](int64_t i, auto n) __attribute__((always_inline)) {
      auto v = once(i, n);
      return v * v;
    });
  }
  double variance = squares / static_cast<double>(cols) + eps;
  return {static_cast<float>(mean), static_cast<float>(1.0 / __builtin_sqrt(variance))};
}

// again(i, count) yields what is normalised; `ahead` is the next row, which is fetched meanwhile.
template <bool Centred, class X, class W, class Again>
FASTATTN_INLINE void write_row(const NormParams& p, Again again, X* y, X* sum, Moments stats, const X* ahead, bool around_cache) {
  typedef typename OrderOf<X>::order Order;
  const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
  vf mean = splat(stats.mean), rstd = splat(stats.rstd), offset = splat(p.weight_offset);
  bool round_first = p.round_first;
  auto normalised = [&](auto v, int64_t i, auto n) __attribute__((always_inline)) {
    auto h = Centred ? (v - mean) * rstd : v * rstd;
    if (!Centred && round_first) h = rounded(h, y);
    if (weight != nullptr) {
      auto w = fetch(Order{}, weight + i, n);
      h = h * (Centred ? w : w + offset);
    }
    if (Centred && bias != nullptr) h = h + fetch(Order{}, bias + i, n);
    return h;
  };
  int64_t i = 0, cols = p.cols;
  for (; i + Order::width <= cols; i += Order::width) {
    auto v = again(i, Whole{});
    auto h = normalised(v, i, Whole{});
    prefetch(ahead + i);
    if (around_cache) {
      stream(y + i, h);
      if (sum != nullptr) stream(sum + i, v);
    } else {
      emit(y + i, h, Whole{});
      if (sum != nullptr) emit(sum + i, v, Whole{});
    }
  }
  if (i < cols) {
    auto v = again(i, cols - i);
    emit(y + i, normalised(v, i, cols - i), cols - i);
    if (sum != nullptr) emit(sum + i, v, cols - i);
  }
}

template <bool Centred, class X, class W>
void rows_fwd(const NormParams& p, int64_t begin, int64_t end, bool around_cache) {
  typedef typename OrderOf<X>::order Order;
  int64_t cols = p.cols;
  bool added = p.residual.data != nullptr;
  float* scratch = added ? static_cast<float*>(thread_scratch((cols + Order::width) * 4)) : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const X *x = row_of<X>(p.x, row), *ahead = row_of<X>(p.x, row + 1 < p.rows ? row + 1 : row);
    X* y = static_cast<X*>(p.y) + row * cols;
    auto read = [&](int64_t i, auto n) __attribute__((always_inline)) { return fetch(Order{}, x + i, n); };
    Moments stats;
    if (added) {
      const X* r = row_of<X>(p.residual, row);
      auto add = [&](int64_t i, auto n) __attribute__((always_inline)) {
        auto v = rounded(read(i, n) + fetch(Order{}, r + i, n), x);
        keep(scratch + i, v);
        return v;
      };
      auto again = [&](int64_t i, auto) __attribute__((always_inline)) { return take(Order{}, scratch + i); };
      stats = moments<Centred, Order>(cols, p.eps, add, again);
      write_row<Centred, X, W>(p, again, y, static_cast<X*>(p.sum) + row * cols, stats, ahead, around_cache);
    } else {
      stats = moments<Centred, Order>(cols, p.eps, read, read);
      write_row<Centred, X, W>(p, read, y, static_cast<X*>(nullptr), stats, ahead, around_cache);
    }
    if (Centred && p.mean != nullptr) p.mean[row] = stats.mean;
    if (p.rstd != nullptr) p.rstd[row] = stats.rstd;
  }
  if (around_cache) stream_fence();
}

template <class X, class W>
void typed_fwd(const NormParams& p) {
  int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(X));
  int64_t moved = p.rows * row_bytes * (p.sum != nullptr ? 4 : 2);
  bool around_cache = moved > kNonTemporalBytes && streamable(static_cast<X*>(p.y), p.cols) &&
                      streamable(static_cast<X*>(p.sum), p.cols);
  int64_t per_task = kTaskBytes / row_bytes > 1 ? kTaskBytes / row_bytes : 1;
  if (int64_t share = p.rows / (16 * p.nthreads); share > per_task) per_task = share;
  int nthreads = p.rows * p.cols < kParallelElements ? 1 : p.nthreads;
  parallel_for(nthreads, (p.rows + per_task - 1) / per_task, [&](int64_t task) {
    int64_t begin = task * per_task, end = begin + per_task < p.rows ? begin + per_task : p.rows;
    if (p.centred)
      rows_fwd<true, X, W>(p, begin, end, around_cache);
    else
      rows_fwd<false, X, W>(p, begin, end, around_cache);
  });
}

}  // namespace

void norm_fwd(const NormParams& p) {
  if (p.rows == 0 || p.cols == 0) return;
  bool wide = p.weight_dtype == 0;
  if (p.dtype == 0) return typed_fwd<float, float>(p);
  if (p.dtype == 1) return wide ? typed_fwd<bf16, float>(p) : typed_fwd<bf16, bf16>(p);
  return wide ? typed_fwd<f16, float>(p) : typed_fwd<f16, f16>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
