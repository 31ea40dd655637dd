// The online softmax on accumulators of mma_m16n8k16: a thread holds of each 16 rows two, g = lane / 4 and g + 8, and of
// each 8 columns two, 2 (lane % 4) and the next. Scores are in units of log 2 once they are multiplied by `factor`.
#pragma once
#include <ptx/core.cuh>
#include <ptx/math.cuh>

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
__forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Over the four lanes that share a row.
__forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Turns a tile of scores s [16, 8 kTiles] into probabilities relative to the maximum so far. top: the maximum, times
// factor; total: the sum of this thread's columns only (row_sum at the end); share: what earlier results are worth now.
// A row without any key yet has top -inf and total 0.
// kLazy: top stays behind the maximum while that is at most 8 above it; the weights are up to 2^8 then, which float and the
// 16-bit types hold as precisely, and nearly every share is 1, so that the caller seldom needs to multiply.
template <bool kLazy = false, int kTiles>
__forceinline__ void online_softmax(float (&s)[kTiles][4], float (&top)[2], float (&total)[2], float (&share)[2], float factor) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float raised = s[0][2 * r];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) raised = fmaxf(raised, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    raised = fmaxf(top[r], row_max(raised) * factor);
    if (kLazy) raised = raised - top[r] > 8.0f ? raised : top[r];
    float shift = raised == -infinity() ? 0.0f : raised;
    share[r] = exp2_approx(top[r] - shift);
    top[r] = raised;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[j][e] = exp2_approx(fmaf(s[j][e], factor, -shift));
        sum += s[j][e];
      }
    }
    total[r] = fmaf(total[r], share[r], sum);
  }
}

// lse of a finished row in natural log; -inf for a row without keys.
__forceinline__ float log_sum(float top, float total) { return total == 0.0f ? -infinity() : (top + log2_approx(total)) * kLn2; }
