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

template <class T>
FASTATTN_INLINE vf round_to(vf x) {
  T h[VL];
  store(h, x);
  return load(h);
}
template <>
FASTATTN_INLINE_MEMBER vf round_to<float>(vf x) { return x; }
template <>
FASTATTN_INLINE_MEMBER vf round_to<bf16>(vf x) { return widen_bf16(narrow_bf16(x)); }
template <>
FASTATTN_INLINE_MEMBER vf round_to<f16>(vf x) { return widen_f16(narrow_f16(x)); }

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
