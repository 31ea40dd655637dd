// From raw products q·k and dout·v to P and dS, the gradient of the scores: P = exp(score - lse), dS = P (dP - delta).
// Accumulators are those of mma_m16n8k16 and lie either as [queries, keys] or, transposed, as [keys, queries].
#pragma once
#include <attention_bwd_params.h>

#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/math.cuh>
#include <tile/band.cuh>
#include <tile/mask_walk.cuh>
#include <tile/philox.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>

// The queries [first, last) that see key n, counted from query m0 on; none for a key that does not exist.
template <class Params>
__forceinline__ Span span_of_key(const Params& p, const Sequence& s, int n, int m0) {
  int aligned = n - s.diagonal - m0;
  return {max(-m0, aligned - p.right), n < s.seqlen_k ? min(s.seqlen_q - m0, aligned + p.left + 1) : -m0};
}

// A walk over tiles from row lo on: `before` tiles that need a mask, `whole` ones, `after` ones that need one again.
struct Walk {
  int lo, before, whole, after;
  __forceinline__ int masked() const { return before + after; }
  // The number of the i-th masked or of the i-th whole tile.
  __forceinline__ int tile(int i, bool of_masked) const { return of_masked && i < before ? i : i + (of_masked ? whole : before); }
};
template <int kBlock>
__forceinline__ Walk walk_of(const Range& range, bool all_masked) {
  Walk w;
  w.lo = range.lo;
  int tiles = max(0, range.hi - range.lo + kBlock - 1) / kBlock;
  w.before = all_masked ? tiles : min(max(0, range.whole_lo - range.lo + kBlock - 1) / kBlock, tiles);
  w.whole = max(0, min(max(0, range.whole_hi - range.lo) / kBlock, tiles) - w.before);
  w.after = tiles - w.before - w.whole;
  return w;
}

// What the scores of one head depend on beside q and k. A pointer is null where the call has no such option.
struct HeadScores {
  ScoreRule rule;
  Pairs<u8> mask;
  const void* bias;
  i64 bias_m, bias_n;
  bool bias_float;
  float* dbias;  // where dS is written to
  i64 dbias_m, dbias_n;
  u32 head;  // b · nheads + h
};
template <class T>
__forceinline__ HeadScores head_scores(const AttentionBwdParams& p, const Sequence& s) {
  HeadScores h;
  h.rule = score_rule(p, s);
  h.mask = pairs_of<u8>(p.mask, p.mask_stride, s);
  if (p.mask == nullptr) h.mask.first = nullptr;
  i64 bias = s.b * p.bias_stride[0] + s.h * p.bias_stride[1];
  h.bias = p.bias == nullptr ? nullptr : static_cast<const u8*>(p.bias) + bias * (p.bias_float ? 4 : 2);
  h.bias_m = p.bias_stride[2];
  h.bias_n = p.bias_stride[3];
  h.bias_float = p.bias_float;
  h.dbias = p.dbias == nullptr ? nullptr : p.dbias + s.b * p.dbias_stride[0] + s.h * p.dbias_stride[1];
  h.dbias_m = p.dbias_stride[2];
  h.dbias_n = p.dbias_stride[3];
  h.head = static_cast<u32>(s.b * p.nheads + s.h);
  return h;
}

template <class T>
__forceinline__ float bias_at(const HeadScores& h, int m, int n) {
  i64 at = m * h.bias_m + n * h.bias_n;
  return h.bias_float ? static_cast<const float*>(h.bias)[at] : to_float(static_cast<const T*>(h.bias)[at]);
}

// What the mask shows of [m0, m1) x [n0, n1), n0 a multiple of BLOCK_N. All threads of the block ask together.
template <int BLOCK_N, int kWarps>
__forceinline__ Sight look_together(const Pairs<u8>& mask, int m0, int m1, int n0, int n1) {
  u64 misaligned = reinterpret_cast<u64>(mask.first) | static_cast<u64>(mask.stride_m) | static_cast<u64>(n1);
  bool words = mask.stride_n == 1 && (misaligned & 3) == 0;
  int each = mask.stride_m == 0 ? 1 : (m1 - m0 + kWarps - 1) / kWarps;  // rows that one warp looks at
  int first = m0 + static_cast<int>(threadIdx.x / 32) * each, last = mask.stride_m == 0 ? m0 + 1 : min(first + each, m1);
  bool seen = false, hidden = false;
  if (first < last) {
    Sight sight = look<BLOCK_N>(mask, first, last, n0, n1, words);
    seen = sight != kHidden;
    hidden = sight != kWhole;
  }
  if (__syncthreads_or(seen) == 0) return kHidden;
  return __syncthreads_or(hidden) == 0 ? kWhole : kPartly;
}

