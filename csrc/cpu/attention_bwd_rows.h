// Rows of q, do, o, K and V on their way into the operands of the backward's products, and of gradients on their way out.
#pragma once
#include "attention_scores.h"
#include "attention_tiles.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

template <class T>
FASTATTN_INLINE T* out_row(void* base, const int64_t (&stride)[3], int64_t b, int64_t row, int64_t h) {
  return static_cast<T*>(base) + b * stride[0] + row * stride[1] + h * stride[2];
}
template <class T>
FASTATTN_INLINE const T* do_row(const AttentionBwdParams& p, const Head& s, int64_t m) {
  return out_row<T>(const_cast<void*>(p.dout), p.do_stride, s.b, s.q_start + m, s.h);
}
template <class T>
FASTATTN_INLINE const T* o_row(const AttentionBwdParams& p, const Head& s, int64_t m) {
  return out_row<T>(p.o, p.o_stride, s.b, s.q_start + m, s.h);
}
FASTATTN_INLINE const float* lse_of(const AttentionParams& p, const Head& s, int64_t m) {
  return p.lse + s.b * p.lse_stride[0] + s.h * p.lse_stride[1] + s.q_start + m;
}

// Products of a and b whose lanes sum to the dot product of two rows.
template <class Cells, class T>
FASTATTN_INLINE vf dot_lanes(const T* a, const T* b, int64_t cols) {
  vf sum = zero();
  int64_t d = 0;
#if defined(__AVX512BF16__)
  if constexpr (Cells::kPerCell == 2)
    for (; d + 2 * VL <= cols; d += 2 * VL)
      sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load_i(a + d), (__m512bh)load_i(b + d));
#endif
  for (; d + VL <= cols; d += VL) sum = fma(load(a + d), load(b + d), sum);
  if (d < cols) sum = fma(load_n(a + d, cols - d), load_n(b + d, cols - d), sum);
  return sum;
}

// delta[lane] = rowsum(do * o) - dlse of the queries from m on; 0 past `rows`. do_lanes as the product dP = V do^T reads it.
// Floats are summed in the order of that product: where P is nearly 1 (a query that sees one key), dP - delta is a difference
// of equal sums, and must not be left with the rounding of two orders.
template <class Cells, class T>
FASTATTN_INLINE void deltas(const AttentionBwdParams& p, const Head& s, int64_t m, int64_t rows, const float* do_lanes,
                            float* delta) {
  const T *dout = do_row<T>(p, s, m), *o = o_row<T>(p, s, m);
  int64_t cols = p.headdim_v;
  for (int64_t lane = 0; lane < kM; lane += VL) {
    vf sum = zero();
    if constexpr (Cells::kPerCell == 1) {
      vf chain = zero();
      for (int64_t c = 0; c < cols; c += VL) {
        if (c % kChain == 0) {
          sum = sum + chain;
          chain = zero();
        }
        vi block[VL];
        for (int i = 0; i < VL; ++i)
          block[i] = lane + i < rows ? row_cells<Cells>(o + (lane + i) * p.o_stride[1], c, cols) : splat_i(0);
        transpose(block);
        for (int i = 0; i < min64(VL, cols - c); ++i) chain = fma(as_float(block[i]), load(do_lanes + (c + i) * kM + lane), chain);
      }
      sum = sum + chain;
    } else {
      vf x[VL];
      for (int64_t i = 0; i < VL; ++i)
        x[i] =
            lane + i < rows ? dot_lanes<Cells>(dout + (lane + i) * p.do_stride[1], o + (lane + i) * p.o_stride[1], cols) : zero();
      sum = reduce_each(x);
    }
    int64_t n = max64(0, min64(VL, rows - lane));
    if (p.dlse != nullptr) sum = sum - load_n(p.dlse + s.b * p.dlse_stride[0] + s.h * p.dlse_stride[1] + s.q_start + m + lane, n);
    store(delta + lane, sum);
  }
}

// P = exp2(score + shift + shift_low) with shift = -lse * log2 e. Of an empty row, or a lane without a query, the shift is
// -inf: P = 0 whatever the score. shift_low is what the rounding of the shift leaves: without it every P of a row would be off
// by the same 1e-7.
FASTATTN_INLINE void shifts(const float* lse, int64_t rows, float* shift, float* shift_low) {
  for (int64_t i = 0; i < kM; ++i) {
    float x = i < rows ? lse[i] : -kInfinity;
    double exact = -1.4426950408889634 * x;
    shift[i] = x == -kInfinity ? -kInfinity : static_cast<float>(exact);
    shift_low[i] = x == -kInfinity ? 0.0f : static_cast<float>(exact - shift[i]);
  }
}

