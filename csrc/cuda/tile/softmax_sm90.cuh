// The online softmax of softmax.cuh with what a wgmma kernel gains from: few warps per scheduler, so independent chains; the
// exponential unit as busy as the tensor cores, so part of its work may go to the FMA pipes; rescaling of o put off.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/math.cuh>
#include <tile/softmax.cuh>

// A bool as a type, for lambdas that are compiled both ways.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// By how many powers of two a maximum may grow before o and the sum are rescaled: probabilities stay below 2^8, which every
// type holds as precisely as those below 1, and accumulators are float32.
constexpr float kLazyGrowth = 8.0f;

// 2^x for finite x below 2^7 on the FMA pipes: x = i + f, |f| <= 1/2, a polynomial for 2^f (relative error 7.5e-5, a third of
// half a unit of float16) and i into the exponent. Below -126 it stays at 2^-126.
__forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
  x = fmaxf(x, -126.0f);
  float i = x + kRound, f = x - (i - kRound);
  float y = fmaf(fmaf(fmaf(0.05517167f, f, 0.24261112f), f, 0.69326099f), f, 0.99992807f);
  return __uint_as_float(__float_as_uint(y) + (__float_as_uint(i) << 23));
}

// As online_softmax. kHidden: scores may be -inf. kLazy: top stays while the maximum grows by less than kLazyGrowth.
// kPolynomial: every fourth group of columns by exp2_polynomial, which does not know -inf.
template <bool kHidden, bool kLazy, bool kPolynomial, int kTiles>
__forceinline__ void online_softmax_sm90(float (&s)[kTiles][4], float (&top)[2], float (&total)[2], float (&share)[2],
                                         float factor) {
  float high[4];  // two chains for each row
#pragma unroll
  for (int e = 0; e < 4; ++e) high[e] = s[0][e];
#pragma unroll
  for (int j = 1; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) high[e] = fmaxf(high[e], s[j][e]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float raised = fmaxf(top[r], row_max(fmaxf(high[2 * r], high[2 * r + 1])) * factor);
    if (kLazy && raised - top[r] <= kLazyGrowth) raised = top[r];
    float shift = kHidden && raised == -infinity() ? 0.0f : raised;
    share[r] = exp2_approx(top[r] - shift);
    top[r] = raised;
    float sum[2];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[j][2 * r + e];
        x = fmaf(x, factor, -shift);
        x = kPolynomial && !kHidden && j % 4 == 3 ? exp2_polynomial(x) : exp2_approx(x);
        sum[e] = j == 0 ? x : sum[e] + x;
      }
    }
    total[r] = fmaf(total[r], share[r], sum[0] + sum[1]);
  }
}

// Must this warp rescale o? Without kLazy always; with it, when a maximum grew. A sum is never negative: asking keeps the compiler
// from adding up later, behind a wait that this vote stands in front of.
template <bool kLazy>
__forceinline__ bool grew(const float (&share)[2], const float (&total)[2]) {
  return !kLazy || __any_sync(0xffffffffu, share[0] != 1.0f || share[1] != 1.0f || total[0] + total[1] < 0.0f);
}

// o ·= share, row by row.
template <int kTiles>
__forceinline__ void rescale(float (&o)[kTiles][4], const float (&share)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) o[j][e] *= share[e >> 1];
  }
}

// The state before the first key: a sink is a key without a value, counted by one lane of the four that share a row.
template <class T, class Params>
__forceinline__ void start_rows(const Params& p, int h, float (&top)[2], float (&total)[2]) {
  float sink = -infinity();
  if (p.sinks != nullptr) {
    sink = kLog2e * (p.sinks_float ? static_cast<const float*>(p.sinks)[h] : to_float(static_cast<const T*>(p.sinks)[h]));
  }
  top[0] = top[1] = sink;
  total[0] = total[1] = threadIdx.x % 4 == 0 && sink != -infinity() ? 1.0f : 0.0f;
}
