// attention_decode: few query rows against many keys, bound by reading K and V once.
// One task per (batch, key head, piece of keys); all query heads of the group share the task's reads. Lanes run over
// the head dimension; rows go in fours, so that VL dot products (VL / 4 keys x 4 rows) are reduced together by one
// transposing tree; a single row (no grouped heads, one token) goes alone, with VL keys per tree. Pieces have a fixed length, hence
// results depend neither on the batch nor on the threads. A second pass merges the pieces. Bound: memory, 2 * headdim * nheads_k
// elements per key. Dao et al., Flash-Decoding, 2023.
#include "attention_scores.h"
#include "attention_tiles.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kPiece = 1024;  // keys per task
constexpr int64_t kBlock = 256;   // keys between two softmax updates
constexpr int kMaxRows = 16;      // query rows per key head

FASTATTN_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// kRows rows are handled together: 4, or 1.
template <class T, class Cells, int kRows>
struct Decode {
  static constexpr int kKeys = VL / kRows;           // keys per reduction
  static constexpr int kTurns = kRows == 1 ? 2 : 1;  // sums over every kTurns-th key: enough chains to hide latency
  static constexpr int kWide = VB == 64 ? 4 : 2;     // vectors of columns per pass: kRows x kWide accumulators
  static constexpr int kDegree = sizeof(T) == 2 && !is_f16<T> ? 3 : 6;
  static constexpr int64_t kAhead = 64 / sizeof(T);  // rows of prefetch
  const AttentionParams& p;
  const Head s;
  int64_t group, rows, cells;
  float* queries;  // [rows / kRows][cells padded to VL][kRows]: cell vectors of kRows rows side by side
  float* scores;   // [kBlock][kRows]
  float* pair_probs;
  float* sums;  // [rows rounded up to kRows][headdim_v padded to VL]

  // Query row r of the key head: head s.hk * group + r / sq, position r % sq; rows past the end repeat the last.
  int64_t position(int64_t r) const { return min64(r, rows - 1) % s.sq; }
  int64_t head(int64_t r) const { return s.hk * group + min64(r, rows - 1) / s.sq; }

  Decode(const AttentionParams& params, int64_t b, int64_t hk)
      : p(params), s(head_of(params, b, hk * (params.nheads / params.nheads_k))), group(params.nheads / params.nheads_k) {
    rows = group * s.sq;
    cells = round_up((p.headdim + Cells::kPerCell - 1) / Cells::kPerCell, VL);
    int64_t fours = round_up(rows, kRows), cols = round_up(p.headdim_v, VL);
    float* at = static_cast<float*>(thread_scratch((fours * (cells + cols) + kBlock * kRows * 2 + 64) * 4));
    queries = at;
    sums = queries + fours * cells;
    scores = sums + fours * cols;
    pair_probs = scores + kBlock * kRows;
    for (int64_t r = 0; r < fours; ++r) {
      Head h = s;
      h.h = head(r);
      const T* row = q_row<T>(p, h, position(r));
      for (int64_t cell = 0; cell < cells; cell += VL)
        store_i(queries + r / kRows * kRows * cells + cell * kRows + r % kRows * VL, row_cells<Cells>(row, cell, p.headdim));
    }
  }

  // Rows [r, r + kRows) against keys [begin, end). Writes the unnormalised sums, the maximum (log2 units) and the total.
  void run(int64_t begin, int64_t end, float* o_to, int64_t o_ld, float* top_to, float* total_to) {
    for (int64_t r = 0; r < rows; r += kRows) {
      float top[kRows], total[kRows];
      for (int i = 0; i < kRows; ++i) top[i] = -kInfinity, total[i] = 0.0f;
      float* out = sums + r * round_up(p.headdim_v, VL);
      __builtin_memset(out, 0, kRows * round_up(p.headdim_v, VL) * sizeof(float));
      int64_t first = begin, last = end;
      trim(r, first, last);
      for (int64_t n = first; n < last; n += kBlock) block(r, n, min64(kBlock, last - n), top, total, out);
      for (int64_t i = 0; i < kRows && r + i < rows; ++i) {
        top_to[r + i] = top[i];
        total_to[r + i] = total[i];
        __builtin_memcpy(o_to + (r + i) * o_ld, out + i * round_up(p.headdim_v, VL), p.headdim_v * sizeof(float));
      }
    }
  }

