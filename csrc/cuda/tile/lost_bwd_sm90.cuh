// Keys whose gradients met a NaN or an infinity in q or dout. A tile's product multiplies the queries that do not see a key by 0,
// and 0 · NaN is NaN: such a key is computed again from the queries that see it and no others. The same for dq is prevented by
// taking what is not finite out of k: who sees such a key has a NaN in lse or delta, which spoils all of its dq.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <tile/bwd_sm90.cuh>
#include <tile/philox.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax.cuh>

template <class T>
constexpr u32 kExponentBits = 0;
template <>
constexpr u32 kExponentBits<bf16> = 0x7f80;
template <>
constexpr u32 kExponentBits<f16> = 0x7c00;

// 0 for what is not finite in a tile of kBytes, by kThreads threads; the async proxy reads it behind a fence and a barrier.
template <class T, int kBytes, int kThreads>
__forceinline__ void keep_finite(u8* tile, int thread) {
#pragma unroll 4
  for (int at = 16 * thread; at < kBytes; at += 16 * kThreads) {
    uint4 x = load_shared_16(tile + at);
    u32 word[4] = {x.x, x.y, x.z, x.w};
    bool lost = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool low = (word[i] & kExponentBits<T>) == kExponentBits<T>, high = (word[i] >> 16 & kExponentBits<T>) == kExponentBits<T>;
      lost |= low || high;
      word[i] &= (low ? 0u : 0xffffu) | (high ? 0u : 0xffff0000u);
    }
    if (lost) store_shared_16(tile + at, make_uint4(word[0], word[1], word[2], word[3]));
  }
}

// Is a number of row r (0: g, 1: g + 8) in this thread's registers not finite?
template <int kCount>
__forceinline__ bool is_lost(const float (&x)[kCount], int r) {
  float sum = 0.0f;  // NaN if so
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) sum += x[4 * i + 2 * r] * 0.0f + x[4 * i + 2 * r + 1] * 0.0f;
  return sum != 0.0f;
}

// Writes for each of this warp's 16 rows whether a number of its dk or dv is not finite; marks: of the first row.
template <int kCount, int kCountV>
__forceinline__ void mark_lost(u8* marks, const float (&dk)[kCount], const float (&dv)[kCountV]) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    u32 lost = __ballot_sync(0xffffffffu, is_lost(dk, r) || is_lost(dv, r));
    if (lane % 4 == 0) marks[lane / 4 + 8 * r] = (lost >> lane & 15) != 0;
  }
}

// The same of sums whose columns are keys: bit 2 (first + j) + e says whether a number of this thread's in its column 8 j + e is
// not finite.
template <int kCount>
__forceinline__ u32 lost_columns(const float (&x)[kCount], int first) {
  u32 bits = 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int at = i / 2 * 4 + (i & 1);
    if (x[at] * 0.0f + x[at + 2] * 0.0f != 0.0f) bits |= 1u << i;
  }
  return bits << 2 * first;
}

template <class T>
__forceinline__ float dot_rows(const T* a, const T* b, int columns) {
  float sum = 0.0f;
  for (int d = threadIdx.x & 31; d < columns; d += 32) sum = fmaf(to_float(a[d]), to_float(b[d]), sum);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// dk and dv of key n by one warp, whose lanes agree on all arguments; `s` is of the group's first head. Bound by latency; nobody
// needs it fast.
template <class T, int kColumns, class Params>
__forceinline__ void key_again(const Params& p, const Sequence& first, int n) {
  const int lane = threadIdx.x & 31;
  float dk[kColumns / 32] = {}, dv[kColumns / 32] = {};
  const T* k = row_of<T>(p.k, p.k_stride, first.b, first.first_k, first.h_k, n);
  const T* v = row_of<T>(p.v, p.v_stride, first.b, first.first_k, first.h_k, n);
  const Span span = queries_of(p, first, n, 0);
#pragma unroll 1
  for (int g = 0; g < p.nheads / p.nheads_k; ++g) {
    Sequence s = first;
    s.h += g;
    const ScoreRule rule = score_rule(p, s);
    i64 row = s.b * p.row_stride[0] + s.h * p.row_stride[1] + s.first_q;
#pragma unroll 1
    for (int m = span.first; m < span.last; ++m) {
      if (p.mask != nullptr && pairs_of<u8>(p.mask, p.mask_stride, s).at(m, n) == 0) continue;
      const T* q = row_of<T>(p.q, p.q_stride, s.b, s.first_q, s.h, m);
      const T* dout = row_of<T>(p.dout, p.dout_stride, s.b, s.first_q, s.h, m);
      float score = dot_rows(q, k, p.headdim) * rule.scale, derivative = 1.0f;
      if (rule.cap != 0.0f) {
        float tanh = tanh_by_exp(score);
        derivative = 1.0f - tanh * tanh;
        score = rule.cap * tanh;
      }
      score -= rule.slope * fabsf(static_cast<float>(m + s.diagonal - n));
      if (p.bias != nullptr) {
        float bias = p.bias_float ? pairs_of<float>(p.bias, p.bias_stride, s).at(m, n)
                                  : to_float(pairs_of<T>(p.bias, p.bias_stride, s).at(m, n));
        if (bias == -infinity()) continue;
        score = fmaf(bias, kLog2e, score);
      }
      float probability = exp2_approx(score - p.lse_log2[row + m]), weight = probability;
      float gradient = dot_rows(dout, v, p.headdim_v);
      if (p.philox != nullptr) {
        uint4 words = philox_words(load_philox(p.philox), static_cast<u32>(n) >> 2, m, s.b * p.nheads + s.h);
        u32 word = n & 2 ? (n & 1 ? words.w : words.z) : (n & 1 ? words.y : words.x);
        bool keep = word >= p.dropout_threshold;
        weight = keep ? probability : 0.0f;
        gradient = keep ? gradient * p.dropout_scale : 0.0f;
      }
      gradient = probability * derivative * (gradient - p.delta[row + m]);
#pragma unroll
      for (int c = 0; c < kColumns / 32; ++c) {
        int d = lane + 32 * c;
        if (d < p.headdim) dk[c] = fmaf(gradient, to_float(q[d]), dk[c]);
        if (d < p.headdim_v) dv[c] = fmaf(weight, to_float(dout[d]), dv[c]);
      }
    }
  }
  T* dk_row = row_of<T>(p.dk, p.dk_stride, first.b, first.first_k, first.h_k, n);
  T* dv_row = row_of<T>(p.dv, p.dv_stride, first.b, first.first_k, first.h_k, n);
#pragma unroll
  for (int c = 0; c < kColumns / 32; ++c) {
    int d = lane + 32 * c;
    if (d < p.headdim) dk_row[d] = from_float<T>(dk[c] * p.scale);
    if (d < p.headdim_v) dv_row[d] = from_float<T>(dv[c] * p.dropout_scale);
  }
}
