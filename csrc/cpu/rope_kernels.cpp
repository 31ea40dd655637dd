// rope: every pair (a, b) of a head turns by its position's angle: (a cos - b sin, b cos + a sin); elements past
// rotary_dim are copied. The tables are [rows, rotary_dim / 2] (Su et al., RoFormer, arXiv:2104.09864).
// A task is a block of positions of one batch entry. Its table rows are widened once into scratch (float32, in pack order, sign
// folded in) and serve all heads of q and k. Whichever of position and head has the smaller stride runs innermost, so that memory
// is streamed whatever the layout. Memory-bound: 2 elements moved per element, 4 operations.
#include "kernels.h"
#include "parallel.h"
#include "rope_params.h"
#include "rows.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Positions per task: few when all heads of a position are neighbours, many when all positions of a head are.
constexpr int64_t kBlockSeqMajor = 16, kBlockHeadMajor = 64;

// The widened table of one block: row s holds `width` cosines, then `width` sines.
struct Table {
  float* data;
  int64_t width;
  const float* cos(int64_t s) const { return data + 2 * s * width; }
  const float* sin(int64_t s) const { return data + (2 * s + 1) * width; }
};

FASTATTN_INLINE int64_t position(const RopeParams& p, int64_t b, int64_t s) {
  if (p.positions == nullptr) return s;
  int64_t at = b * p.position_stride[0] + s * p.position_stride[1];
  return p.positions_int64 ? static_cast<const int64_t*>(p.positions)[at] : static_cast<const int32_t*>(p.positions)[at];
}

template <class Order, class C>
FASTATTN_INLINE void widen(const C* from, float sign, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + Order::width <= n; i += Order::width) keep(to + i, fetch(Order{}, from + i, Whole{}) * splat(sign));
  if (i < n) keep(to + i, fetch(Order{}, from + i, n - i) * splat(sign));
}

template <class Order, class C>
void fill_table(const RopeParams& p, const Table& table, int64_t b, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    int64_t row = position(p, b, s);
    float *cos = table.data + 2 * (s - begin) * table.width, *sin = cos + table.width;
    widen<Order>(static_cast<const C*>(p.cos) + b * p.cos_stride[0] + row * p.cos_stride[1], 1.0f, cos, p.half);
    widen<Order>(static_cast<const C*>(p.sin) + b * p.sin_stride[0] + row * p.sin_stride[1], p.inverse ? -1.0f : 1.0f, sin, p.half);
  }
}

template <class T>
FASTATTN_INLINE void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half, bool around_cache) {
  typedef typename OrderOf<T>::order Order;
  auto turn = [&](int64_t i, auto n) __attribute__((always_inline)) {
    auto a = fetch(Order{}, x + i, n), b = fetch(Order{}, x + half + i, n);
    auto c = take(Order{}, cos + i), s = take(Order{}, sin + i);
    auto low = a * c - b * s, high = b * c + a * s;
    if (around_cache) {  // only with whole packs
      stream(y + i, low);
      stream(y + half + i, high);
    } else {
      emit(y + i, low, n);
      emit(y + half + i, high, n);
    }
  };
  int64_t i = 0;
  for (; i + Order::width <= half; i += Order::width) turn(i, Whole{});
  if (i < half) turn(i, half - i);
}

template <class T>
FASTATTN_INLINE void rotate_neighbours(const T* x, T* y, const float* cos, const float* sin, int64_t half, bool around_cache) {
  auto turn = [&](int64_t i, auto n) __attribute__((always_inline)) {
    pair v = fetch(Paired{}, x + 2 * i, n);
    vf c = load(cos + i), s = load(sin + i);
    pair out = {v.even * c - v.odd * s, v.odd * c + v.even * s};
    if (around_cache)
      stream(y + 2 * i, out);
    else
      emit(y + 2 * i, out, n);
  };
  int64_t i = 0;
  for (; i + VL <= half; i += VL) turn(i, Whole{});
  if (i < half) turn(i, 2 * (half - i));
}

