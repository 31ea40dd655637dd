// What benchmarks divide by. fma_flops: a burst of independent multiply-adds. copy_bytes: one of several ways to copy, of which
// the fastest counts: whole vectors, around the cache or through it, with the lines far ahead fetched or left to the hardware.
#include "rows.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int kChains = VB == 64 ? 24 : 12;  // latency times issue width, with room

// An empty statement that "changes" x keeps the chains apart: the compiler would merge equal ones.
#if defined(__x86_64__)
#define FASTATTN_OPAQUE(x) asm volatile("" : "+v"(x))
#else
#define FASTATTN_OPAQUE(x) asm volatile("" : "+w"(x))
#endif

template <class Step>
FASTATTN_INLINE double burst(int64_t iterations, double flops_per_step, Step step) {
  vf acc[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) acc[i] = splat(0.5f);
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      acc[i] = step(acc[i]);
      FASTATTN_OPAQUE(acc[i]);
    }
  }
  return flops_per_step * kChains * static_cast<double>(iterations);
}

}  // namespace

double fma_flops(bool bf16, int64_t iterations) {
#if defined(__AVX512BF16__)
  if (bf16) {
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00), y = (__m512bh)_mm512_set1_epi32(0x3e803e80);
    return burst(iterations, 4.0 * VL, [&](vf a) { return (vf)_mm512_dpbf16_ps((__m512)a, x, y); });
  }
#endif
  (void)bf16;  // without dot products the fp32 rate is the attainable one
  vf x = splat(0.999f), y = splat(0.001f);
  return burst(iterations, 2.0 * VL, [&](vf a) { return fma(a, x, y); });
}

void copy_bytes(char* to, const char* from, int64_t bytes, bool around_cache, int64_t ahead) {
  constexpr int64_t kLine = 64;
  auto lines = [&](auto put) __attribute__((always_inline)) {
    for (int64_t i = 0; i + kLine <= bytes; i += kLine) {
      if (ahead > 0) prefetch(from + i + ahead);
#pragma GCC unroll 4
      for (int64_t j = i; j < i + kLine; j += VB) put(to + j, load_i(from + j));
    }
  };
  if (around_cache) {
    lines([](char* p, vi x) __attribute__((always_inline)) { stream_bits(p, x); });
    stream_fence();
  } else {
    lines([](char* p, vi x) __attribute__((always_inline)) { store_i(p, x); });
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
