// What the memory-bound kernels share: loads and stores of a whole or partial vector under one name, non-temporal
// stores, rounding to the element type, the address of a row.
#pragma once
#include "norm_params.h"
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Above this many bytes read and written, output lines would be evicted before anybody reads them: write around the cache.
constexpr int64_t kNonTemporalBytes = 24 << 20;
// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kParallelElements = 32 << 10;

struct Whole {};  // in place of a count: all VL lanes

template <class T>
FASTATTN_INLINE vf get(const T* p, Whole) { return load(p); }
template <class T>
FASTATTN_INLINE vf get(const T* p, int64_t n) { return load_n(p, n); }
template <class T>
FASTATTN_INLINE void put(T* p, vf x, Whole) { store(p, x); }
template <class T>
FASTATTN_INLINE void put(T* p, vf x, int64_t n) { store_n(p, x, n); }
// Lanes past n become 0, so that they do not count in a sum.
FASTATTN_INLINE vf keep(vf x, Whole) { return x; }
FASTATTN_INLINE vf keep(vf x, int64_t n) { return select((vi)(iota() < splat_i((int32_t)n)), x, zero()); }

// x rounded to the element type that the pointer names.
FASTATTN_INLINE vf rounded(vf x, const float*) { return x; }
FASTATTN_INLINE vf rounded(vf x, const bf16*) { return widen_bf16(narrow_bf16(x)); }
FASTATTN_INLINE vf rounded(vf x, const f16*) { return widen_f16(narrow_f16(x)); }

// Stores of VL elements to an address aligned to them, past the cache where the instruction set can.
#if defined(__x86_64__)
#if VB == 64
FASTATTN_INLINE void stream(float* p, vf x) { _mm512_stream_ps(p, (__m512)x); }
FASTATTN_INLINE void stream_bits(void* p, vh h) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)h); }
#elif VB == 32
FASTATTN_INLINE void stream(float* p, vf x) { _mm256_stream_ps(p, (__m256)x); }
FASTATTN_INLINE void stream_bits(void* p, vh h) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)h); }
#else
FASTATTN_INLINE void stream(float* p, vf x) { _mm_stream_ps(p, (__m128)x); }
FASTATTN_INLINE void stream_bits(void* p, vh h) { _mm_stream_si64(static_cast<long long*>(p), (long long)h); }
#endif
FASTATTN_INLINE void stream_fence() { _mm_sfence(); }
#else
FASTATTN_INLINE void stream(float* p, vf x) { store(p, x); }
FASTATTN_INLINE void stream_bits(void* p, vh h) { __builtin_memcpy(p, &h, sizeof h); }
FASTATTN_INLINE void stream_fence() {}
#endif
FASTATTN_INLINE void stream(bf16* p, vf x) { stream_bits(p, narrow_bf16(x)); }
FASTATTN_INLINE void stream(f16* p, vf x) { stream_bits(p, narrow_f16(x)); }

template <class T>
FASTATTN_INLINE bool streamable(const T* p, int64_t row_elements) {
  return reinterpret_cast<uintptr_t>(p) % (VL * sizeof(T)) == 0 && row_elements % VL == 0;
}

template <class T>
FASTATTN_INLINE const T* row_of(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.ndim - 1; d > 0; --d) {
    offset += row % rows.shape[d] * rows.stride[d];
    row /= rows.shape[d];
  }
  return static_cast<const T*>(rows.data) + offset + row * rows.stride[0];
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