  void block(int64_t r, int64_t n0, int64_t count, float (&top)[kRows], float (&total)[kRows], float* out) {
    raw_scores(r, n0, count);
    bool hidden = false;  // is some pair invisible?
    float c = p.scale * kLog2e;
    if (is_modified(p) || banded(r, n0, count)) {
      hidden = apply(r, n0, count);
      c = 1.0f;
    } else if (p.mask != nullptr) {
      hidden = apply_mask(r, n0, count);
    }
    int64_t padded = round_up(count, 2 * kKeys);
    for (int64_t i = count * kRows; i < padded * kRows; ++i) scores[i] = -kInfinity;
    vf most = splat(-kInfinity);
    for (int64_t i = 0; i < padded * kRows; i += VL) most = max(most, load(scores + i));
    float shift[VL], factor[kRows];
    for (int i = 0; i < kRows; ++i) {
      float m = top[i];
      for (int j = i; j < VL; j += kRows) {
        float x = most[j] * c;
        m = x > m || x != x ? x : m;
      }
      factor[i] = top[i] == m ? 1.0f : exp2<6>(splat(top[i] - m))[0];
      top[i] = m;
      for (int j = i; j < VL; j += kRows) shift[j] = m == -kInfinity ? 0.0f : -m;
    }
    vf sum = zero();
    for (int64_t i = 0; i < padded * kRows; i += VL) {
      vf x = exp2<kDegree>(fma(load(scores + i), splat(c), load(shift)));
      sum = sum + x;
      store(scores + i, x);
    }
    for (int i = 0; i < kRows; ++i) {
      float t = 0;
      for (int j = i; j < VL; j += kRows) t += sum[j];
      total[i] = total[i] * factor[i] + t;
    }
    weighted_sum(n0, count, factor, hidden, out);
  }

  // How many of the `count` keys from n on lie one stride apart.
  int64_t run_of(int64_t n, int64_t count) const {
    return p.block_table == nullptr ? count : min64(count, p.block_size - n % p.block_size);
  }

