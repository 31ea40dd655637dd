// The 16-bit types, and names of integers as the kernels have them.
#pragma once

namespace emulator {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

inline float float_of(u32 bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline u32 bits_of(float x) {
  u32 bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bf16(u32 bits) { return float_of(bits << 16); }

// cvt.rn.bf16.f32: to nearest even, NaN becomes 0x7fff.
inline u32 to_bf16(float x) {
  if (x != x) return 0x7fff;
  const u32 bits = bits_of(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from_f16(u32 bits) {
  const u32 sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

// cvt.rn.f16.f32: to nearest even, beyond 65504 to infinity, NaN becomes 0x7fff.
inline u32 to_f16(float x) {
  if (x != x) return 0x7fff;
  const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  // Below the normal numbers the float adder rounds at the right place.
  if (magnitude < 0x38800000u) return sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

}  // namespace emulator
