// The builtins of NVRTC for kernels that g++ compiles. It is included before the first line of every kernel.
#pragma once
#include "device.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __constant__ static const
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

// ---- where a thread is

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
constexpr int warpSize = 32;

// ---- vector types

#define EMULATOR_VECTORS(T, name, two, four)                                  \
  struct alignas(two) name##2 { T x, y; };                                    \
  struct name##3 { T x, y, z; };                                              \
  struct alignas(four) name##4 { T x, y, z, w; };                             \
  __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  __forceinline__ name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
#undef EMULATOR_VECTORS

// ---- barriers and collectives

__forceinline__ void __syncthreads() { emulator::syncthreads(); }
__forceinline__ int __syncthreads_count(int p) { return emulator::syncthreads_reduce(0, p); }
__forceinline__ int __syncthreads_and(int p) { return emulator::syncthreads_reduce(1, p); }
__forceinline__ int __syncthreads_or(int p) { return emulator::syncthreads_reduce(2, p); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { emulator::syncwarp(mask); }

// Order between threads comes from barriers and atomic operations alone here; a fence adds none that the checks know of.
__forceinline__ void __threadfence() {}
__forceinline__ void __threadfence_block() {}
__forceinline__ void __threadfence_system() {}

namespace emulator {
template <class T>
__forceinline__ T shuffle_value(unsigned mask, T value, u32 kind, int lane, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  u64 bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, kind, static_cast<u32>(lane), static_cast<u32>(width));
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulator

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::kShuffle, lane, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::kShuffleUp, static_cast<int>(delta), width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::kShuffleDown, static_cast<int>(delta), width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::kShuffleXor, lanes, width);
}

__forceinline__ unsigned __ballot_sync(unsigned mask, int p) { return static_cast<unsigned>(emulator::vote(mask, p != 0)); }
__forceinline__ int __any_sync(unsigned mask, int p) { return static_cast<unsigned>(emulator::vote(mask, p != 0)) != 0; }
__forceinline__ int __all_sync(unsigned mask, int p) {
  const unsigned long long votes = emulator::vote(mask, p != 0);
  return static_cast<unsigned>(votes) == static_cast<unsigned>(votes >> 32);
}
__forceinline__ unsigned __match_any_sync(unsigned mask, unsigned x) { return emulator::match_any(mask, x); }
__forceinline__ unsigned __activemask() { return emulator::active_lanes(); }

__forceinline__ int __reduce_add_sync(unsigned mask, int x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(mask, x, i);
  return x;
}
__forceinline__ int __reduce_max_sync(unsigned mask, int x) {
  for (int i = 16; i > 0; i /= 2) {
    const int y = __shfl_xor_sync(mask, x, i);
    x = y > x ? y : x;
  }
  return x;
}
__forceinline__ int __reduce_min_sync(unsigned mask, int x) {
  for (int i = 16; i > 0; i /= 2) {
    const int y = __shfl_xor_sync(mask, x, i);
    x = y < x ? y : x;
  }
  return x;
}

__forceinline__ void __nanosleep(unsigned) { emulator::sleep(); }
[[noreturn]] __forceinline__ void __trap() { emulator::trap(); }
__forceinline__ long long clock64() { return 0; }

// ---- atomic operations

__forceinline__ float atomicAdd(float* p, float x) { return emulator::atomic_f32(p, x); }
__forceinline__ int atomicAdd(int* p, int x) {
  return static_cast<int>(emulator::atomic_u32(p, emulator::kAdd, static_cast<unsigned>(x), 0));
}
__forceinline__ unsigned atomicAdd(unsigned* p, unsigned x) { return emulator::atomic_u32(p, emulator::kAdd, x, 0); }
__forceinline__ unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return emulator::atomic_u64(p, emulator::kAdd, x, 0);
}
#define EMULATOR_ATOMIC(name, op, signed_op)                                                                     \
  __forceinline__ unsigned name(unsigned* p, unsigned x) { return emulator::atomic_u32(p, emulator::op, x, 0); } \
  __forceinline__ int name(int* p, int x) {                                                                      \
    return static_cast<int>(emulator::atomic_u32(p, emulator::signed_op, static_cast<unsigned>(x), 0));          \
  }                                                                                                              \
  __forceinline__ unsigned long long name(unsigned long long* p, unsigned long long x) {                         \
    return emulator::atomic_u64(p, emulator::op, x, 0);                                                          \
  }
EMULATOR_ATOMIC(atomicMin, kMin, kMinSigned)
EMULATOR_ATOMIC(atomicMax, kMax, kMaxSigned)
EMULATOR_ATOMIC(atomicExch, kExchange, kExchange)
EMULATOR_ATOMIC(atomicAnd, kAnd, kAnd)
EMULATOR_ATOMIC(atomicOr, kOr, kOr)
EMULATOR_ATOMIC(atomicXor, kXor, kXor)
#undef EMULATOR_ATOMIC
__forceinline__ unsigned atomicCAS(unsigned* p, unsigned compare, unsigned x) {
  return emulator::atomic_u32(p, emulator::kCompare, x, compare);
}
__forceinline__ int atomicCAS(int* p, int compare, int x) {
  return static_cast<int>(emulator::atomic_u32(p, emulator::kCompare, static_cast<unsigned>(x), static_cast<unsigned>(compare)));
}
__forceinline__ unsigned long long atomicCAS(unsigned long long* p, unsigned long long compare, unsigned long long x) {
  return emulator::atomic_u64(p, emulator::kCompare, x, compare);
}