  // scores[n][i] = q row (r + i) . key n. Every index into the sums is a constant, or they would live in memory.
  void raw_scores(int64_t r, int64_t n0, int64_t count) {
    const float* q = queries + r / kRows * kRows * cells;
    int64_t full = p.headdim / Cells::kPerCell / VL * VL, row_bytes = p.headdim * sizeof(T);
    for (int64_t n = 0; n < count; n += kKeys) {
      const T* key[kKeys];
      const T* first = key_row<T>(p, s, p.k, p.k_stride, n0 + n);
      int64_t run = run_of(n0 + n, count - n);
      for (int j = 0; j < kKeys; ++j) {
        int64_t at = min64(j, count - n - 1);
        key[j] = at < run ? first + at * p.k_stride[1] : key_row<T>(p, s, p.k, p.k_stride, n0 + n + at);
        int64_t soon = n + j + kAhead;
        if (soon < run + n)
          prefetch_row(first + (j + kAhead) * p.k_stride[1], row_bytes);
        else if (soon < count)
          prefetch_row(key_row<T>(p, s, p.k, p.k_stride, n0 + soon), row_bytes);
        else if (soon < 2 * count)  // the values come next
          prefetch_row(key_row<T>(p, s, p.v, p.v_stride, n0 + soon - count), p.headdim_v * sizeof(T));
      }
      vf acc[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) acc[i] = zero();
      for (int64_t cell = 0; cell < full; cell += VL)
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) {
          vf k = as_float(full_cells(key[j] + cell * Cells::kPerCell));
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) acc[j * kRows + i] = dot(acc[j * kRows + i], k, load(q + cell * kRows + i * VL));
        }
      for (int64_t cell = full; cell < cells; cell += VL)
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) {
          vf k = as_float(row_cells<Cells>(key[j], cell, p.headdim));
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) acc[j * kRows + i] = dot(acc[j * kRows + i], k, load(q + cell * kRows + i * VL));
        }
      store(scores + n * kRows, reduce_each(acc));
    }
  }
  FASTATTN_INLINE vi full_cells(const T* at) {
    if constexpr (Cells::kPerCell == 2)
      return load_i(at);
    else
      return as_int(load(at));
  }
  FASTATTN_INLINE vf dot(vf acc, vf a, vf b) {
#if defined(__AVX512BF16__)
    if constexpr (Cells::kPerCell == 2) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
    return fma(a, b, acc);
  }

  bool banded(int64_t r, int64_t n0, int64_t count) const {
    for (int i = 0; i < kRows; ++i) {
      int64_t m = position(r + i);
      if (n0 < first_key(p, s, m) || n0 + count > last_key(p, s, m)) return true;
    }
    return false;
  }

  const bool* mask_row(int64_t r) const {
    return p.mask + s.b * p.mask_stride[0] + head(r) * p.mask_stride[1] + position(r) * p.mask_stride[2];
  }

  // The mask alone leaves scores raw. True when it hides something.
  bool apply_mask(int64_t r, int64_t n0, int64_t count) {
    int64_t step = p.mask_stride[3];
    uint8_t all = 1;
    for (int i = 0; i < kRows; ++i) {
      const bool* mask = mask_row(r + i) + n0 * step;
      for (int64_t n = 0; n < count; ++n) {
        bool visible = mask[n * step];
        all &= visible;
        scores[n * kRows + i] = visible ? scores[n * kRows + i] : -kInfinity;
      }
    }
    return all == 0;
  }

  // Drops keys at the ends that the mask hides from all rows: caches are padded there.
  void trim(int64_t r, int64_t& begin, int64_t& end) const {
    if (p.mask == nullptr) return;
    const bool* mask[kRows];
    for (int i = 0; i < kRows; ++i) mask[i] = mask_row(r + i);
    auto seen = [&](int64_t n) {
      bool any = false;
      for (int i = 0; i < kRows; ++i) any |= mask[i][n * p.mask_stride[3]];
      return any;
    };
    while (begin < end && !seen(begin)) ++begin;
    while (begin < end && !seen(end - 1)) --end;
  }

  // The options, one score at a time: few rows make this cheap beside the reads. True when some pair is invisible.
  __attribute__((noinline)) bool apply(int64_t r, int64_t n0, int64_t count) {
    bool hidden = false;
    for (int i = 0; i < kRows; ++i) {
      int64_t m = position(r + i), h = head(r + i), first = first_key(p, s, m), last = last_key(p, s, m);
      float slope = p.alibi_slopes ? p.alibi_slopes[s.b * p.alibi_stride[0] + h * p.alibi_stride[1]] : 0.0f;
      const bool* mask = p.mask ? mask_row(r + i) : nullptr;
      int64_t bias_at = s.b * p.bias_stride[0] + h * p.bias_stride[1] + m * p.bias_stride[2];
      for (int64_t n = 0; n < count; ++n) {
        int64_t key = n0 + n;
        float x = scores[n * kRows + i] * p.scale;
        if (p.softcap > 0.0f) x = p.softcap * tanh(splat(x / p.softcap))[0];
        if (p.alibi_slopes) x -= slope * __builtin_fabsf(static_cast<float>(m + s.diagonal - key));
        if (p.bias) {
          float bias = bias_value(bias_at + key * p.bias_stride[3]);
          x = bias == -kInfinity ? bias : x + bias;
        }
        if (key < first || key >= last || (mask && !mask[key * p.mask_stride[3]])) x = -kInfinity;
        hidden |= x == -kInfinity;
        scores[n * kRows + i] = x * kLog2e;
      }
    }
    return hidden;
  }
  float bias_value(int64_t at) const {
    if (p.bias_dtype == 0) return static_cast<const float*>(p.bias)[at];
    if (p.bias_dtype == 1) return to_float(static_cast<const bf16*>(p.bias)[at]);
    return to_float(static_cast<const f16*>(p.bias)[at]);
  }

  // out[i] = out[i] * factor[i] + sum_n scores[n][i] v[n]. Where pairs are hidden, inf or NaN in their values would leak
  // through a zero probability: a sum that is not finite is taken again, skipping zeros.
  void weighted_sum(int64_t n0, int64_t count, const float (&factor)[kRows], bool hidden, float* out) {
    int64_t cols = round_up(p.headdim_v, VL);
    const float* probs = scores;
#if defined(__AVX512BF16__)
    if constexpr (Cells::kPerCell == 2) {
      pair_up(count);
      probs = pair_probs;
    }
#endif
    for (int64_t d = 0; d < p.headdim_v; d += kWide * VL) {
      int64_t wide = min64(kWide, (p.headdim_v - d + VL - 1) / VL);
      vf total[kRows][kWide];
      column_sums(n0, count, d, wide, probs, false, total);
      vi lost = splat_i(0);
      for (int i = 0; i < kRows; ++i)
        for (int w = 0; w < kWide; ++w) lost |= not_finite(as_int(total[i][w]));
      if (__builtin_expect(hidden && any(lost), 0)) column_sums(n0, count, d, wide, probs, true, total);
      for (int i = 0; i < kRows; ++i)
        for (int w = 0; w < wide; ++w) {
          float* to = out + i * cols + d + w * VL;
          store(to, load(to) * splat(factor[i]) + total[i][w]);
        }
    }
  }

  // total[i] = sum_n probs[n][i] v[n] over kWide vectors of columns from d on, of which `wide` exist.
  void column_sums(int64_t n0, int64_t count, int64_t d, int64_t wide, const float* probs, bool careful,
                   vf (&total)[kRows][kWide]) const {
    constexpr int64_t step = Cells::kPerCell;
    bool fast = d + kWide * VL <= p.headdim_v && !careful;
    for (int i = 0; i < kRows; ++i)
      for (int w = 0; w < kWide; ++w) total[i][w] = zero();
    for (int64_t n = 0; n < count;) {
      const T* a = key_row<T>(p, s, p.v, p.v_stride, n0 + n) + d;
      int64_t whole = run_of(n0 + n, count - n) / step * step;
      if (fast && whole > 0) {
        run_sums(a, p.v_stride[1], whole, d == 0 ? whole : 0, p.headdim_v * sizeof(T), probs + n / step * kRows, total);
        n += whole;
      } else {
        const T* b = step == 2 && n + 1 < count ? key_row<T>(p, s, p.v, p.v_stride, n0 + n + 1) + d : nullptr;
        for (int w = 0; w < wide; ++w) {
          vf v = as_float(column_cells<Cells>(a, b, w * VL, p.headdim_v - d));
          for (int i = 0; i < kRows; ++i) total[i][w] = careful_add(total[i][w], probs + n / step * kRows + i, v);
        }
        n += step;
      }
    }
  }

  // The same for `whole` rows one stride apart and whole vectors: here the sums live in registers. The first `fetched` rows
  // are fetched ahead, all of their bytes: other passes take other columns.
  FASTATTN_INLINE void run_sums(const T* v_rows, int64_t v_stride, int64_t whole, int64_t fetched, int64_t row_bytes,
                                const float* probs, vf (&total)[kRows][kWide]) {
    constexpr int64_t step = Cells::kPerCell;
    vf acc[kTurns][kRows][kWide];
#pragma GCC unroll 2
    for (int turn = 0; turn < kTurns; ++turn)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) acc[turn][i][w] = turn == 0 ? total[i][w] : zero();
    auto rows = [&](const T* a, int64_t n, vf(&sum)[kRows][kWide]) __attribute__((always_inline)) {
      for (int64_t row = n + kAhead; row < min64(n + kAhead + step, fetched); ++row)
        prefetch_row(v_rows + row * v_stride, row_bytes);
      vf v[kWide];
      value_cells(a, a + v_stride, v);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) sum[i][w] = Cells::mul_add(sum[i][w], probs + n / step * kRows + i, v[w]);
    };
    int64_t n = 0;
    for (; n + kTurns * step <= whole; n += kTurns * step)
