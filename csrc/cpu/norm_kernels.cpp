// norm_fwd: y = (x - mean) * rstd * weight + bias per row (layer_norm), or x * rstd * (weight + offset) (rms_norm); with a
// residual, x + residual rounded to its type is what is normalised and is written too.
// A task is a run of rows of about 64 KB, so that a row is in the cache when the second and third pass read it.
// Memory-bound: 2 elements moved per element normalised (4 with residual), about 12 operations.
// Statistics are float32 within a chunk and double across chunks. layer_norm takes sum and squares in one pass, and a
// second pass around the mean when the mean is large against the deviation (kCancellation), where one pass loses digits.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kTaskBytes = 64 << 10;
constexpr int64_t kChunkPacks = 128;
// The largest mean² / variance that one pass serves: it costs log2(1 + ratio) bits of the variance, none that shows in
// float32, four that rounding to 16 bits hides.
template <class X>
constexpr double kCancellation = sizeof(X) == 2 ? 16 : 1;
// Rows up to this many bytes are pipelined when all fits the cache: the next row is summed before this one is written, so
// that the latency of a reduction and a root hides behind the writing.
constexpr int64_t kPipelinedBytes = 8 << 10;

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

// The sums of value(i, count) and of its square over a row.
struct Sums {
  double values, squares;
};

template <class Order, class Value>
FASTATTN_INLINE Sums row_sums(int64_t cols, Value value) {
  typedef typename Order::pack pack;
  constexpr int64_t W = Order::width, kChunk = kChunkPacks * W;
  Sums total{0, 0};
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    int64_t end = begin + kChunk < cols ? begin + kChunk : cols, i = begin;
    pack s0 = splat_pack(Order{}, 0.0f), s1 = s0, q0 = s0, q1 = s0;
    auto step = [&](pack& s, pack& q, int64_t at, auto n) __attribute__((always_inline)) {
      pack v = value(at, n);
      s += v;
      q += v * v;
    };
    for (; i + 2 * W <= end; i += 2 * W) {
      step(s0, q0, i, Whole{});
      step(s1, q1, i + W, Whole{});
    }
    for (; i + W <= end; i += W) step(s0, q0, i, Whole{});
    if (i < end) step(s1, q1, i, end - i);
    total.values += reduce_add(s0 + s1);
    total.squares += reduce_add(q0 + q1);
  }
  return total;
}

// x_hat = (x - mean) * rstd + shift: mean is rounded to float32, and shift is what that leaves, times rstd.
struct Moments {
  float mean, rstd, shift;
};

// once(i, count) yields the row's elements on the first pass, again(i, count) on the second.
template <bool Centred, class X, class Once, class Again>
FASTATTN_INLINE Moments moments(int64_t cols, double eps, Once once, Again again) {
  typedef typename OrderOf<X>::order Order;
  double n = static_cast<double>(cols), left = 0, variance;
  float mean = 0;
  if constexpr (Centred) {
    Sums sums = row_sums<Order>(cols, once);
    double exact = sums.values / n;
    variance = sums.squares / n - exact * exact;
    mean = static_cast<float>(exact);
    left = exact - mean;
    if (!(exact * exact <= kCancellation<X> * variance)) {
      vf m = splat(mean);
      sums = row_sums<Order>(
          cols, [&](int64_t i, auto count) __attribute__((always_inline)) { return first(again(i, count) - m, count); });
      left = sums.values / n;
      variance = sums.squares / n - left * left;
      if (variance < 0) variance = 0;
    }
  } else {
    variance = row_sum<Order>(cols,
                              [&](int64_t i, auto count) __attribute__((always_inline)) {
                                auto v = once(i, count);
                                return v * v;
                              }) /
               n;
  }
  double rstd = 1.0 / __builtin_sqrt(variance + eps);
  return {mean, static_cast<float>(rstd), static_cast<float>(-left * rstd)};
}

// again(i, count) yields what is normalised; `ahead` is a row that is read next; it is fetched meanwhile.
template <bool Centred, class X, class W, class Again>
FASTATTN_INLINE void write_row(const NormParams& p, Again again, X* y, X* sum, Moments stats, const X* ahead, bool around_cache) {
  typedef typename OrderOf<X>::order Order;
  const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
  vf mean = splat(stats.mean), rstd = splat(stats.rstd), shift = splat(stats.shift), offset = splat(p.weight_offset);
  bool round_first = p.round_first, shifts = p.weight_offset != 0;
  auto normalised = [&](auto v, int64_t i, auto n) __attribute__((always_inline)) {
    auto h = Centred ? (v - mean) * rstd + shift : v * rstd;
    if (!Centred && round_first) h = rounded_result(h, y);
    if (weight != nullptr) {
      auto w = fetch(Order{}, weight + i, n);
      if (!Centred && shifts) w = w + offset;
      h = h * w;
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
      if (sum != nullptr) stream_exact(sum + i, v);
    } else {
      emit(y + i, h, Whole{});
      if (sum != nullptr) emit_exact(sum + i, v, Whole{});
    }
  }
  if (i < cols) {
    auto v = again(i, cols - i);
    emit(y + i, normalised(v, i, cols - i), cols - i);
    if (sum != nullptr) emit_exact(sum + i, v, cols - i);
  }
}