template <class T>
void rotate_block(const RopeParams& p, const RopeTensor& t, const Table& table, int64_t b, int64_t begin, int64_t end,
                  bool around_cache) {
  auto head = [&](int64_t s, int64_t h) __attribute__((always_inline)) {
    const T* x = static_cast<const T*>(t.x) + b * t.x_stride[0] + s * t.x_stride[1] + h * t.x_stride[2];
    T* y = static_cast<T*>(t.y) + b * t.y_stride[0] + s * t.y_stride[1] + h * t.y_stride[2];
    const float *cos = table.cos(s - begin), *sin = table.sin(s - begin);
    if (p.interleaved)
      rotate_neighbours(x, y, cos, sin, p.half, around_cache);
    else
      rotate_halves(x, y, cos, sin, p.half, around_cache);
    if (int64_t rest = t.headdim - 2 * p.half; rest > 0) __builtin_memcpy(y + 2 * p.half, x + 2 * p.half, rest * sizeof(T));
  };
  if (t.x_stride[1] >= t.x_stride[2]) {
    for (int64_t s = begin; s < end; ++s)
      for (int64_t h = 0; h < t.nheads; ++h) head(s, h);
  } else {
    for (int64_t h = 0; h < t.nheads; ++h)
      for (int64_t s = begin; s < end; ++s) head(s, h);
  }
}

template <class T>
bool can_stream(const RopeParams& p) {
  int64_t elements = 0;
  bool aligned = true;
  for (const RopeTensor& t : p.tensor) {
    if (t.x == nullptr) continue;
    elements += p.batch * p.seqlen * t.nheads * t.headdim;
    aligned = aligned && streamable(static_cast<T*>(t.y), p.half);
    for (int d = 0; d < 3; ++d) aligned = aligned && streamable(static_cast<T*>(t.y), t.y_stride[d]);
  }
  return aligned && 2 * elements * static_cast<int64_t>(sizeof(T)) > kNonTemporalBytes;
}

template <class T>
void typed_rope(const RopeParams& p) {
  typedef typename OrderOf<T>::order Order;
  const RopeTensor &first = p.tensor[0], &second = p.tensor[1];
  bool around_cache = can_stream<T>(p);
  int64_t per_task = first.x_stride[1] >= first.x_stride[2] ? kBlockSeqMajor : kBlockHeadMajor;
  if (per_task > p.seqlen) per_task = p.seqlen;
  int64_t blocks = (p.seqlen + per_task - 1) / per_task;
  int64_t elements = p.batch * p.seqlen * (first.nheads * first.headdim + second.nheads * second.headdim);
  int64_t width = (p.half + 2 * VL - 1) / (2 * VL) * (2 * VL);
  parallel_for(elements < kParallelElements ? 1 : p.nthreads, p.batch * blocks, [&](int64_t task) {
    int64_t b = task / blocks, begin = task % blocks * per_task;
    int64_t end = begin + per_task < p.seqlen ? begin + per_task : p.seqlen;
    Table table{static_cast<float*>(thread_scratch(2 * per_task * width * 4)), width};
    // Neighbours come apart in straight order, whatever the type.
    if (p.interleaved)
      p.table_dtype == 0 ? fill_table<Straight, float>(p, table, b, begin, end) : fill_table<Straight, T>(p, table, b, begin, end);
    else
      p.table_dtype == 0 ? fill_table<Order, float>(p, table, b, begin, end) : fill_table<Order, T>(p, table, b, begin, end);
    for (const RopeTensor& t : p.tensor)
      if (t.x != nullptr) rotate_block<T>(p, t, table, b, begin, end, around_cache);
    if (around_cache) stream_fence();
  });
}

}  // namespace

void rope(const RopeParams& p) {
  if (p.dtype == 0) return typed_rope<float>(p);
  if (p.dtype == 1) return typed_rope<bf16>(p);
  return typed_rope<f16>(p);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
