// Rows of a tensor in packs, the elements that a thread moves with one step: as many as make 16 bytes (or a multiple), or
// a number that does not, which then travel one by one.
#pragma once
#include <ptx/convert.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/memory.cuh>

template <class T, int kWidth>
constexpr bool kBy16 = kWidth * sizeof(T) % 16 == 0;

template <class T, int kWidth, bool kWide = kBy16<T, kWidth>>
struct Pack;
template <class T, int kWidth>
struct Pack<T, kWidth, true> {
  u32 words[kWidth * sizeof(T) / 4];
};
template <class T, int kWidth>
struct Pack<T, kWidth, false> {
  T elements[kWidth];
};

// kStreamed: read once, takes no room in L1.
template <class T, int kWidth, bool kStreamed = false>
__forceinline__ Pack<T, kWidth> load_pack(const T* p) {
  Pack<T, kWidth> x;
  if constexpr (kBy16<T, kWidth>) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kWidth * sizeof(T) / 16); ++i) {
      const uint4 four = kStreamed ? load_16_streamed(p + i * (16 / sizeof(T))) : load_16(p + i * (16 / sizeof(T)));
      x.words[4 * i] = four.x;
      x.words[4 * i + 1] = four.y;
      x.words[4 * i + 2] = four.z;
      x.words[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x.elements[i] = p[i];
  }
  return x;
}

template <class T, int kWidth>
__forceinline__ void store_pack(T* p, const Pack<T, kWidth>& x) {
  if constexpr (kBy16<T, kWidth>) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kWidth * sizeof(T) / 16); ++i)
      store_16_streamed(p + i * (16 / sizeof(T)),
                        make_uint4(x.words[4 * i], x.words[4 * i + 1], x.words[4 * i + 2], x.words[4 * i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) p[i] = x.elements[i];
  }
}

// The same in shared memory, `p` at a multiple of 16 bytes where packs are; kApart: bytes from one 16 of a pack to the next.
template <class T, int kWidth, int kApart = 16>
__forceinline__ Pack<T, kWidth> load_shared_pack(const void* p) {
  Pack<T, kWidth> x;
  if constexpr (kBy16<T, kWidth>) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kWidth * sizeof(T) / 16); ++i) {
      const uint4 four = load_shared_16(static_cast<const u8*>(p) + kApart * i);
      x.words[4 * i] = four.x;
      x.words[4 * i + 1] = four.y;
      x.words[4 * i + 2] = four.z;
      x.words[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x.elements[i] = static_cast<const T*>(p)[i];
  }
  return x;
}

template <int kApart = 16, class T, int kWidth>
__forceinline__ void store_shared_pack(void* p, const Pack<T, kWidth>& x) {
  if constexpr (kBy16<T, kWidth>) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(kWidth * sizeof(T) / 16); ++i)
      store_shared_16(static_cast<u8*>(p) + kApart * i,
                      make_uint4(x.words[4 * i], x.words[4 * i + 1], x.words[4 * i + 2], x.words[4 * i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) static_cast<T*>(p)[i] = x.elements[i];
  }
}

template <class T, int kWidth>
__forceinline__ void to_floats(float (&y)[kWidth], const Pack<T, kWidth>& x) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if constexpr (!kBy16<T, kWidth>) {
      y[i] = to_float(x.elements[i]);
    } else if constexpr (sizeof(T) == 4) {
      y[i] = __uint_as_float(x.words[i]);
    } else {
      const float2 two = unpack<T>(x.words[i / 2]);
      y[i] = i % 2 == 0 ? two.x : two.y;
    }
  }
}

template <class T, int kWidth>
__forceinline__ Pack<T, kWidth> from_floats(const float (&x)[kWidth]) {
  Pack<T, kWidth> y;
  if constexpr (!kBy16<T, kWidth>) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y.elements[i] = from_float<T>(x[i]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y.words[i] = __float_as_uint(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) y.words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  }
  return y;
}

// Every element the same.
template <class T, int kWidth>
__forceinline__ Pack<T, kWidth> splat(float x) {
  float y[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y[i] = x;
  return from_floats<T, kWidth>(y);
}

// Elements n … of a vector of `size` elements; outside of it, or when it is null, the same number everywhere.
template <class T, int kWidth>
__forceinline__ Pack<T, kWidth> load_pack_or(const void* vector, u32 n, u32 size, float otherwise) {
  return vector != nullptr && n < size ? load_pack<T, kWidth>(static_cast<const T*>(vector) + n) : splat<T, kWidth>(otherwise);
}

// Where a row starts, in elements: row (i, j, k) of a tensor [..., cols] at i · stride[0] + j · stride[1] + k · stride[2],
// size = how many j and k there are.
__forceinline__ i64 row_start(u32 row, const u32 (&size)[2], const i64 (&stride)[3]) {
  if (size[0] == 1 && size[1] == 1) return row * stride[0];
  const u32 k = row % size[1], ij = row / size[1];
  return ij / size[0] * stride[0] + ij % size[0] * stride[1] + k * stride[2];
}
