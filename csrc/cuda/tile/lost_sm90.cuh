// Rows that met a NaN or an infinity in v. A tile's product multiplies hidden keys by 0, and 0 · NaN is NaN: such a row is computed
// again from the keys that it sees and no others.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/math.cuh>
#include <tile/band.cuh>
#include <tile/epilogue_sm90.cuh>
#include <tile/philox.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax.cuh>

template <class T>
__forceinline__ float dot_16(uint4 a, uint4 b, float sum) {
  const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 u = unpack<T>(x[i]), w = unpack<T>(y[i]);
    sum = fmaf(u.y, w.y, fmaf(u.x, w.x, sum));
  }
  return sum;
}

// o of query m by one warp, whose lanes agree on all arguments. top and total: of the row, in units of log 2; lane l has the
// columns l + 32 c of the result. Bound by latency; nobody needs it fast.
template <class T, int HEADDIM_V, class Params>
__forceinline__ void row_again(float (&o)[(HEADDIM_V + 31) / 32], const Params& p, const Sequence& s, int m, float top,
                               float total) {
  constexpr int kColumns = (HEADDIM_V + 31) / 32;
  u32 lane = threadIdx.x & 31;
  Span span = span_of(p, s, m, 0);
  ScoreRule rule = score_rule(p, s);
  const T* q = row_of<T>(p.q, p.q_stride, s.b, s.first_q, s.h, m);
  float share = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) o[c] = 0.0f;
  for (int n0 = span.first; n0 < span.last; n0 += 32) {
    int n = n0 + static_cast<int>(lane);
    bool seen = n < span.last;
    if (seen && p.mask != nullptr) seen = pairs_of<u8>(p.mask, p.mask_stride, s).at(m, n) != 0;
    float x = 0.0f;
    if (seen) {
      const T* k = row_of<T>(p.k, p.k_stride, s.b, s.first_k, s.h_k, n);
      for (int d = 0; d < p.headdim; d += 8) x = dot_16<T>(load_16(q + d), load_16(k + d), x);
      x = log2_score(rule, x, static_cast<float>(m + s.diagonal - n));
      if (p.bias != nullptr) {
        float bias = p.bias_float ? pairs_of<float>(p.bias, p.bias_stride, s).at(m, n)
                                  : to_float(pairs_of<T>(p.bias, p.bias_stride, s).at(m, n));
        seen = bias != -infinity();
        x = fmaf(bias, kLog2e, x);
      }
    }
    float weight = exp2_approx(x - top) * share;
    if (seen && p.philox != nullptr) {
      uint4 words = philox_words(load_philox(p.philox), static_cast<u32>(n) >> 2, m, s.b * p.nheads + s.h);
      u32 word = n & 2 ? (n & 1 ? words.w : words.z) : (n & 1 ? words.y : words.x);
      weight = word < p.dropout_threshold ? 0.0f : weight * p.dropout_scale;
    }
    u32 visible = __ballot_sync(0xffffffffu, seen);
    for (int i = 0; i < 32; ++i) {
      float w = __shfl_sync(0xffffffffu, weight, i);
      if ((visible >> i & 1) == 0) continue;
      const T* v = row_of<T>(p.v, p.v_stride, s.b, s.first_k, s.h_k, n0 + i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        int d = static_cast<int>(lane) + 32 * c;
        if (d < p.headdim_v) o[c] = fmaf(w, to_float(v[d]), o[c]);
      }
    }
  }
}

// Overwrites the lost rows among this warp's 16 staged ones, o [16, 8 kTiles] of queries from m on; `row` is the first one's place.
template <class T, int HEADDIM_V, int kTiles, class Params>
__forceinline__ void mend_rows(u8* staging, const float (&o)[kTiles][4], const Params& p, const Sequence& s, int m, int row,
                               const float (&top)[2], const float (&total)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = 0.0f;  // NaN if a value is not finite
#pragma unroll
    for (int j = 0; j < kTiles; ++j) sum += o[j][2 * r] * 0.0f + o[j][2 * r + 1] * 0.0f;
    u32 lost = __ballot_sync(0xffffffffu, sum != 0.0f);
    for (int i = 0; lost != 0 && i < 8; ++i) {
      if ((lost >> (4 * i) & 15) == 0 || m + i + 8 * r >= s.seqlen_q) continue;
      float again[(HEADDIM_V + 31) / 32];
      row_again<T, HEADDIM_V>(again, p, s, m + i + 8 * r, __shfl_sync(0xffffffffu, top[r], 4 * i),
                              __shfl_sync(0xffffffffu, total[r], 4 * i));
      __syncwarp();
#pragma unroll
      for (int c = 0; c < (HEADDIM_V + 31) / 32; ++c) {
        int d = static_cast<int>(threadIdx.x & 31) + 32 * c;
        if (d < HEADDIM_V) *staged<T, HEADDIM_V>(staging, row + i + 8 * r, d) = from_float<T>(again[c]);
      }
    }
  }
}