// ---- loads and stores with a cache hint

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ void __stcs(T* p, T x) {
  *p = x;
}
template <class T>
__forceinline__ void __stcg(T* p, T x) {
  *p = x;
}

// ---- bits

__forceinline__ unsigned __float_as_uint(float x) { return emulator::bits_of(x); }
__forceinline__ int __float_as_int(float x) { return static_cast<int>(emulator::bits_of(x)); }
__forceinline__ float __uint_as_float(unsigned x) { return emulator::float_of(x); }
__forceinline__ float __int_as_float(int x) { return emulator::float_of(static_cast<unsigned>(x)); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
__forceinline__ int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
__forceinline__ unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (s >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}

// ---- numbers

#define EMULATOR_MATH(name)                                                 \
  __forceinline__ float name##f(float x) { return __builtin_##name##f(x); } \
  __forceinline__ double name(double x) { return __builtin_##name(x); }     \
  __forceinline__ float name(float x) { return __builtin_##name##f(x); }
EMULATOR_MATH(sqrt)
EMULATOR_MATH(exp)
EMULATOR_MATH(exp2)
EMULATOR_MATH(log)
EMULATOR_MATH(log2)
EMULATOR_MATH(log1p)
EMULATOR_MATH(expm1)
EMULATOR_MATH(tanh)
EMULATOR_MATH(erf)
EMULATOR_MATH(sin)
EMULATOR_MATH(cos)
EMULATOR_MATH(fabs)
EMULATOR_MATH(floor)
EMULATOR_MATH(ceil)
EMULATOR_MATH(rint)
EMULATOR_MATH(round)
EMULATOR_MATH(trunc)
#undef EMULATOR_MATH
__forceinline__ float powf(float x, float y) { return __builtin_powf(x, y); }
__forceinline__ float fmodf(float x, float y) { return __builtin_fmodf(x, y); }
__forceinline__ float ldexpf(float x, int e) { return __builtin_ldexpf(x, e); }
__forceinline__ float copysignf(float x, float y) { return __builtin_copysignf(x, y); }
__forceinline__ float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
__forceinline__ float rsqrtf(float x) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(x))); }
// As on the GPU: the other one when one is NaN.
__forceinline__ float fmaxf(float x, float y) { return x != x ? y : y > x ? y : x; }
__forceinline__ float fminf(float x, float y) { return x != x ? y : y < x ? y : x; }
__forceinline__ bool isnan(float x) { return x != x; }
__forceinline__ bool isinf(float x) { return __builtin_isinf(x); }
__forceinline__ bool isfinite(float x) { return __builtin_isfinite(x); }

__forceinline__ float __fmul_rn(float x, float y) {
  volatile float z = x * y;  // not to be fused with an addition
  return z;
}
__forceinline__ float __fadd_rn(float x, float y) { return x + y; }
__forceinline__ float __fsub_rn(float x, float y) { return x - y; }
__forceinline__ float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
__forceinline__ float __fdiv_rn(float x, float y) { return x / y; }
__forceinline__ float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ float __expf(float x) { return __builtin_expf(x); }
__forceinline__ float __exp2f(float x) { return __builtin_exp2f(x); }
__forceinline__ float __logf(float x) { return __builtin_logf(x); }
__forceinline__ float __log2f(float x) { return __builtin_log2f(x); }
__forceinline__ float __tanhf(float x) { return __builtin_tanhf(x); }
__forceinline__ int __float2int_rn(float x) { return static_cast<int>(__builtin_rintf(x)); }
__forceinline__ int __float2int_rz(float x) { return static_cast<int>(x); }
__forceinline__ int __float2int_rd(float x) { return static_cast<int>(__builtin_floorf(x)); }
__forceinline__ int __float2int_ru(float x) { return static_cast<int>(__builtin_ceilf(x)); }
__forceinline__ float __int2float_rn(int x) { return static_cast<float>(x); }
__forceinline__ float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

#define EMULATOR_ORDER(T)                                   \
  __forceinline__ T min(T x, T y) { return y < x ? y : x; } \
  __forceinline__ T max(T x, T y) { return x < y ? y : x; }
EMULATOR_ORDER(int)
EMULATOR_ORDER(unsigned)
EMULATOR_ORDER(long)
EMULATOR_ORDER(unsigned long)
EMULATOR_ORDER(long long)
EMULATOR_ORDER(unsigned long long)
#undef EMULATOR_ORDER
__forceinline__ float min(float x, float y) { return fminf(x, y); }
__forceinline__ float max(float x, float y) { return fmaxf(x, y); }
__forceinline__ int abs(int x) { return x < 0 ? -x : x; }
__forceinline__ long long llabs(long long x) { return x < 0 ? -x : x; }

extern "C" int printf(const char* pattern, ...);