// lse_log2 and delta of the two rows, or with kTransposed of the two columns, that a thread holds of an accumulator.
struct Statistics {
  float lse[2], delta[2];
};

// P of calls without options of single pairs. Hidden pairs get -0, which no exponential is.
template <bool kMasked, bool kTransposed>
__forceinline__ void probabilities(float (&s)[4], float scale, const Statistics& t, const Span (&span)[2], int j) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    s[e] = exp2_approx(fmaf(s[e], scale, -t.lse[kTransposed ? e & 1 : e >> 1]));
    if (kMasked && !span[e >> 1].holds(8 * j + (e & 1))) s[e] = -0.0f;
  }
}

// dS of the same, in place of dP.
template <bool kMasked, bool kTransposed>
__forceinline__ void score_gradient(const float (&s)[4], float (&dp)[4], const Statistics& t) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    dp[e] = s[e] * (dp[e] - t.delta[kTransposed ? e & 1 : e >> 1]);
    if (kMasked && __float_as_uint(s[e]) == 0x80000000u) dp[e] = 0.0f;
  }
}

// What a tile with hidden pairs needs behind score_gradient<false>.
template <int kRows, int kTiles>
__forceinline__ void hide_gradients(const float (&s)[kRows][kTiles][4], float (&ds)[kRows][kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (__float_as_uint(s[r][j][e]) == 0x80000000u) ds[r][j][e] = 0.0f;
      }
    }
  }
}

// Both for calls with any option: s becomes P of the pairs that dropout keeps, dp becomes dS. (m, n) is the thread's first
// pair of tile j = 0, `words` the random words of this tile. kBias: who else wants the gradient of the bias.
enum BiasGradient { kNotBias, kToMemory, kInPlace };  // nobody; h.dbias, if not null; dp, which becomes it instead of dS
template <class T, bool kTransposed, BiasGradient kBias>
__forceinline__ void pair_gradients(const AttentionBwdParams& p, const HeadScores& h, float (&s)[4], float (&dp)[4],
                                    const Statistics& t, const Span (&span)[2], int m, int n, int diagonal, int j, uint4 words) {
  auto m_of = [&](int e) { return kTransposed ? m + 8 * j + (e & 1) : m + 8 * (e >> 1); };
  auto n_of = [&](int e) { return kTransposed ? n + 8 * (e >> 1) : n + 8 * j + (e & 1); };
  auto statistic = [](int e) { return kTransposed ? e & 1 : e >> 1; };
  bool visible[4];
  float derivative[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    visible[e] = span[e >> 1].holds(8 * j + (e & 1));
    s[e] *= h.rule.scale;
    derivative[e] = 1.0f;
  }
  if (h.rule.cap != 0.0f) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float tanh = tanh_by_exp(s[e]);
      derivative[e] = 1.0f - tanh * tanh;
      s[e] = h.rule.cap * tanh;
    }
  }
  if (h.rule.slope != 0.0f) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] -= h.rule.slope * fabsf(static_cast<float>(m_of(e) + diagonal - n_of(e)));
  }
  if (h.mask.first != nullptr) {
#pragma unroll
    for (int e = 0; e < 4; ++e) visible[e] = visible[e] && h.mask.at(m_of(e), n_of(e)) != 0;
  }
  if (h.bias != nullptr) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!visible[e]) continue;
      float bias = bias_at<T>(h, m_of(e), n_of(e));
      visible[e] = bias != -infinity();
      s[e] = fmaf(bias, kLog2e, s[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) s[e] = visible[e] ? exp2_approx(s[e] - t.lse[statistic(e)]) : 0.0f;
  const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float weight = s[e];
    if (p.philox != nullptr) {
      bool keep = word[e] >= p.dropout_threshold;
      weight = keep ? s[e] : 0.0f;
      dp[e] = keep ? dp[e] * p.dropout_scale : 0.0f;
    }
    dp[e] = visible[e] ? s[e] * (dp[e] - t.delta[statistic(e)]) : 0.0f;
    s[e] = weight;
  }
  if (kBias == kInPlace) return;
  if (kBias == kToMemory && h.dbias != nullptr) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (visible[e]) h.dbias[m_of(e) * h.dbias_m + n_of(e) * h.dbias_n] = dp[e];
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) dp[e] = visible[e] ? dp[e] * derivative[e] : 0.0f;
}