template <class Cells>
FASTATTN_INLINE vi not_finite_cells(vi x) {
  return Cells::kPerCell == 2 ? not_finite(x << 16) | not_finite(x) : not_finite(x);
}

// kM rows as the B operand of a product over queries: [kM / kPerCell][ld] cells, zeros past the rows and columns. A row that
// sees nothing (shift -inf) counts as zeros whatever it holds (its P and dS are 0). So, with only_finite, does a row that holds
// inf or NaN.
template <class Cells, class T>
FASTATTN_INLINE void rows_as_steps(const T* from, int64_t stride, int64_t rows, int64_t cols, const float* shift, bool only_finite,
                                   int64_t ld, float* to) {
  constexpr int64_t kPer = Cells::kPerCell;
  auto pack = [&](bool look_at_rows) __attribute__((always_inline)) {
    vi bad = splat_i(0);
    for (int64_t m = 0; m < kM; m += kPer) {
      const T* row[2] = {nullptr, nullptr};
      for (int64_t i = 0; i < kPer && m + i < rows; ++i) {
        const T* at = from + (m + i) * stride;
        if (shift[m + i] == -kInfinity) continue;
        if (look_at_rows) {
          vi x = splat_i(0);
          for (int64_t d = 0; d < cols; d += VL) x |= not_finite(as_int(d + VL <= cols ? load(at + d) : load_n(at + d, cols - d)));
          if (any(x)) continue;
        }
        row[i] = at;
      }
      for (int64_t d = 0; d < ld; d += VL) {
        vi x = splat_i(0);
        if (d < cols && row[0] != nullptr) x = column_cells<Cells>(row[0], row[1], d, cols);
        if (d < cols && row[0] == nullptr && row[1] != nullptr)
          x = column_cells<Cells>(row[1], static_cast<const T*>(nullptr), d, cols) << 16;
        bad |= not_finite_cells<Cells>(x);
        store_i(to + m / kPer * ld + d, x);
      }
    }
    return any(bad);
  };
  if (pack(false) && only_finite) pack(true);
}

// ---- gradients on their way out
// May gradients be written around the cache? Where the call's tensors do not fit it, nobody would find them there, and lines
// that are written whole need not be read first. Every row must be whole vectors.
template <class T>
FASTATTN_INLINE bool writes_around(const AttentionBwdParams& p, int64_t query_rows) {
  constexpr int64_t size = sizeof(T);
  int64_t key_rows = p.cu_seqlens_k ? p.cu_seqlens_k[p.batch] : p.batch * p.seqlen_k;
  int64_t elements = 2 * (query_rows * p.nheads + key_rows * p.nheads_k) * (p.headdim + p.headdim_v);
  if (elements * size <= kNonTemporalBytes) return false;
  int64_t bits = (p.headdim | p.headdim_v) * size;
  bits |= reinterpret_cast<intptr_t>(p.dq) | reinterpret_cast<intptr_t>(p.dk) | reinterpret_cast<intptr_t>(p.dv);
  for (int i = 0; i < 3; ++i) bits |= (p.dq_stride[i] | p.dk_stride[i] | p.dv_stride[i]) * size;
  return bits % VB == 0;
}

// Two vectors rounded to 16 bits, side by side.
template <class T>
FASTATTN_INLINE vi narrow_both(T, vf low, vf high) {
  T both[2 * VL];
  store(both, low);
  store(both + VL, high);
  return load_i(both);
}
#if defined(__AVX512BF16__)
// One instruction for both; it takes magnitudes below 2^-126 for 0, as the products before it did.
FASTATTN_INLINE vi narrow_both(bf16, vf low, vf high) { return (vi)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#endif

// One row, times factor.
template <class T>
FASTATTN_INLINE void store_row(const float* from, float factor, int64_t cols, T* to, bool around) {
  constexpr int64_t width = VB / sizeof(T);
  int64_t d = 0;
  for (; d + width <= cols; d += width) {
    vf x = load(from + d) * splat(factor);
    vi line = as_int(x);
    if constexpr (width != VL) line = narrow_both(T{}, x, load(from + d + VL) * splat(factor));
    if (around)
      stream_bits(to + d, line);
    else
      store_i(to + d, line);
  }
  for (; d < cols; d += VL) store_n(to + d, load(from + d) * splat(factor), min64(VL, cols - d));
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
