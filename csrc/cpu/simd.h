// Vectors as wide as the instruction set this file is compiled for, on compiler vector extensions.
// vf, vi: VL floats / int32. Intrinsics stand only where an instruction has no spelling (max with NaN order, scalef,
// bf16 and fp16 conversions). Included once per instruction set, inside its own namespace: no symbol is shared, so the
// linker can never give one instruction set's code to another.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VB 64
#elif defined(__AVX2__)
#define VB 32
#else
#define VB 16
#endif

#define FASTATTN_INLINE static inline __attribute__((always_inline))

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int VL = VB / 4;
typedef float vf __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef float vf_u __attribute__((vector_size(VB), aligned(4), may_alias));
typedef int32_t vi_u __attribute__((vector_size(VB), aligned(2), may_alias));  // pairs of bf16 are 2-byte aligned
typedef uint16_t vh __attribute__((vector_size(VB / 2)));
typedef uint16_t vh_u __attribute__((vector_size(VB / 2), aligned(2), may_alias));

FASTATTN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
FASTATTN_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
FASTATTN_INLINE vi load_i(const void* p) { return *static_cast<const vi_u*>(p); }
FASTATTN_INLINE void store_i(void* p, vi x) { *static_cast<vi_u*>(p) = x; }
FASTATTN_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
FASTATTN_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }

// A constructor, not a loop over elements: GCC turns the loop into VL scalar inserts.
#if VB == 64
FASTATTN_INLINE vf splat(float s) { return (vf){s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s}; }
FASTATTN_INLINE vi splat_i(int32_t s) { return (vi){s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s}; }
FASTATTN_INLINE vi iota() { return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
#elif VB == 32
FASTATTN_INLINE vf splat(float s) { return (vf){s, s, s, s, s, s, s, s}; }
FASTATTN_INLINE vi splat_i(int32_t s) { return (vi){s, s, s, s, s, s, s, s}; }
FASTATTN_INLINE vi iota() { return (vi){0, 1, 2, 3, 4, 5, 6, 7}; }
#else
FASTATTN_INLINE vf splat(float s) { return (vf){s, s, s, s}; }
FASTATTN_INLINE vi splat_i(int32_t s) { return (vi){s, s, s, s}; }
FASTATTN_INLINE vi iota() { return (vi){0, 1, 2, 3}; }
#endif

FASTATTN_INLINE vf zero() { return splat(0.0f); }
FASTATTN_INLINE vf select(vi condition, vf yes, vf no) { return as_float((condition & as_int(yes)) | (~condition & as_int(no))); }
FASTATTN_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted where the instruction set has FMA

// NaN in b wins: the instruction returns its second operand when either is NaN.
#if VB == 64
FASTATTN_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FASTATTN_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
FASTATTN_INLINE bool any(vi m) { return _mm512_movepi32_mask((__m512i)m) != 0; }
#elif VB == 32
FASTATTN_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FASTATTN_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
FASTATTN_INLINE bool any(vi m) { return _mm256_movemask_ps((__m256)m) != 0; }
#elif defined(__x86_64__)
FASTATTN_INLINE vf max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
FASTATTN_INLINE vf min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
FASTATTN_INLINE bool any(vi m) { return _mm_movemask_ps((__m128)m) != 0; }
#else
FASTATTN_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
FASTATTN_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
FASTATTN_INLINE bool any(vi m) {
  int32_t r = 0;
  for (int i = 0; i < VL; ++i) r |= m[i];
  return r != 0;
}
#endif

FASTATTN_INLINE float reduce_add(vf x) {
#if VB == 64
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < VL; ++i) s += x[i];
  return s;
#endif
}

// Loads and stores of n <= VL elements; lanes past n read as 0 and are not written.
FASTATTN_INLINE vf load_n(const float* p, int64_t n) {
#if VB == 64
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  vf x = zero();
  __builtin_memcpy(&x, p, n * sizeof(float));
  return x;
#endif
}
FASTATTN_INLINE void store_n(float* p, vf x, int64_t n) {
#if VB == 64
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
  __builtin_memcpy(p, &x, n * sizeof(float));
#endif
}