#pragma GCC unroll 2
      for (int turn = 0; turn < kTurns; ++turn) rows(v_rows + (n + turn * step) * v_stride, n + turn * step, acc[turn]);
    if (n < whole) rows(v_rows + n * v_stride, n, acc[0]);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) total[i][w] = kTurns == 2 ? acc[0][i][w] + acc[kTurns - 1][i][w] : acc[0][i][w];
  }

#if defined(__AVX512BF16__)
  // scores [key][kRows] to pair_probs [key / 2][kRows], each cell the bf16 probabilities of two keys.
  void pair_up(int64_t count) {
    if constexpr (kRows == 4) {
      for (int64_t n = 0; n < count; n += 8) {
        vi a = as_int(load(scores + n * kRows)), b = as_int(load(scores + (n + 4) * kRows));
        vi even = __builtin_shuffle(a, b, (vi){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
        vi odd = __builtin_shuffle(a, b, (vi){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
        store_i(pair_probs + n / 2 * kRows, pack_pairs(as_float(even), as_float(odd)));
      }
    } else {
      for (int64_t n = 0; n < count; n += 32) {
        vi a = as_int(load(scores + n)), b = as_int(load(scores + n + VL));
        vi even = __builtin_shuffle(a, b, (vi){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
        vi odd = __builtin_shuffle(a, b, (vi){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
        store_i(pair_probs + n / 2, pack_pairs(as_float(even), as_float(odd)));
      }
    }
  }
#endif

  template <int N>
  FASTATTN_INLINE void value_cells(const T* a, const T* b, vf (&v)[N]) {
#if defined(__AVX512BF16__)
    if constexpr (Cells::kPerCell == 2) {  // 32 columns of two keys: zip the 16-bit halves
      const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                           35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
#pragma GCC unroll 2
      for (int w = 0; w < N; w += 2) {
        __m512i x = (__m512i)load_i(a + w * VL), y = (__m512i)load_i(b + w * VL);
        v[w] = (vf)_mm512_permutex2var_epi16(x, low, y);
        v[w + 1] = (vf)_mm512_permutex2var_epi16(x, high, y);
      }
      return;
    }
#endif
    (void)b;
#pragma GCC unroll 4
    for (int w = 0; w < N; ++w) v[w] = as_float(full_cells(a + w * VL));
  }
  // A zero probability adds nothing, whatever the value holds.
  FASTATTN_INLINE vf careful_add(vf acc, const float* prob, vf v) {
    int32_t cell;
    __builtin_memcpy(&cell, prob, 4);
    if constexpr (Cells::kPerCell == 2) {
      vi bits = as_int(v);
      float x = splat_float(cell << 16), y = splat_float(cell & (int32_t)0xffff0000);
      if (x != 0.0f) acc = acc + splat(x) * as_float(bits << 16);
      if (y != 0.0f) acc = acc + splat(y) * as_float(bits & (int32_t)0xffff0000);
      return acc;
    } else {
      return *prob == 0.0f ? acc : fma(splat(*prob), v, acc);
    }
  }
  static float splat_float(int32_t bits) {
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
};

struct Pieces {
  int64_t keys, count, rows, stride;  // stride: floats of one (batch, key head, piece)
};

template <class T, class Cells>
void decode(const AttentionParams& p) {
  int64_t group = p.nheads / p.nheads_k, rows = group * p.seqlen_q;
  int64_t keys = p.num_splits > 0 ? round_up((p.seqlen_k + p.num_splits - 1) / p.num_splits, 64) : kPiece;
  keys = max64(keys, 64);
  int64_t pieces = max64(1, (p.seqlen_k + keys - 1) / keys);
  int64_t stride = rows * (p.headdim_v + 2);
  float* partial = new float[p.batch * p.nheads_k * pieces * stride];
  auto range = [&](const Head& s, int64_t piece, int64_t& begin, int64_t& end) {
    begin = max64(piece * keys, s.sq > 0 ? first_key(p, s, 0) : 0);
    end = min64(min64((piece + 1) * keys, s.sk), s.sq > 0 ? last_key(p, s, s.sq - 1) : 0);
  };
  parallel_for(p.nthreads, p.batch * p.nheads_k * pieces, [&](int64_t task) {
    int64_t piece = task % pieces, head = task / pieces;
    Head s = head_of(p, head / p.nheads_k, head % p.nheads_k * group);
    int64_t begin, end;
    range(s, piece, begin, end);
    if (begin >= end) return;
    float* to = partial + task * stride;
    int64_t b = head / p.nheads_k, hk = head % p.nheads_k;
    if (rows == 1)
      Decode<T, Cells, 1>(p, b, hk).run(begin, end, to + 2 * rows, p.headdim_v, to, to + rows);
    else
      Decode<T, Cells, 4>(p, b, hk).run(begin, end, to + 2 * rows, p.headdim_v, to, to + rows);
  });
  parallel_for(p.nthreads, p.batch * p.nheads_k, [&](int64_t head) {
    Head s = head_of(p, head / p.nheads_k, head % p.nheads_k * group);
    for (int64_t r = 0; r < group * s.sq; ++r) {
      int64_t h = s.hk * group + r / s.sq, m = s.q_start + r % s.sq;
      float top = p.sinks ? p.sinks[h] * kLog2e : -kInfinity;
      auto each = [&](auto&& f) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          int64_t begin, end;
          range(s, piece, begin, end);
          if (begin < end) f(partial + (head * pieces + piece) * stride);
        }
      };
      each([&](const float* from) { top = from[r] > top || from[r] != from[r] ? from[r] : top; });
      float shift = top == -kInfinity ? 0.0f : top;
      float total = p.sinks && p.sinks[h] != -kInfinity ? exp2<6>(splat(p.sinks[h] * kLog2e - shift))[0] : 0.0f;
      float sum[1024];
      for (int64_t d = 0; d < p.headdim_v; ++d) sum[d] = 0.0f;
      each([&](const float* from) {
        float factor = from[r] == top ? 1.0f : exp2<6>(splat(from[r] - shift))[0];
        if (factor == 0.0f) return;
        total += factor * from[rows + r];
        const float* o = from + 2 * rows + r * p.headdim_v;
        for (int64_t d = 0; d < p.headdim_v; ++d) sum[d] += factor * o[d];
      });
      float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      T* o = static_cast<T*>(p.o) + s.b * p.o_stride[0] + m * p.o_stride[1] + h * p.o_stride[2];
      for (int64_t d = 0; d < p.headdim_v; d += VL) {
        int64_t n = min64(VL, p.headdim_v - d);
        store_n(o + d, load_n(sum + d, n) * splat(inverse), n);
      }
      if (p.lse)
        p.lse[s.b * p.lse_stride[0] + h * p.lse_stride[1] + m] =
            total == 0.0f ? -kInfinity : static_cast<float>(shift * 0.6931471805599453 + __builtin_log(total));
    }
  });
  delete[] partial;
}

}  // namespace

// Worth it while a key head's rows fit one pass; dropout and longer queries go to attention_fwd.
bool attention_is_decode(const AttentionParams& p) {
  return !p.dropout && p.seqlen_q * (p.nheads / p.nheads_k) <= kMaxRows && p.headdim_v <= 1024;
}

void attention_decode(const AttentionParams& p) {
  if (p.batch <= 0 || p.seqlen_q <= 0) return;
  if (p.dtype == 0) return decode<float, FloatCells>(p);
  if (p.dtype == 2) return decode<f16, FloatCells>(p);
#if defined(__AVX512BF16__)
  return decode<bf16, PairCells>(p);
#else
  return decode<bf16, FloatCells>(p);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
