// From raw products q·k to scores in units of log 2, in the order of the contract: scale, softcap, ALiBi, bias; and who is
// hidden by a bias of -inf or by the mask. On pairs, and on accumulators [16, 8 kTiles] of mma_m16n8k16, whose rows g and
// g + 8 (g = lane / 4) and columns 2 (lane % 4) and the next are a thread's.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/math.cuh>
#include <tile/band.cuh>
#include <tile/softmax.cuh>

// 1 - 2 / (1 + exp 2x): the error is a few 2^-24, absolute.
__forceinline__ float tanh_by_exp(float x) {
  float y = 1.0f - 2.0f * rcp_approx(1.0f + exp2_approx(fabsf(x) * (2.0f * kLog2e)));
  return copysignf(y, x);
}

// scale: times log2 e, or with a softcap divided by it; cap: softcap · log2 e, or 0; slope: times log2 e, or 0.
struct ScoreRule {
  float scale, cap, slope;
};
template <class Params>
__forceinline__ ScoreRule score_rule(const Params& p, const Sequence& s) {
  float slope = p.alibi_slopes != nullptr ? p.alibi_slopes[s.b * p.alibi_stride + s.h] * kLog2e : 0.0f;
  if (p.softcap != 0.0f) return {p.scale / p.softcap, p.softcap * kLog2e, slope};
  return {p.scale * kLog2e, 0.0f, slope};
}

// One pair without its bias. distance: m + diagonal - n.
__forceinline__ float log2_score(const ScoreRule& rule, float s, float distance) {
  s *= rule.scale;
  if (rule.cap != 0.0f) s = rule.cap * tanh_by_exp(s);
  return s - rule.slope * fabsf(distance);
}

// A mask or a bias of one head: element (m, n) is at m · stride_m + n · stride_n.
template <class T>
struct Pairs {
  const T* first;
  i64 stride_m, stride_n;
  __forceinline__ T at(int m, int n) const { return first[m * stride_m + n * stride_n]; }
};
template <class T>
__forceinline__ Pairs<T> pairs_of(const void* base, const i64 (&stride)[4], const Sequence& s) {
  return {static_cast<const T*>(base) + s.b * stride[0] + s.h * stride[1], stride[2], stride[3]};
}

// Where the accumulator lies among the pairs, as this thread sees it: its rows are m and m + 8, its columns n + 8 j and the
// next; span[r] are the keys that row r sees by position, counted from n on.
struct Corner {
  int m, n;
  Span span[2];
};
template <class Params>
__forceinline__ Corner corner_of(const Params& p, const Sequence& s, int m0, int n0) {
  Corner c;
  c.m = m0 + (threadIdx.x >> 2 & 7);
  c.n = n0 + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int r = 0; r < 2; ++r) c.span[r] = span_of(p, s, c.m + 8 * r, c.n);
  return c;
}

// Scale, softcap and ALiBi.
template <int kTiles>
__forceinline__ void score_tile(float (&s)[kTiles][4], const ScoreRule& rule, const Sequence& sequence, const Corner& c) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] *= rule.scale;
  }
  if (rule.cap != 0.0f) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = rule.cap * tanh_by_exp(s[j][e]);
    }
  }
  if (rule.slope != 0.0f) {
    float distance = static_cast<float>(c.m + sequence.diagonal - c.n);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] -= rule.slope * fabsf(distance + static_cast<float>(8 * (e >> 1) - 8 * j - (e & 1)));
      }
    }
  }
}

// The elements of `pairs` that row r of the accumulator needs, into x; `absent` where the position hides the key, which is
// not read. Neighbouring keys at stride 1 need no arithmetic for their addresses.
template <bool kUnit, class T, int kTiles>
__forceinline__ void load_pairs(T (&x)[kTiles][2], const Pairs<T>& pairs, const Corner& c, int r, T absent) {
  const i64 stride = kUnit ? 1 : pairs.stride_n;
  const T* from = pairs.first + (c.m + 8 * r) * pairs.stride_m + c.n * stride;
#pragma unroll
  for (int j = 0; j < kTiles; ++j, from += 8 * stride) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      x[j][e] = absent;
      if (c.span[r].holds(8 * j + e)) x[j][e] = from[e * stride];
    }
  }
}
template <class T, int kTiles>
__forceinline__ void load_pairs(T (&x)[kTiles][2], const Pairs<T>& pairs, const Corner& c, int r, T absent) {
  if (pairs.stride_n == 1) {
    load_pairs<true>(x, pairs, c, r, absent);
  } else {
    load_pairs<false>(x, pairs, c, r, absent);
  }
}

// Adds a bias; -inf hides the key whatever the score is.
template <class T, int kTiles>
__forceinline__ void add_bias(float (&s)[kTiles][4], const Pairs<T>& bias, const Corner& c) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T x[kTiles][2];
    load_pairs(x, bias, c, r, T{});
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float wide = to_float(x[j][e]);
        s[j][2 * r + e] = wide == -infinity() ? wide : fmaf(wide, kLog2e, s[j][2 * r + e]);
      }
    }
  }
}

// -inf where the position hides the key.
template <int kTiles>
__forceinline__ void hide_by_position(float (&s)[kTiles][4], const Corner& c) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!c.span[e >> 1].holds(8 * j + (e & 1))) s[j][e] = -infinity();
    }
  }
}

// -inf where the mask hides the key.
template <int kTiles>
__forceinline__ void hide_by_mask(float (&s)[kTiles][4], const Pairs<u8>& mask, const Corner& c) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    u8 seen[kTiles][2];
    load_pairs(seen, mask, c, r, u8{1});
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) s[j][2 * r + e] = seen[j][e] == 0 ? -infinity() : s[j][2 * r + e];
    }
  }
}

// May query m see key n, by position, mask and bias?
template <class T, class Params>
__forceinline__ bool sees(const Params& p, const Sequence& s, int m, int n) {
  if (!span_of(p, s, m, 0).holds(n)) return false;
  if (p.mask != nullptr && pairs_of<u8>(p.mask, p.mask_stride, s).at(m, n) == 0) return false;
  if (p.bias == nullptr) return true;
  float bias =
      p.bias_float ? pairs_of<float>(p.bias, p.bias_stride, s).at(m, n) : to_float(pairs_of<T>(p.bias, p.bias_stride, s).at(m, n));
  return bias != -infinity();
}
