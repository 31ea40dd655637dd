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
constexpr int64_t kChunk = 128 * VL;

// The sum of term(i, count) over a row: four chains per chunk, chunks added in double.
template <class Term>
FASTATTN_INLINE double row_sum(int64_t cols, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    int64_t end = begin + kChunk < cols ? begin + kChunk : cols, i = begin;
    vf a = zero(), b = zero(), c = zero(), d = zero();
    for (; i + 4 * VL <= end; i += 4 * VL) {
      a += term(i, Whole{});
      b += term(i + VL, Whole{});
      c += term(i + 2 * VL, Whole{});
      d += term(i + 3 * VL, Whole{});
    }
    for (; i + VL <= end; i += VL) a += term(i, Whole{});
    if (i < end) b += term(i, end - i);
    total += reduce_add((a + b) + (c + d));
  }
  return total;
}

struct Moments {
  float mean, rstd;
};

// first(i, count) yields the row's elements on the first pass; s holds them for the second.
template <bool Centred, class S, class First>
FASTATTN_INLINE Moments moments(int64_t cols, double eps, const S* s, First first) {
  double mean = 0, squares;
  if constexpr (Centred) {
    mean = row_sum(cols, first) / static_cast<double>(cols);
    vf m = splat(static_cast<float>(mean));
    squares = row_sum(cols, [&](int64_t i, auto n) __attribute__((always_inline)) {
      vf d = get(s + i, n) - m;
      return keep(d * d, n);
    });
  } else {
    squares = row_sum(cols, [&](int64_t i, auto n) __attribute__((always_inline)) {
      vf v = first(i, n);
      return v * v;
    });
  }
  double variance = squares / static_cast<double>(cols) + eps;
  return {static_cast<float>(mean), static_cast<float>(1.0 / __builtin_sqrt(variance))};
}

template <bool Centred, class S, class X, class W>
FASTATTN_INLINE void write_row(const NormParams& p, const S* s, X* y, X* sum, Moments stats, bool around_cache) {
  const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
  vf mean = splat(stats.mean), rstd = splat(stats.rstd), offset = splat(p.weight_offset);
  bool round_first = p.round_first;
  auto normalised = [&](vf v, int64_t i, auto n) __attribute__((always_inline)) {
    vf h = Centred ? (v - mean) * rstd : v * rstd;
    if (round_first) h = rounded(h, y);
    if (weight != nullptr) h = h * (Centred ? get(weight + i, n) : get(weight + i, n) + offset);
    if (bias != nullptr) h = h + get(bias + i, n);
    return h;
  };
  int64_t i = 0, cols = p.cols;
  if (around_cache) {
    for (; i + VL <= cols; i += VL) {
      vf v = load(s + i);
      stream(y + i, normalised(v, i, Whole{}));
      if (sum != nullptr) stream(sum + i, v);
    }
    return;
  }
  for (; i + VL <= cols; i += VL) {
    vf v = load(s + i);
    store(y + i, normalised(v, i, Whole{}));
    if (sum != nullptr) store(sum + i, v);
  }
  if (i < cols) {
    vf v = load_n(s + i, cols - i);
    store_n(y + i, normalised(v, i, cols - i), cols - i);
    if (sum != nullptr) store_n(sum + i, v, cols - i);
  }
}

template <bool Centred, class X, class W>
void rows_fwd(const NormParams& p, int64_t begin, int64_t end, bool around_cache) {
  int64_t cols = p.cols;
  bool added = p.residual.data != nullptr;
  float* scratch = added ? static_cast<float*>(thread_scratch((cols + VL) * 4)) : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = row_of<X>(p.x, row);
    X* y = static_cast<X*>(p.y) + row * cols;
    Moments stats;
    if (added) {
      const X* r = row_of<X>(p.residual, row);
      stats = moments<Centred>(cols, p.eps, scratch, [&](int64_t i, auto n) __attribute__((always_inline)) {
        vf v = rounded(get(x + i, n) + get(r + i, n), x);
        store(scratch + i, v);
        return v;
      });
      write_row<Centred, float, X, W>(p, scratch, y, static_cast<X*>(p.sum) + row * cols, stats, around_cache);
    } else {
      stats = moments<Centred>(cols, p.eps, x, [&](int64_t i, auto n) __attribute__((always_inline)) { return get(x + i, n); });
      write_row<Centred, X, X, W>(p, x, y, static_cast<X*>(nullptr), stats, around_cache);
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
