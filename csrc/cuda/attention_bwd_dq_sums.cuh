// dq = scale · dq_sums in the type of q: a tile of BLOCK_M queries of one head, from where attention_bwd_dkdv.cuh left it.
// Grid: blocks of queries · nheads · batch. Shared memory: the tile in T, 2 D BLOCK_M bytes. Bound by memory: 6 bytes per element.
#pragma once
#include <attention_bwd_params.h>

#include <ptx/core.cuh>
#include <tile/bwd_dq.cuh>
#include <tile/bwd_product.cuh>
#include <tile/copy.cuh>
#include <tile/sequence.cuh>

template <class T, int D, int BLOCK_M>
__global__ void __launch_bounds__(128) attention_bwd_dq_sums_kernel(const __grid_constant__ AttentionBwdParams p) {
  using Tile = TileLayout<BLOCK_M, D>;
  using Sums = DqTile<BLOCK_M, D>;
  const int blocks = (p.seqlen_q + BLOCK_M - 1) / BLOCK_M, id = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int rest = id / blocks, m0 = id % blocks * BLOCK_M;
  const Sequence s = sequence_of(p, rest / p.nheads, rest % p.nheads);
  if (m0 >= s.seqlen_q) return;
  u8* tile = shared_memory();
  const i64 number = dq_tile<BLOCK_M>(p, s, s.h, m0);
  const bool is_there = p.dq_turns == nullptr || *turns_of(p, number) != 0;  // else no key is seen, and nobody wrote
  const float* sums = p.dq_sums + number * Sums::kFloats + lane;
#pragma unroll 4
  for (int i = warp; i < BLOCK_M / 16 * (D / 16); i += 4) {
    const int row16 = i / (D / 16), group = i % (D / 16);
    float x[1][2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[0][j][e] = is_there ? sums[Sums::fragment(row16, 2 * group + j) + 32 * e] : 0.0f;
    }
    put_accumulator<T, Tile, 1>(tile, x, p.scale, 16 * row16, group);
  }
  __syncthreads();
  T* rows = row_of<T>(p.dq, p.dq_stride, s.b, s.first_q, s.h, m0);
  store_rows<128, BLOCK_M, D>(rows, p.dq_stride[1], tile, s.seqlen_q - m0, p.headdim, threadIdx.x);
}