// ---- 16-bit floats. A bf16 is the upper half of a float; rounding is to nearest even, NaN stays NaN.
typedef struct {
  uint16_t bits;
} bf16;
typedef struct {
  uint16_t bits;
} f16;

FASTATTN_INLINE vf widen_bf16(vh h) {
#if VB == 64
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
  return as_float(__builtin_convertvector(h, vi) << 16);
#endif
}
// The bf16 is the upper half of each lane; the lower half is noise.
FASTATTN_INLINE vi round_bf16(vf x) {
  // Integer arithmetic on every instruction set: the conversion instruction would flush denormals.
  vi b = as_int(x);
  vi rounded = (vi)((vu)b + 0x7fffu + (((vu)b >> 16) & 1u));
  vi nan = (vi)(x != x);
  return (nan & splat_i(0x7fc00000)) | (~nan & rounded);
}
FASTATTN_INLINE vh narrow_bf16(vf x) { return __builtin_convertvector((vu)round_bf16(x) >> 16, vh); }
#if VB == 64
FASTATTN_INLINE vf widen_f16(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
FASTATTN_INLINE vh narrow_f16(vf x) { return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif VB == 32
FASTATTN_INLINE vf widen_f16(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
FASTATTN_INLINE vh narrow_f16(vf x) { return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
FASTATTN_INLINE vf widen_f16(vh h) {
  // Shift exponent and mantissa into place and rescale by 2^112, which also normalises fp16's denormals.
  vi w = __builtin_convertvector(h, vi);
  vi sign = (w & 0x8000) << 16, magnitude = (w & 0x7fff) << 13;
  vf scaled = as_float(magnitude) * splat(0x1p112f);
  vi special = (vi)(magnitude >= splat_i(0x7c00 << 13));
  vi value = (special & (magnitude | splat_i(0x7f800000))) | (~special & as_int(scaled));
  return as_float(value | sign);
}
FASTATTN_INLINE vh narrow_f16(vf x) {
  vi b = as_int(x);
  vi sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
  // Normal numbers: round the mantissa to 10 bits, nearest even. Small ones: let an addition align and round them.
  vi normal = (vi)((vu)a + 0xfffu + (((vu)a >> 13) & 1u) - (112u << 23)) >> 13;
  vi small_value = as_int(as_float(a) + splat(0.5f)) - splat_i(0x3f000000);
  vi is_small = (vi)(a < splat_i(113 << 23)), is_nan = (vi)(a > splat_i(0x7f800000)), is_inf = (vi)(normal >= splat_i(0x7c00));
  vi out = (is_small & small_value) | (~is_small & normal);
  out = (is_inf & ~is_small & splat_i(0x7c00)) | (~(is_inf & ~is_small) & out);
  out = (is_nan & splat_i(0x7e00)) | (~is_nan & out);
  return __builtin_convertvector((vu)(out | sign), vh);
}
#endif

// One name for the three element types: load/store VL elements as floats.
FASTATTN_INLINE vf load(const bf16* p) { return widen_bf16(*reinterpret_cast<const vh_u*>(p)); }
FASTATTN_INLINE vf load(const f16* p) { return widen_f16(*reinterpret_cast<const vh_u*>(p)); }
FASTATTN_INLINE void store(bf16* p, vf x) { *reinterpret_cast<vh_u*>(p) = narrow_bf16(x); }
FASTATTN_INLINE void store(f16* p, vf x) { *reinterpret_cast<vh_u*>(p) = narrow_f16(x); }
template <class T>
FASTATTN_INLINE vf load_n(const T* p, int64_t n) {
  vh h = {};
  __builtin_memcpy(&h, p, n * 2);
  return load(reinterpret_cast<const T*>(&h));
}
template <class T>
FASTATTN_INLINE void store_n(T* p, vf x, int64_t n) {
  T h[VL];
  store(h, x);
  __builtin_memcpy(p, h, n * 2);
}
FASTATTN_INLINE float to_float(float x) { return x; }
FASTATTN_INLINE float to_float(bf16 x) {
  uint32_t b = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &b, 4);
  return f;
}
FASTATTN_INLINE float to_float(f16 x) {
  f16 h[VL] = {x};
  return load(h)[0];
}
template <class T>
FASTATTN_INLINE T from_float(float x) {
  T h[VL];
  store(h, splat(x));
  return h[0];
}

// ---- Stores around the cache.
// Above this many bytes read and written, output lines would be evicted before anybody reads them: write around the cache.
constexpr int64_t kNonTemporalBytes = 24 << 20;
#if defined(__x86_64__)
#if VB == 64
FASTATTN_INLINE void stream_bits(void* p, vi x) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x); }
FASTATTN_INLINE void stream_bits(void* p, vh x) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x); }
#elif VB == 32
FASTATTN_INLINE void stream_bits(void* p, vi x) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x); }
FASTATTN_INLINE void stream_bits(void* p, vh x) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x); }
#else
FASTATTN_INLINE void stream_bits(void* p, vi x) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x); }
FASTATTN_INLINE void stream_bits(void* p, vh x) { _mm_stream_si64(static_cast<long long*>(p), (long long)x); }
#endif
FASTATTN_INLINE void stream_fence() { _mm_sfence(); }
FASTATTN_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
#else
template <class V>
FASTATTN_INLINE void stream_bits(void* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}
FASTATTN_INLINE void stream_fence() {}
FASTATTN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
#endif

