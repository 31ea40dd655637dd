#pragma once
#include <attention_decode_params.h>

#include <tile/rows.cuh>

constexpr int kAppendThreads = 256;

// One pack as it is.
template <class T, int kWidth>
__forceinline__ void append_copy(T* y, const T* x) {
  store_pack(y, load_pack<T, kWidth>(x));
}

// kWidth pairs of a head: (a, b) -> (a cos - b sin, b cos + a sin), each product rounded as PyTorch rounds it, so that the
// cache holds the bits of the reference.
template <class T, class Table, int kWidth>
__forceinline__ void append_rotate(T* y, const T* x, const Table* cos, const Table* sin, int first, int half, bool interleaved,
                                   bool known) {
  float c[kWidth], s[kWidth], a[kWidth], b[kWidth];
  if (known) {
    to_floats(c, load_pack<Table, kWidth>(cos + first));
    to_floats(s, load_pack<Table, kWidth>(sin + first));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) c[i] = s[i] = __uint_as_float(0x7fc00000u);
  }
  if (interleaved) {
    float pairs[2 * kWidth];
    to_floats(pairs, load_pack<T, 2 * kWidth>(x + 2 * first));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] = pairs[2 * i], b[i] = pairs[2 * i + 1];
  } else {
    to_floats(a, load_pack<T, kWidth>(x + first));
    to_floats(b, load_pack<T, kWidth>(x + half + first));
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float turned = __fsub_rn(__fmul_rn(a[i], c[i]), __fmul_rn(b[i], s[i]));
    b[i] = __fadd_rn(__fmul_rn(b[i], c[i]), __fmul_rn(a[i], s[i]));
    a[i] = turned;
  }
  if (interleaved) {
    float pairs[2 * kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) pairs[2 * i] = a[i], pairs[2 * i + 1] = b[i];
    store_pack(y + 2 * first, from_floats<T>(pairs));
  } else {
    store_pack(y + first, from_floats<T>(a));
    store_pack(y + half + first, from_floats<T>(b));
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
