// Between float and the 16-bit types, rounding to nearest even. Pairs travel in one register, the first one low.
#pragma once
#include <ptx/core.cuh>

template <class T>
T from_float(float x);
template <>
__forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__forceinline__ bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__forceinline__ f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

__forceinline__ float to_float(float x) { return x; }
__forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
__forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two floats -> one register of two T.
template <class T>
u32 pack(float low, float high);
template <>
__forceinline__ u32 pack<bf16>(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__forceinline__ u32 pack<f16>(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// One register of two T -> two floats.
template <class T>
float2 unpack(u32 x);
template <>
__forceinline__ float2 unpack<bf16>(u32 x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <>
__forceinline__ float2 unpack<f16>(u32 x) {
  float2 y;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}" : "=f"(y.x), "=f"(y.y) : "r"(x));
  return y;
}
