// What the memory-bound kernels share: packs of elements, stores around the cache, the address of a row.
//
// A pack is what one load brings in. For float32 and float16 that is VL elements, one vector. For bfloat16 it is 2 VL
// elements as two vectors, the even and the odd ones: a shift and a mask widen them, a shift and an or narrow them, several
// times cheaper than converting neighbours. float32 tables that meet bfloat16 rows are read in the same order.
#pragma once
#include "norm_params.h"
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kParallelElements = 32 << 10;

struct Whole {};  // in place of a count: all lanes

// ---- the two orders
struct Straight {
  typedef vf pack;
  static constexpr int64_t width = VL;
};
struct pair {
  vf even, odd;
};
struct Paired {
  typedef pair pack;
  static constexpr int64_t width = 2 * VL;
};
template <class T>
struct OrderOf {
  typedef Straight order;
};
template <>
struct OrderOf<bf16> {
  typedef Paired order;
};

FASTATTN_INLINE pair operator+(pair a, pair b) { return {a.even + b.even, a.odd + b.odd}; }
FASTATTN_INLINE pair operator-(pair a, pair b) { return {a.even - b.even, a.odd - b.odd}; }
FASTATTN_INLINE pair operator*(pair a, pair b) { return {a.even * b.even, a.odd * b.odd}; }
FASTATTN_INLINE pair operator+(pair a, vf b) { return {a.even + b, a.odd + b}; }
FASTATTN_INLINE pair operator-(pair a, vf b) { return {a.even - b, a.odd - b}; }
FASTATTN_INLINE pair operator*(pair a, vf b) { return {a.even * b, a.odd * b}; }
FASTATTN_INLINE pair& operator+=(pair& a, pair b) { return a = a + b; }
FASTATTN_INLINE float reduce_add(pair a) { return reduce_add(a.even + a.odd); }
FASTATTN_INLINE vf splat_pack(Straight, float s) { return splat(s); }
FASTATTN_INLINE pair splat_pack(Paired, float s) { return {splat(s), splat(s)}; }

// Keeps a product from being contracted with the sum it enters, where both must round alike to cancel.
#if defined(__x86_64__)
FASTATTN_INLINE vf apart(vf x) {
  asm("" : "+v"(x));
  return x;
}
#else
FASTATTN_INLINE vf apart(vf x) {
  asm("" : "+w"(x));
  return x;
}
#endif
FASTATTN_INLINE pair apart(pair x) { return {apart(x.even), apart(x.odd)}; }

// ---- rounding to the element type
#if VB == 64
FASTATTN_INLINE vi round_bf16_bits(vf x) {
  __m512i b = (__m512i)x;
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)),
                               _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1)));
  return (vi)_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
#else
FASTATTN_INLINE vi round_bf16_bits(vf x) {
  vi b = as_int(x), r = (vi)((vu)b + 0x7fffu + (((vu)b >> 16) & 1u)), nan = (vi)(x != x);
  return (nan & splat_i(0x7fc00000)) | (~nan & r);
}
#endif
FASTATTN_INLINE pair split(vi bits) { return {as_float(bits << 16), as_float(bits & splat_i((int32_t)0xffff0000))}; }
// A pair of values that are bfloat16 already.
FASTATTN_INLINE vi join_exact(pair x) { return (vi)((vu)as_int(x.even) >> 16) | as_int(x.odd); }
FASTATTN_INLINE pair rounded_pair(pair x) {
  vi upper = splat_i((int32_t)0xffff0000);
  return {as_float(round_bf16_bits(x.even) & upper), as_float(round_bf16_bits(x.odd) & upper)};
}
#if defined(__AVX512BF16__)
// One instruction for both vectors, a third of the operations. It takes magnitudes below 2^-126 for 0, so it serves
// results of arithmetic and not sums that must give back their argument.
FASTATTN_INLINE vi join(pair x) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  return (vi)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)x.odd, (__m512)x.even));
}
#else
FASTATTN_INLINE vi join(pair x) { return join_exact(rounded_pair(x)); }
#endif
// x rounded to the element type that the pointer names.
FASTATTN_INLINE vf rounded(vf x, const float*) { return x; }
FASTATTN_INLINE vf rounded(vf x, const f16*) { return widen_f16(narrow_f16(x)); }
FASTATTN_INLINE pair rounded(pair x, const bf16*) { return rounded_pair(x); }
// The same for results of arithmetic, which may lose magnitudes below 2^-126.
template <class T>
FASTATTN_INLINE vf rounded_result(vf x, const T* type) {
  return rounded(x, type);
}
FASTATTN_INLINE pair rounded_result(pair x, const bf16*) { return split(join(x)); }

// ---- fetch: a pack of elements, or its first n with 0 beyond
FASTATTN_INLINE vf evens(vf a, vf b) { return __builtin_shuffle(a, b, iota() * 2); }
FASTATTN_INLINE vf odds(vf a, vf b) { return __builtin_shuffle(a, b, iota() * 2 + 1); }