// ---- 2^x. Own minimax fits of 2^f on [-1/2, 1/2] with p(0) = 1 (Lawson iteration): relative error 2.0e-9 (degree 6),
// 1.0e-4 (degree 3, for results that are rounded to bf16, 4e-3). Exact 0 for -inf and below 2^-126; NaN stays NaN.
template <int Degree>
FASTATTN_INLINE vf exp2_fraction(vf f) {
  if constexpr (Degree == 3) {
    vf p = fma(splat(5.500893112e-02f), f, splat(2.422109593e-01f));
    p = fma(p, f, splat(6.932829271e-01f));
    return fma(p, f, splat(1.0f));
  } else {
    vf p = fma(splat(1.535336194e-04f), f, splat(1.339887440e-03f));
    p = fma(p, f, splat(9.618437357e-03f));
    p = fma(p, f, splat(5.550332471e-02f));
    p = fma(p, f, splat(2.402264791e-01f));
    p = fma(p, f, splat(6.931472029e-01f));
    return fma(p, f, splat(1.0f));
  }
}
template <int Degree>
FASTATTN_INLINE vf exp2(vf x) {
#if VB == 64
  __m512 f = _mm512_reduce_ps((__m512)x, 0);  // x - round(x); 0 for infinities
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction<Degree>((vf)f), (__m512)x - f);
#else
  vf clamped = max(splat(-127.0f), min(splat(128.0f), x));
  vf rounded = (clamped + splat(12582912.0f)) - splat(12582912.0f);
  vf p = exp2_fraction<Degree>(clamped - rounded);
  vi exponent = __builtin_convertvector(rounded, vi);
  // Two factors: 2^128 alone would not fit an exponent field.
  vi half = exponent >> 1;
  vf y = p * as_float((half + 127) << 23) * as_float((exponent - half + 127) << 23);
  y = select((vi)(x < splat(-126.0f)), zero(), y);
  return select((vi)(x != x), x, y);
#endif
}

