// What the host hands to the Hopper attention backward. Strides are in elements; a pointer that may be null says so. Fields that
// the forward has too bear its names (attention_params.h), so that the verbs of tile/ serve both.
#pragma once
#include <ptx/core.cuh>

struct AttentionBwdSm90Params {
  TensorMap q_map, dout_map;  // boxes of BLOCK_M rows
  TensorMap k_map, v_map;     // boxes of BLOCK_N rows
  const void* q;              // [batch, seqlen_q, nheads, headdim]; packed: [total_q, nheads, headdim]
  const void* k;              // [batch, seqlen_k, nheads_k, headdim]; packed: [total_k, …]
  const void* v;              // [batch, seqlen_k, nheads_k, headdim_v]
  const void* dout;           // [batch, seqlen_q, nheads, headdim_v]
  const float* lse_log2;      // [batch, nheads, seqlen_q]: lse · log2 e, +inf where lse is -inf
  const float* delta;         // the same shape: rowsum(dout ∘ o) - dlse
  float* dq_sums;    // [nheads · batch, blocks_m, BLOCK_M · HEADDIM], packed: [nheads, blocks_m, …]: dq / scale, 0 at launch;
                     // a tile lies as DqTile (tile/bwd_sm90.cuh) says
  int* drawn;        // [1], 0 at launch: how many blocks of keys have been handed out; null: blocks take their own number
  int* turns;        // [nheads · batch · blocks_m · parts], 0 at launch: for each part of a tile of dq_sums how many blocks of keys
                     // have added to it; null: they add in any order
  void* dq;          // as q, rows aligned to 16 bytes
  void* dk;          // as k, rows aligned to 16 bytes
  void* dv;          // as v, rows aligned to 16 bytes
  float* dbias;      // [batch, nheads, seqlen_q, seqlen_k], may be null; zero before, because only visible pairs are written
  const u8* mask;    // [batch, nheads, seqlen_q, seqlen_k], 0 hides the key, may be null
  const void* bias;  // [batch, nheads, seqlen_q, seqlen_k], may be null
  const float* alibi_slopes;                                  // [batch, nheads], may be null
  const int* cu_seqlens_q;                                    // [batch + 1], may be null: not packed
  const int* cu_seqlens_k;                                    // [batch + 1], null with the above
  const i64* philox;                                          // (seed, offset), may be null: no dropout
  i64 q_stride[3], k_stride[3], v_stride[3], dout_stride[3];  // batch, seqlen, head; packed: batch stride 0
  i64 dq_stride[3], dk_stride[3], dv_stride[3];
  i64 row_stride[2];                                    // of lse_log2 and delta: batch, head; packed: batch stride 0
  i64 mask_stride[4], bias_stride[4], dbias_stride[4];  // batch, head, query, key; 0 where it broadcasts
  i64 alibi_stride;                                     // batch; 0 where it broadcasts
  int batch, nheads, nheads_k, headdim, headdim_v;
  int seqlen_q, seqlen_k;  // packed: the longest sequence
  int left, right;         // query m sees keys from its diagonal - left to + right; at most seqlen_q + seqlen_k
  int upper_left;          // 1: query 0 is aligned with key 0, 0: the last query with the last key
  int bias_float;          // 1: float, 0: the type of q
  float scale;
  float softcap;          // 0: none
  u32 dropout_threshold;  // a word below it drops its pair
  float dropout_scale;    // 1 / (1 - dropout_p)
  int blocks_m;           // tiles of dq_sums of one head of one sequence; packed: of one head, total_q / BLOCK_M + batch
  int blocks_n;           // blocks of BLOCK_N keys in the longest sequence
  int heads_together;     // so many heads of k take turns, block by block of keys
};
