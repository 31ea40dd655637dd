// What the backward needs once per query, and the gradient of the sinks, which is made of nothing else.
#pragma once
#include <attention_bwd_params.h>

#include <ptx/convert.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>
#include <tile/copy.cuh>
#include <tile/reduce.cuh>
#include <tile/sequence.cuh>
#include <tile/sink.cuh>
#include <tile/softmax.cuh>

// delta = rowsum(dout ∘ o) - dlse and lse · log2 e, and zeros where dq will be added up: no launch more for these.
// A block: 32 queries of one head, eight lanes for each. A packed call is one sequence of total_q rows here.
// Grid: ceil(seqlen_q / 32) · nheads · batch. No shared memory. Bound by memory: 4 headdim_v + 12 bytes per query,
// and the zeros, 4 headdim per query on Hopper.
template <class T, bool kAligned>
__global__ void __launch_bounds__(256, 4) attention_bwd_delta_kernel(const __grid_constant__ AttentionBwdParams p) {
  int blocks = (p.seqlen_q + 31) / 32, rest = static_cast<int>(blockIdx.x) / blocks;
  int b = rest / p.nheads, h = rest % p.nheads;
  int m = static_cast<int>(blockIdx.x) % blocks * 32 + static_cast<int>(threadIdx.x) / 8, part = threadIdx.x % 8;
  bool exists = m < p.seqlen_q;
  float delta[1] = {0.0f};
  if (exists) {
    const T* o = row_of<T>(p.o, p.o_stride, b, 0, h, m);
    const T* dout = row_of<T>(p.dout, p.dout_stride, b, 0, h, m);
    for (int d = 8 * part; d < p.headdim_v; d += 64) {
      uint4 x = kAligned ? load_16_streamed(o + d) : gather_8(o + d, 8);
      uint4 y = kAligned ? load_16(dout + d) : gather_8(dout + d, 8);
      const u32 x_pair[4] = {x.x, x.y, x.z, x.w}, y_pair[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 u = unpack<T>(x_pair[i]), w = unpack<T>(y_pair[i]);
        delta[0] = fmaf(u.x, w.x, delta[0]);
        delta[0] = fmaf(u.y, w.y, delta[0]);
      }
    }
  }
  const i64 thread = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x, threads = static_cast<i64>(gridDim.x) * 256;
  for (i64 i = thread; i < p.zero_turns; i += threads) p.dq_turns[i] = 0;
  for (i64 i = 4 * thread; i < p.zero_sums; i += 4 * threads) store_16(p.dq_sums + i, uint4{});
  sum_lanes(delta, 8);
  if (!exists || part != 0) return;
  i64 to = b * p.row_stride[0] + h * p.row_stride[1] + m;
  float lse = p.lse[b * p.lse_stride[0] + h * p.lse_stride[1] + m];
  if (p.dlse != nullptr) delta[0] -= p.dlse[b * p.dlse_stride[0] + h * p.dlse_stride[1] + m];
  p.lse_log2[to] = lse == -infinity() ? infinity() : lse * kLog2e;
  p.delta[to] = delta[0];
}

// dsinks = - sum of exp(sink - lse) · delta over all queries of one head, in one fixed order.
// A block: one head of all sequences. A packed call is one sequence here.
// Grid: nheads. 160 bytes of shared memory. Bound by memory: 8 bytes per query.
template <class T>
__global__ void __launch_bounds__(256, 1) attention_bwd_dsinks_kernel(const __grid_constant__ AttentionBwdParams p) {
  int h = blockIdx.x;
  float sink = sink_of<T>(p, h), total[1] = {0.0f};
  for (int b = 0; b < p.batch; ++b) {
    i64 first = b * p.row_stride[0] + h * p.row_stride[1];
    for (int m = threadIdx.x; m < p.seqlen_q; m += 256) {
      float lse = p.lse_log2[first + m];
      if (lse != infinity()) total[0] -= exp2_approx(sink - lse) * p.delta[first + m];
    }
  }
  sum_block(total, *reinterpret_cast<SumScratch<1>*>(shared_memory()));
  if (threadIdx.x == 0) p.dsinks[h] = total[0];
}
