// What the kernel of rope and rope_qk is told. T is the dtype of q and k, W that of cos and sin. Strides count elements; the
// last one of every tensor is 1.
#pragma once
#include <ptx/core.cuh>

struct RopeParams {
  const void* q;        // T [batch, seqlen, nheads, headdim]
  const void* k;        // T [batch, seqlen, nheads_k, headdim_k]; may be null
  void* q_out;          // T, shaped as q
  void* k_out;          // T, shaped as k; null with k
  const void* cos;      // W [batch, table_rows, half]
  const void* sin;      // W, shaped as cos
  const void* ids;      // [batch, seqlen]: the row of the tables at each position; null: the position itself
  i64 q_stride[3];      // batch, seqlen, head
  i64 k_stride[3];      // likewise
  i64 q_out_stride[3];  // likewise
  i64 k_out_stride[3];  // likewise
  i64 cos_stride[2];    // batch (0 when the batch shares a table), row
  i64 sin_stride[2];    // likewise
  i64 ids_stride[2];    // batch (0 when the batch shares them), position
  i64 table_rows;       // a position outside of them gives NaN
  u32 rows;             // batch · seqlen, at least 1
  u32 seqlen;           // positions per sequence, at least 1
  u32 nheads;           // of q
  u32 nheads_k;         // of k; 0 without k
  u32 headdim;          // of q; elements from 2 · half on are copied
  u32 headdim_k;        // of k
  u32 half;             // pairs per head
  u32 lanes;            // threads that share a head: as many as half has packs, at least 1
  u32 head_lanes;       // heads of a position that a block works on at once
  int ids_wide;         // ids are 64 bits wide, else 32
  int interleaved;      // pairs are elements 2i and 2i + 1, else i and i + half
  float sign;           // -1 turns by the negative angle, else 1
};
