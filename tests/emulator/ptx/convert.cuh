// Stands in for csrc/cuda/ptx/convert.cuh.
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
  return {static_cast<u16>(emulator::to_bf16(x))};
}
template <>
__forceinline__ f16 from_float<f16>(float x) {
  return {static_cast<u16>(emulator::to_f16(x))};
}

__forceinline__ float to_float(float x) { return x; }
__forceinline__ float to_float(bf16 x) { return emulator::from_bf16(x.bits); }
__forceinline__ float to_float(f16 x) { return emulator::from_f16(x.bits); }

template <class T>
u32 pack(float low, float high);
template <>
__forceinline__ u32 pack<bf16>(float low, float high) {
  return emulator::to_bf16(high) << 16 | emulator::to_bf16(low);
}
template <>
__forceinline__ u32 pack<f16>(float low, float high) {
  return emulator::to_f16(high) << 16 | emulator::to_f16(low);
}

template <class T>
float2 unpack(u32 x);
template <>
__forceinline__ float2 unpack<bf16>(u32 x) {
  return make_float2(emulator::from_bf16(x & 0xffff), emulator::from_bf16(x >> 16));
}
template <>
__forceinline__ float2 unpack<f16>(u32 x) {
  return make_float2(emulator::from_f16(x & 0xffff), emulator::from_f16(x >> 16));
}
