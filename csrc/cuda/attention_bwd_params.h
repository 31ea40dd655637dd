// What the host hands to the attention backward's kernels. Strides are in elements; a pointer that may be null says so.
// The fields that the forward has too bear its names (attention_params.h), so that the verbs of tile/ serve both.
#pragma once
#include <ptx/core.cuh>

struct AttentionBwdParams {
  const void* q;              // [batch, seqlen_q, nheads, headdim]; packed: [total_q, nheads, headdim]
  const void* k;              // [batch, seqlen_k, nheads_k, headdim]; packed: [total_k, …]
  const void* v;              // [batch, seqlen_k, nheads_k, headdim_v]
  const void* o;              // [batch, seqlen_q, nheads, headdim_v], read by the delta kernel alone
  const void* dout;           // as o
  const float* lse;           // [batch, nheads, seqlen_q], natural log; packed: [nheads, total_q]; delta kernel alone
  const float* dlse;          // its gradient, may be null; delta kernel alone
  float* lse_log2;            // [batch, nheads, seqlen_q], contiguous: lse · log2 e, +inf where lse is -inf
  float* delta;               // the same shape: rowsum(dout ∘ o) - dlse
  void* dq;                   // as q, contiguous
  float* dq_sums;             // dkdv kernel: [batch · nheads · dq_tiles] tiles of dq / scale, as DqTile (tile/bwd_dq.cuh) says
  int* dq_turns;              // [1 + tiles of dq_sums], first 0: numbers of blocks handed out, then for each tile how many
                              // blocks of keys have had their turn, the first of which writes; null: dq_sums are 0 first,
                              // and blocks add in any order
  void* dk;                   // as k, contiguous
  void* dv;                   // as v, contiguous
  float* dbias;               // may be null; zero before, because only visible pairs are written
  float* dsinks;              // [nheads], may be null
  const u8* mask;             // [batch, nheads, seqlen_q, seqlen_k], 0 hides the key, may be null
  const void* bias;           // [batch, nheads, seqlen_q, seqlen_k], may be null
  const float* alibi_slopes;  // [batch, nheads], may be null
  const void* sinks;          // [nheads], natural log, may be null
  const int* cu_seqlens_q;    // [batch + 1], may be null: not packed
  const int* cu_seqlens_k;    // [batch + 1], null with the above
  const i64* philox;          // (seed, offset), may be null: no dropout
  i64 q_stride[3], k_stride[3], v_stride[3], o_stride[3], dout_stride[3];  // batch, seqlen, head; packed: batch stride 0
  i64 dq_stride[3], dk_stride[3], dv_stride[3];
  i64 lse_stride[2], dlse_stride[2];                    // batch, head; packed: batch stride 0
  i64 row_stride[2];                                    // of lse_log2 and delta: batch, head; packed: batch stride 0
  i64 mask_stride[4], bias_stride[4], dbias_stride[4];  // batch, head, query, key; 0 where it broadcasts
  i64 alibi_stride;                                     // batch; 0 where it broadcasts
  i64 zero_turns, zero_sums;                            // so many of dq_turns and dq_sums the delta kernel makes 0, for whichever
                                                        // kernel adds dq up; a multiple of 4 of the latter
  int batch, nheads, nheads_k, headdim, headdim_v;
  int seqlen_q, seqlen_k;       // packed: the longest sequence
  int left, right;              // query m sees keys from its diagonal - left to + right; at most seqlen_q + seqlen_k
  int upper_left;               // 1: query 0 is aligned with key 0, 0: the last query with the last key
  int bias_float, sinks_float;  // 1: float, 0: the type of q
  int owned_b, owned_h;         // dbias kernel: the sequences and heads that dbias tells apart, 1 or all
  int bias_rows, bias_cols;     // dbias kernel: 1 where dbias has queries, has keys
  int dq_tiles;                 // of dq_sums per head of one sequence; packed: per head, total_q / BLOCK_M + batch
  int heads_together;           // dkdv kernel, in turns or not: so many heads of k take turns, block by block of keys
  float scale;
  float softcap;          // 0: none
  u32 dropout_threshold;  // a word below it drops its pair
  float dropout_scale;    // 1 / (1 - dropout_p)
};
