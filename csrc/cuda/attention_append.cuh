#pragma once
#include <attention_decode_params.h>

#include <ptx/convert.cuh>
#include <ptx/memory.cuh>

constexpr int kAppendThreads = 256;

// kWidth elements from p as floats, by accesses of 16 bytes unless kWidth is 1.
template <class T, int kWidth>
__forceinline__ void append_load(float (&x)[kWidth], const T* p) {
  if constexpr (kWidth == 1) {
    x[0] = to_float(p[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const uint4 bits = load_16(p + i);
      x[i] = __uint_as_float(bits.x), x[i + 1] = __uint_as_float(bits.y);
      x[i + 2] = __uint_as_float(bits.z), x[i + 3] = __uint_as_float(bits.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 8) {
      const uint4 bits = load_16(p + i);
      const u32 pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 both = unpack<T>(pairs[j]);
        x[i + 2 * j] = both.x, x[i + 2 * j + 1] = both.y;
      }
    }
  }
}
template <class T, int kWidth>
__forceinline__ void append_store(T* p, const float (&x)[kWidth]) {
  if constexpr (kWidth == 1) {
    p[0] = from_float<T>(x[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 8) {
      store_16(p + i, make_uint4(pack<T>(x[i], x[i + 1]), pack<T>(x[i + 2], x[i + 3]), pack<T>(x[i + 4], x[i + 5]),
                                 pack<T>(x[i + 6], x[i + 7])));
    }
  }
}
template <class T, int kWidth>
__forceinline__ void append_copy(T* y, const T* x) {
  if constexpr (kWidth == 1) {
    y[0] = x[0];
  } else {
    store_16(y, load_16(x));
  }
}

// kWidth pairs of a head: (a, b) -> (a cos - b sin, b cos + a sin), each product rounded as PyTorch rounds it, so that the
// cache holds the bits of the reference.
template <class T, class Table, int kWidth>
__forceinline__ void append_rotate(T* y, const T* x, const Table* cos, const Table* sin, int first, int half, bool interleaved,
                                   bool known) {
  float c[kWidth], s[kWidth], a[kWidth], b[kWidth];
  if (known) {
    append_load<Table, kWidth>(c, cos + first);
    append_load<Table, kWidth>(s, sin + first);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] = s[i] = __uint_as_float(0x7fc00000u);
  }
  if (interleaved) {
    float pairs[2 * kWidth];
    if constexpr (kWidth == 1) {
      pairs[0] = to_float(x[2 * first]), pairs[1] = to_float(x[2 * first + 1]);
    } else {
      append_load<T, 2 * kWidth>(pairs, x + 2 * first);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] = pairs[2 * i], b[i] = pairs[2 * i + 1];
  } else {
    append_load<T, kWidth>(a, x + first);
    append_load<T, kWidth>(b, x + half + first);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float turned = __fsub_rn(__fmul_rn(a[i], c[i]), __fmul_rn(b[i], s[i]));
    b[i] = __fadd_rn(__fmul_rn(b[i], c[i]), __fmul_rn(a[i], s[i]));
    a[i] = turned;
  }
  if (interleaved) {
    if constexpr (kWidth == 1) {
      y[2 * first] = from_float<T>(a[0]), y[2 * first + 1] = from_float<T>(b[0]);
    } else {
      float pairs[2 * kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) pairs[2 * i] = a[i], pairs[2 * i + 1] = b[i];
      append_store<T, 2 * kWidth>(y + 2 * first, pairs);
    }
  } else {
    append_store<T, kWidth>(y + first, a);
    append_store<T, kWidth>(y + half + first, b);
  }
}

// One unit of one new position per thread: kWidth pairs of a head of k or q to be rotated, or kWidth elements of a head of
// k, q or v to be copied. k and v go to slots cache_seqlens + i of the caches, q to q_out.
// Grid: (cdiv(rows, rows_per_block), cdiv(rows_per_block · units, 256)), 256 threads. Registers only.
// Bound by memory: 2 · sizeof(T) bytes per element, every one read and written once; a row of the tables is read again for
// each head, from L1. kWidth is 8 where every row starts at a multiple of 16 bytes, else 1.
// Su et al., RoFormer, arXiv:2104.09864; Kwon et al., PagedAttention, arXiv:2309.06180.
template <class T, class Table, int kWidth>
__global__ void __launch_bounds__(kAppendThreads) attention_append_kernel(const __grid_constant__ AttentionAppendParams p) {
  const u32 flat = blockIdx.y * kAppendThreads + threadIdx.x;
  const u32 local = flat / static_cast<u32>(p.units);
  const int row = static_cast<int>(blockIdx.x * p.rows_per_block + local);
  if (local >= static_cast<u32>(p.rows_per_block) || row >= p.rows) return;
  int unit = static_cast<int>(flat - local * p.units);
  const i64 b = row / p.seqlen_new;
  const int i = row % p.seqlen_new;
  const int n = p.cache_seqlens[b] + i;
  const bool fits = n >= 0 && n < p.seqlen_k;

  const bool of_q = unit >= p.nheads_k * (p.units_k + p.units_v);
  const bool of_v = !of_q && unit >= p.nheads_k * p.units_k;
  if (!of_q && !fits) return;
  i64 block = b, slot = n;
  if (!of_q && p.block_table != nullptr) {
    block = p.block_table[b * p.block_table_stride + n / p.block_size];
    slot = n % p.block_size;
  }
  if (of_v) {
    unit -= p.nheads_k * p.units_k;
    const i64 h = unit / p.units_v, d = unit % p.units_v * kWidth;
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + i * p.v_stride[1] + h * p.v_stride[2];
    T* place = static_cast<T*>(p.v_cache) + block * p.v_cache_stride[0] + slot * p.v_cache_stride[1] + h * p.v_cache_stride[2];
    append_copy<T, kWidth>(place + d, v + d);
    return;
  }
  if (of_q) unit -= p.nheads_k * (p.units_k + p.units_v);
  const i64 h = unit / p.units_k;
  const int piece = unit % p.units_k;
  const T* x;
  T* y;
  if (of_q) {
    x = static_cast<const T*>(p.q) + b * p.q_stride[0] + i * p.q_stride[1] + h * p.q_stride[2];
    y = static_cast<T*>(p.q_out) + (static_cast<i64>(row) * p.nheads + h) * p.headdim;
  } else {
    x = static_cast<const T*>(p.k) + b * p.k_stride[0] + i * p.k_stride[1] + h * p.k_stride[2];
    y = static_cast<T*>(p.k_cache) + block * p.k_cache_stride[0] + slot * p.k_cache_stride[1] + h * p.k_cache_stride[2];
  }
  const int turned = p.half / kWidth;
  if (piece < turned) {
    const bool known = n >= 0 && n < p.table_rows;
    append_rotate<T, Table, kWidth>(y, x, static_cast<const Table*>(p.cos) + n * p.cos_stride,
                                    static_cast<const Table*>(p.sin) + n * p.sin_stride, piece * kWidth, p.half, p.interleaved != 0,
                                    known);
  } else {
    const int d = 2 * p.half + (piece - turned) * kWidth;
    append_copy<T, kWidth>(y + d, x + d);
  }
}
