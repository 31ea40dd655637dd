// What the host hands to the attention forward of sm_90a. The fields that tile/ reads have the names and meanings of
// AttentionParams; strides are in elements. Maps list (headdim, seqlen, heads, batch), packed with a batch of 1, and their
// boxes are 64 columns wide with a 128-byte swizzle, but for the bias.
#pragma once
#include <ptx/core.cuh>

struct AttentionSm90Params {
  TensorMap q_map, o_map;     // boxes of 64 rows
  TensorMap k_map, v_map;     // boxes of BLOCK_N rows, of half of them with kMulticast
  TensorMap bias_map;         // (key, query, head, batch), 1 where it broadcasts, in boxes of BiasTile; any without kTile
  const void* q;              // [batch, seqlen_q, nheads, headdim]; packed: [total_q, nheads, headdim]
  const void* k;              // [batch, seqlen_k, nheads_k, headdim]; packed: [total_k, …]
  const void* v;              // [batch, seqlen_k, nheads_k, headdim_v]
  void* o;                    // [batch, seqlen_q, nheads, headdim_v], rows aligned to 16 bytes
  float* lse;                 // [batch, nheads, seqlen_q], natural log; packed: [nheads, total_q]
  const u8* mask;             // [batch, nheads, seqlen_q, seqlen_k], 0 hides the key, may be null
  const void* bias;           // [batch, nheads, seqlen_q, seqlen_k], may be null
  const float* alibi_slopes;  // [batch, nheads], may be null
  const void* sinks;          // [nheads], natural log, may be null
  const int* cu_seqlens_q;    // [batch + 1], may be null: not packed
  const int* cu_seqlens_k;    // [batch + 1], null with the above
  const i64* philox;          // (seed, offset), may be null: no dropout
  int* counter;               // work handed out so far, 0 at launch; null unless kDynamic
  i64 q_stride[3], k_stride[3], v_stride[3], o_stride[3];  // batch, seqlen, head; packed: batch stride 0
  i64 lse_stride[2];                                       // batch, head; packed: batch stride 0
  i64 mask_stride[4], bias_stride[4];                      // batch, head, query, key; 0 where it broadcasts
  i64 alibi_stride;                                        // batch; 0 where it broadcasts
  int batch, nheads, nheads_k, headdim, headdim_v;
  int seqlen_q, seqlen_k;       // packed: the longest sequence
  int left, right;              // query m sees keys from its diagonal - left to + right; at most seqlen_q + seqlen_k
  int upper_left;               // 1: query 0 is aligned with key 0, 0: the last query with the last key
  int bias_float, sinks_float;  // 1: float, 0: the type of q
  float scale;
  float softcap;          // 0: none
  u32 dropout_threshold;  // a word below it drops its pair
  float dropout_scale;    // 1 / (1 - dropout_p)
  int pieces, blocks_m;   // of work, in all and along the longest sequence
  int heads_together;     // so many heads (pairs with heads_each 2) take turns, piece by piece: their k and v fit the L2 cache
                          // together
  int heads_each;         // 2: with kMulticast, a piece is BLOCK_M queries of two heads that share k and v; 1: of one head
  int longest_first;      // 1: the last block of queries comes first (causal: it sees most keys)
  int hides;              // 1: a key that is loaded may be hidden from a query, so that 0 · NaN must be looked for
};