// to = m ln 2 + ln l of n (a multiple of VL) lanes, in doubles: a float's rounding of m ln 2 would scale probabilities later.
// l is positive, inf or NaN. l = 2^e z with z in [sqrt(1/2), sqrt(2)), and ln z = 2 atanh((z - 1) / (z + 1)) to 2e-11.
static inline void log_sums(const float* m, const float* l, float* to, int n) {
  typedef float half __attribute__((vector_size(VB / 2), aligned(4), may_alias));
  typedef double vd __attribute__((vector_size(VB)));
  typedef int64_t vl __attribute__((vector_size(VB)));
  for (int i = 0; i < n; i += VL / 2) {
    vd x = __builtin_convertvector(*reinterpret_cast<const half*>(l + i), vd);
    vl bits = (vl)x, exponent = (bits - 0x3fe6a09e667f3bcd) & (int64_t)0xfff0000000000000;
    vd z = (vd)(bits - exponent), e = (vd)((exponent >> 52) + 0x4338000000000000) - 0x1.8p52;
    vd s = (z - 1.0) / (z + 1.0), t = s * s;
    vd series = ((((t * (2.0 / 11) + 2.0 / 9) * t + 2.0 / 7) * t + 2.0 / 5) * t + 2.0 / 3) * t + 2.0;
    vd y = (__builtin_convertvector(*reinterpret_cast<const half*>(m + i), vd) + e) * 0.6931471805599453 + series * s;
    vl plain = (vl)(x < __builtin_inf());
    y = (vd)((plain & (vl)y) | (~plain & (vl)x));
    *reinterpret_cast<half*>(to + i) = __builtin_convertvector(y, half);
  }
}

#if VB == 64
// The compiler would keep a constant in memory and load all 64 bytes of it at every use; this pins it to a register.
FASTATTN_INLINE vf in_register(vf x) {
  asm("" : "+v"(x));
  return x;
}
#endif

// exp2 for loops beside a product: its constants stay in registers, and a table of 2^(i / 16) or 2^(i / 32) leaves so small a
// remainder that degree 3 becomes one multiply-add (relative error 2.4e-4) and degree 6 three (1.7e-7, its own roundings
// included). Only those compete with the product: the other steps run on pipes that it leaves idle.
template <int Degree>
struct Exp2 {
#if VB == 64
  vf low, high, shift;  // high: the second half of 32nds; of 16ths low times ln 2
  FASTATTN_INLINE Exp2 make() {
    // Adding 1.5 * 2^(23 - bits of the index) leaves the index in the lowest bits.
    if constexpr (Degree == 3) {
      vf t = (vf){1.0f,         1.044273782f, 1.090507733f, 1.138788635f, 1.189207115f, 1.241857812f, 1.296839555f, 1.354255547f,
                  1.414213562f, 1.476826146f, 1.542210825f, 1.610490332f, 1.681792831f, 1.756252160f, 1.834008086f, 1.915206561f};
      return {in_register(t), in_register(t * splat(0.693147181f)), in_register(splat(0x1.8p19f))};
    } else {
      vf first = (vf){1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
                      1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f};
      vf second = (vf){1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
                       1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
      return {in_register(first), in_register(second), in_register(splat(0x1.8p18f))};
    }
  }
  inline __attribute__((always_inline)) vf operator()(vf x) const {
    constexpr int kBits = Degree == 3 ? 4 : 5;
    __m512 rest = _mm512_reduce_ps((__m512)x, kBits << 4);  // x - round(2^kBits x) / 2^kBits; 0 for infinities
    __m512 steps = (__m512)x - rest;
    __m512i index = (__m512i)(steps + (__m512)shift);
    __m512 y;
    if constexpr (Degree == 3) {
      y = _mm512_fmadd_ps(_mm512_permutexvar_ps(index, (__m512)high), rest, _mm512_permutexvar_ps(index, (__m512)low));
    } else {
      __m512 t = _mm512_permutex2var_ps((__m512)low, index, (__m512)high);
      __m512 slope = _mm512_fmadd_ps(_mm512_set1_ps(2.402264974e-01f), rest, _mm512_set1_ps(6.931573298e-01f));
      y = _mm512_fmadd_ps(t * rest, slope, t);
    }
    return (vf)_mm512_scalef_ps(y, steps);  // by 2^floor
  }
#else
  FASTATTN_INLINE Exp2 make() { return {}; }
  inline __attribute__((always_inline)) vf operator()(vf x) const { return exp2<Degree>(x); }
#endif
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
