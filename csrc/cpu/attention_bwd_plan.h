// How the backward is cut into tasks, and what is summed once they are done.
#pragma once
#include "attention_bwd_rows.h"
#include "parallel.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int64_t kBlockN = 128;

// Which loops run inside one task: a bias gradient that is summed over batch or heads is summed in a fixed order.
struct Plan {
  int64_t batch_tasks, head_tasks, chunks, chunk_keys;
};

// Rows of dq over all sequences: the partial sums of chunks are stored by it.
FASTATTN_INLINE int64_t query_rows(const AttentionParams& p) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[p.batch] : p.batch * p.seqlen_q;
}

Plan make_plan(const AttentionBwdParams& p) {
  Plan plan;
  bool merge_batch = p.dbias != nullptr && p.dbias_stride[0] == 0, merge_heads = p.dbias != nullptr && p.dbias_stride[1] == 0;
  plan.batch_tasks = merge_batch ? 1 : p.batch;
  plan.head_tasks = merge_heads ? 1 : p.nheads_k;
  int64_t tasks = plan.batch_tasks * plan.head_tasks, most = max64(1, p.seqlen_k / 512);
  // Each chunk has its own partial sum of dq: not more of them than half a gigabyte holds.
  constexpr int64_t kPartialFloats = 128 << 20;
  most = min64(most, kPartialFloats / max64(1, p.nheads * query_rows(p) * p.headdim));
  bool keys_summed = p.dbias != nullptr && p.dbias_stride[3] == 0;
  // Few heads are cut, so that eight threads have work. Not more: every chunk writes a dq of its own, which is read again.
  plan.chunks = tasks >= 8 || keys_summed ? 1 : max64(1, min64(most, (8 + tasks - 1) / tasks));
  plan.chunk_keys = round_up((p.seqlen_k + plan.chunks - 1) / plan.chunks, kBlockN);
  plan.chunks = max64(1, (p.seqlen_k + plan.chunk_keys - 1) / max64(1, plan.chunk_keys));
  return plan;
}

FASTATTN_INLINE int64_t query_row(const AttentionParams& p, const Head& s, int64_t m) {
  return (p.cu_seqlens_q ? s.q_start : s.b * p.seqlen_q) + m;
}

// dq = sum of the chunks' partial sums, in their order.
template <class T>
void reduce_queries(const AttentionBwdParams& p, const Plan& plan, const float* partial) {
  int64_t rows = query_rows(p), stride = p.nheads * rows * p.headdim;
  parallel_for(p.nthreads, p.batch * p.nheads, [&](int64_t task) {
    Head s = head_of(p, task / p.nheads, task % p.nheads);
    for (int64_t m = 0; m < s.sq; ++m) {
      const float* from = partial + (s.h * rows + query_row(p, s, m)) * p.headdim;
      T* to = out_row<T>(p.dq, p.dq_stride, s.b, s.q_start + m, s.h);
      for (int64_t d = 0; d < p.headdim; d += VL) {
        int64_t n = min64(VL, p.headdim - d);
        vf sum = load_n(from + d, n);
        for (int64_t i = 1; i < plan.chunks; ++i) sum = sum + load_n(from + i * stride + d, n);
        store_n(to + d, sum, n);
      }
    }
  });
}

// dsinks[h] = -sum over rows of exp(sink - lse) * delta: the sink is a key whose value is 0.
template <class T>
void sink_gradients(const AttentionBwdParams& p) {
  parallel_for(p.nthreads, p.nheads, [&](int64_t h) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      Head s = head_of(p, b, h);
      for (int64_t m = 0; m < s.sq; ++m) {
        float lse = *lse_of(p, s, m);
        if (lse == -kInfinity) continue;
        float delta = reduce_add(dot_lanes<FloatCells>(do_row<T>(p, s, m), o_row<T>(p, s, m), p.headdim_v));
        if (p.dlse != nullptr) delta -= p.dlse[s.b * p.dlse_stride[0] + s.h * p.dlse_stride[1] + s.q_start + m];
        sum -= static_cast<double>(__builtin_expf(p.sinks[h] - lse)) * delta;
      }
    }
    p.dsinks[h] = static_cast<float>(sum);
  });
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
