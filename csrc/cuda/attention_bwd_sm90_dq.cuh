// dq = scale · dq_sums in the type of q: BLOCK_M queries of one head, what attention_bwd_sm90.cuh left as it came from the
// products. Grid: blocks of queries · nheads · batch. Shared memory: a slab [64, 64] of T, 8 KB, where pieces of rows meet. Bound
// by memory: 6 bytes per element.
#pragma once
#include <attention_bwd_sm90_params.h>

#include <ptx/convert.cuh>
#include <ptx/core.cuh>
#include <ptx/memory.cuh>
#include <tile/bwd_sm90.cuh>
#include <tile/copy.cuh>
#include <tile/sequence.cuh>
#include <tile/swizzle.cuh>

template <class T, int HEADDIM, int BLOCK_M>
__global__ void __launch_bounds__(128) attention_bwd_sm90_dq_kernel(const __grid_constant__ AttentionBwdSm90Params p) {
  using Tile = DqTile<BLOCK_M, HEADDIM>;
  using Slab = TileLayout<64, 64>;
  const int blocks = (p.seqlen_q + BLOCK_M - 1) / BLOCK_M, id = blockIdx.x;
  const int head = id / blocks, m0 = id % blocks * BLOCK_M, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sequence s = sequence_of(p, head / p.nheads, head % p.nheads);
  if (m0 >= s.seqlen_q) return;
  u8* slab = shared_memory();
  const float* sums = p.dq_sums + dq_tile<BLOCK_M>(p, s, s.h, m0) * Tile::kFloats;
#pragma unroll 1
  for (int i = 0; i < Tile::kSlabs; ++i, sums += Tile::kSlab) {
    const int row = i % Tile::kRowSlabs * 64, column = i / Tile::kRowSlabs * 64, limit = s.seqlen_q - m0 - row;
    if (limit <= 0 || column >= p.headdim) continue;
    u32 a[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint4 x = load_16_streamed(sums + (j * 128 + threadIdx.x) * 4);
      a[2 * j] = pack<T>(__uint_as_float(x.x) * p.scale, __uint_as_float(x.y) * p.scale);
      a[2 * j + 1] = pack<T>(__uint_as_float(x.z) * p.scale, __uint_as_float(x.w) * p.scale);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<u32*>(slab + Slab::at(16 * warp + lane / 4 + 8 * r, j) + 4 * (lane & 3)) = a[2 * j + r];
      }
    }
    __syncthreads();
    T* rows = row_of<T>(p.dq, p.dq_stride, s.b, s.first_q, s.h, m0 + row) + column;
    store_rows<128, 64, 64>(rows, p.dq_stride[1], slab, limit, p.headdim - column, threadIdx.x);
  }
}
