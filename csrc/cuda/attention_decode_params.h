// What the kernels behind attention_kvcache are told. Strides count elements; the last one of every tensor is 1.
#pragma once
#include <ptx/core.cuh>

// attention_decode_kernel: queries against a cache. T is the dtype of q, k, v and o. The names are those of AttentionParams.
struct AttentionDecodeParams {
  const void* q;              // T [batch, seqlen_q, nheads, headdim]
  const void* k;              // T [batch, seqlen_k, nheads_k, headdim]; paged: [num_blocks, block_size, nheads_k, headdim]
  const void* v;              // T, as k with headdim_v
  void* o;                    // T [batch, seqlen_q, nheads, headdim_v], contiguous
  float* lse;                 // [batch, nheads, seqlen_q], natural log
  const int* cache_seqlens;   // [batch]: keys before the seqlen_new that the append kernel has written
  const int* block_table;     // [batch, max_blocks]: the cache block of slots block_size · i …; null: not paged
  const float* alibi_slopes;  // [batch, nheads], may be null
  const void* sinks;          // [nheads], natural log, may be null
  float* part;                // [num_splits, part_rows, headdim_v]: o of each split; null when there is one split
  float* part_lse;            // [num_splits, part_rows], in units of log 2, -inf for a split without keys; null with part
  i64 q_stride[3];            // batch, seqlen, head
  i64 k_stride[3];            // batch (paged: block), slot, head
  i64 v_stride[3];            // likewise
  i64 block_table_stride;     // batch
  i64 alibi_stride;           // batch; 0 where it broadcasts
  int nheads, nheads_k;       // heads of q and o, and of k and v
  int headdim, headdim_v;     // multiples of 8, at most the kernel's
  int seqlen_q;               // queries per sequence
  int seqlen_k;               // slots that a sequence has
  int seqlen_new;             // keys that this call appended, 0 or more
  int block_size;             // slots of a block, at least 1
  int blocks_m;               // blocks of rows; a row is one query of one head of the group
  int part_rows;              // batch · seqlen_q · nheads
  int num_splits;             // parts that the keys are cut into
  int least;                  // tiles of keys that a part has at least
  int left, right;            // query m sees keys from its diagonal - left to + right; at most seqlen_q + seqlen_k
  int upper_left;             // 1: query 0 is aligned with key 0, 0: the last query with the last key
  int sinks_float;            // 1: float, 0: the type of q
  float scale;                // of q · k
  float softcap;              // 0: none
  int aligned;                // 1: every row of q, k, v starts at a multiple of 16 bytes
};

// attention_combine_kernel: the splits of every row into one.
struct AttentionCombineParams {
  const float* part;      // [num_splits, rows, headdim_v]
  const float* part_lse;  // [num_splits, rows], in units of log 2
  void* o;                // T [rows, headdim_v], rows as [batch, seqlen_q, nheads]
  float* lse;             // [batch, nheads, seqlen_q], natural log
  int rows;               // batch · seqlen_q · nheads
  int num_splits;         // at least 1
  int headdim_v;          // a multiple of 8
  int nheads;             // of q
  int seqlen_q;           // queries per sequence
  int warps_per_row;      // 1, 2, 4 or 8
};

// attention_append_kernel: new keys and values into the caches; with RoPE it rotates the keys, and q, on the way.
struct AttentionAppendParams {
  const void* k;             // T [batch, seqlen_new, nheads_k, headdim]
  const void* v;             // T [batch, seqlen_new, nheads_k, headdim_v]
  const void* q;             // T [batch, seqlen_new, nheads, headdim]; null without RoPE
  void* k_cache;             // T [batch, seqlen_k, nheads_k, headdim]; paged: [num_blocks, block_size, nheads_k, headdim]
  void* v_cache;             // T, as k_cache with headdim_v
  void* q_out;               // T [batch, seqlen_new, nheads, headdim], contiguous; null without RoPE
  const int* cache_seqlens;  // [batch]: key i goes to slot cache_seqlens[b] + i
  const int* block_table;    // [batch, max_blocks]; null: not paged
  const void* cos;           // Table [table_rows, half]; null without RoPE
  const void* sin;           // Table [table_rows, half]; null without RoPE
  i64 k_stride[3];           // batch, seqlen, head
  i64 v_stride[3];           // likewise
  i64 q_stride[3];           // likewise
  i64 k_cache_stride[3];     // batch (paged: block), slot, head
  i64 v_cache_stride[3];     // likewise
  i64 block_table_stride;    // batch
  i64 cos_stride;            // position
  i64 sin_stride;            // position
  int rows;                  // batch · seqlen_new
  int rows_per_block;        // at least 1
  int units;                 // that a row consists of: nheads_k · (units_k + units_v) + nheads · units_k with RoPE
  int units_k;               // of a head of k or q: half / width turned ones, then (headdim - 2 half) / width copied ones
  int units_v;               // of a head of v: headdim_v / width
  int nheads, nheads_k;      // heads of q, and of k and v
  int seqlen_new;            // new keys per sequence
  int seqlen_k;              // slots that a sequence has; a key beyond them is not written
  int block_size;            // slots of a block, at least 1
  int headdim;               // of q and k
  int half;                  // pairs that are rotated, 0 without RoPE
  int table_rows;            // positions of cos and sin; another one gives NaN
  int interleaved;           // 1: pairs are (2i, 2i + 1), 0: (i, half + i)
};