template <class T>
FASTATTN_INLINE vf fetch(Straight, const T* p, Whole) {
  return load(p);
}
template <class T>
FASTATTN_INLINE vf fetch(Straight, const T* p, int64_t n) {
  return load_n(p, n);
}
FASTATTN_INLINE pair fetch(Paired, const bf16* p, Whole) { return split(load_i(p)); }
FASTATTN_INLINE pair fetch(Paired, const bf16* p, int64_t n) {
  vi bits = splat_i(0);
  __builtin_memcpy(&bits, p, n * 2);
  return split(bits);
}
template <class T>  // float or f16
FASTATTN_INLINE pair fetch(Paired, const T* p, Whole) {
  vf a = load(p), b = load(p + VL);
  return {evens(a, b), odds(a, b)};
}
template <class T>
FASTATTN_INLINE pair fetch(Paired, const T* p, int64_t n) {
  vf a = load_n(p, n < VL ? n : VL), b = n > VL ? load_n(p + VL, n - VL) : zero();
  return {evens(a, b), odds(a, b)};
}

// ---- emit: the inverse. `stream` writes a whole pack past the cache where the instruction set can, to an aligned address.
FASTATTN_INLINE vf lower_half(pair x) { return __builtin_shuffle(x.even, x.odd, (iota() >> 1) + (iota() & 1) * VL); }
FASTATTN_INLINE vf upper_half(pair x) { return __builtin_shuffle(x.even, x.odd, (iota() >> 1) + (iota() & 1) * VL + VL / 2); }

template <class T>
FASTATTN_INLINE void emit(T* p, vf x, Whole) {
  store(p, x);
}
template <class T>
FASTATTN_INLINE void emit(T* p, vf x, int64_t n) {
  store_n(p, x, n);
}
FASTATTN_INLINE void emit(bf16* p, pair x, Whole) { store_i(p, join(x)); }
FASTATTN_INLINE void emit(bf16* p, pair x, int64_t n) {
  vi bits = join(x);
  __builtin_memcpy(p, &bits, n * 2);
}
template <class T>  // float or f16
FASTATTN_INLINE void emit(T* p, pair x, Whole) {
  store(p, lower_half(x));
  store(p + VL, upper_half(x));
}
template <class T>
FASTATTN_INLINE void emit(T* p, pair x, int64_t n) {
  store_n(p, lower_half(x), n < VL ? n : VL);
  if (n > VL) store_n(p + VL, upper_half(x), n - VL);
}

FASTATTN_INLINE void stream(float* p, vf x) { stream_bits(p, as_int(x)); }
FASTATTN_INLINE void stream(f16* p, vf x) { stream_bits(p, narrow_f16(x)); }
FASTATTN_INLINE void stream(bf16* p, pair x) { stream_bits(p, join(x)); }
template <class T>  // float or f16
FASTATTN_INLINE void stream(T* p, pair x) {
  stream(p, lower_half(x));
  stream(p + VL, upper_half(x));
}

// The same for values that are of type T already.
template <class T, class N>
FASTATTN_INLINE void emit_exact(T* p, vf x, N n) {
  emit(p, x, n);
}
FASTATTN_INLINE void emit_exact(bf16* p, pair x, Whole) { store_i(p, join_exact(x)); }
FASTATTN_INLINE void emit_exact(bf16* p, pair x, int64_t n) {
  vi bits = join_exact(x);
  __builtin_memcpy(p, &bits, n * 2);
}
template <class T>
FASTATTN_INLINE void stream_exact(T* p, vf x) {
  stream(p, x);
}
FASTATTN_INLINE void stream_exact(bf16* p, pair x) { stream_bits(p, join_exact(x)); }

// May every row of `row_elements` at p be streamed in whole packs?
template <class T>
FASTATTN_INLINE bool streamable(const T* p, int64_t row_elements) {
  constexpr int64_t width = OrderOf<T>::order::width;
  return reinterpret_cast<uintptr_t>(p) % (width * sizeof(T)) == 0 && row_elements % width == 0;
}

// ---- float32 scratch in pack order, padded to whole packs
FASTATTN_INLINE vf take(Straight, const float* p) { return load(p); }
FASTATTN_INLINE pair take(Paired, const float* p) { return {load(p), load(p + VL)}; }
FASTATTN_INLINE void keep(float* p, vf x) { store(p, x); }
FASTATTN_INLINE void keep(float* p, pair x) {
  store(p, x.even);
  store(p + VL, x.odd);
}

// Lanes past n become 0, so that they do not count in a sum.
FASTATTN_INLINE vf first(vf x, int64_t n) { return select((vi)(iota() < splat_i((int32_t)n)), x, zero()); }
FASTATTN_INLINE pair first(pair x, int64_t n) { return {first(x.even, (n + 1) / 2), first(x.odd, n / 2)}; }
template <class P>
FASTATTN_INLINE P first(P x, Whole) {
  return x;
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
