// Stands in for csrc/cuda/ptx/mma.cuh.
#pragma once
#include <ptx/core.cuh>

template <class T>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
__forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const auto x = emulator::mma_bf16(a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]);
  d[0] = x.x, d[1] = x.y, d[2] = x.z, d[3] = x.w;
}
template <>
__forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const auto x = emulator::mma_f16(a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]);
  d[0] = x.x, d[1] = x.y, d[2] = x.z, d[3] = x.w;
}