template <bool Centred>
FASTATTN_INLINE void save(const NormParams& p, int64_t row, Moments stats) {
  if (Centred && p.mean != nullptr) p.mean[row] = stats.mean;
  if (p.rstd != nullptr) p.rstd[row] = stats.rstd;
}

template <bool Centred, class X, class W>
void rows_fwd(const NormParams& p, int64_t begin, int64_t end, bool around_cache) {
  typedef typename OrderOf<X>::order Order;
  int64_t cols = p.cols;
  bool pipelined = !around_cache && cols * static_cast<int64_t>(sizeof(X)) <= kPipelinedBytes;
  auto stats_of = [&](const X* x) __attribute__((always_inline)) {
    auto read = [&](int64_t i, auto n) __attribute__((always_inline)) { return fetch(Order{}, x + i, n); };
    return moments<Centred, X>(cols, p.eps, read, read);
  };
  const X* x = row_of<X>(p.x, begin);
  Moments stats = stats_of(x);
  for (int64_t row = begin; row < end; ++row) {
    const X* next = row + 1 < end ? row_of<X>(p.x, row + 1) : x;
    Moments next_stats = stats;
    if (pipelined && row + 1 < end) next_stats = stats_of(next);
    auto read = [&](int64_t i, auto n) __attribute__((always_inline)) { return fetch(Order{}, x + i, n); };
    X* y = static_cast<X*>(p.y) + row * cols;
    const X* ahead = pipelined && row + 2 < end ? row_of<X>(p.x, row + 2) : next;
    write_row<Centred, X, W>(p, read, y, static_cast<X*>(nullptr), stats, ahead, around_cache);
    save<Centred>(p, row, stats);
    if (!pipelined && row + 1 < end) next_stats = stats_of(next);
    stats = next_stats;
    x = next;
  }
}

// The same with a residual: the rounded sums stay in scratch for the second pass.
template <bool Centred, class X, class W>
void added_rows_fwd(const NormParams& p, int64_t begin, int64_t end, bool around_cache) {
  typedef typename OrderOf<X>::order Order;
  int64_t cols = p.cols;
  float* scratch = static_cast<float*>(thread_scratch((cols + Order::width) * 4));
  for (int64_t row = begin; row < end; ++row) {
    const X *x = row_of<X>(p.x, row), *r = row_of<X>(p.residual, row), *next = row_of<X>(p.x, row + 1 < end ? row + 1 : row);
    auto add = [&](int64_t i, auto n) __attribute__((always_inline)) {
      auto v = rounded(fetch(Order{}, x + i, n) + fetch(Order{}, r + i, n), x);
      keep(scratch + i, v);
      return v;
    };
    auto again = [&](int64_t i, auto) __attribute__((always_inline)) { return take(Order{}, scratch + i); };
    Moments stats = moments<Centred, X>(cols, p.eps, add, again);
    write_row<Centred, X, W>(p, again, static_cast<X*>(p.y) + row * cols, static_cast<X*>(p.sum) + row * cols, stats, next,
                             around_cache);
    save<Centred>(p, row, stats);
  }
}

template <class X, class W>
void typed_fwd(const NormParams& p) {
  int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(X));
  int64_t moved = p.rows * row_bytes * (p.sum != nullptr ? 4 : 2);
  bool around_cache =
      moved > kNonTemporalBytes && streamable(static_cast<X*>(p.y), p.cols) && streamable(static_cast<X*>(p.sum), p.cols);
  int64_t per_task = kTaskBytes / row_bytes > 1 ? kTaskBytes / row_bytes : 1;
  if (int64_t share = p.rows / (16 * p.nthreads); share > per_task) per_task = share;
  int nthreads = p.rows * p.cols < kParallelElements ? 1 : p.nthreads;
  parallel_for(nthreads, (p.rows + per_task - 1) / per_task, [&](int64_t task) {
    int64_t begin = task * per_task, end = begin + per_task < p.rows ? begin + per_task : p.rows;
    auto run = p.residual.data == nullptr ? (p.centred ? rows_fwd<true, X, W> : rows_fwd<false, X, W>)
                                          : (p.centred ? added_rows_fwd<true, X, W> : added_rows_fwd<false, X, W>);
    run(p, begin, end, around_cache);
    if (around_cache) stream_fence();
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
