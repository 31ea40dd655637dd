// The contract of the attention kernels. Strides are in elements; a pointer that may be null says so.
#pragma once
#include <cstdint>

namespace fastattn {

constexpr int64_t kUnbounded = int64_t{1} << 40;

struct AttentionParams {
  int dtype = 0;  // of q, k, v, o: 0 float32, 1 bfloat16, 2 float16
  int64_t batch = 0, nheads = 0, nheads_k = 0, headdim = 0, headdim_v = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // packed: the longest sequence
  const void* q = nullptr;             // [batch, seqlen_q, nheads, headdim], packed: batch stride 0
  const void* k = nullptr;             // [batch, seqlen_k, nheads_k, headdim]
  const void* v = nullptr;             // [batch, seqlen_k, nheads_k, headdim_v]
  void* o = nullptr;                   // [batch, seqlen_q, nheads, headdim_v]
  float* lse = nullptr;                // [batch, nheads, seqlen_q], natural log
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {}, o_stride[3] = {};  // batch, seqlen, head
  int64_t lse_stride[2] = {};                                                      // batch, head; the last is 1
  const int32_t* cu_seqlens_q = nullptr;                                           // [batch + 1], may be null (not packed)
  const int32_t* cu_seqlens_k = nullptr;                                           // [batch + 1], null with the above
  const int32_t* seqlens_k = nullptr;    // [batch], may be null: keys present per batch entry (KV cache)
  const int32_t* block_table = nullptr;  // [batch, ...], may be null: k, v are [num_blocks, block_size, nheads_k, ...]
  int64_t block_table_stride = 0, block_size = 0;
  // Query m sees key n when diagonal - left <= n <= diagonal + right, diagonal = m + (upper_left ? 0 : sk - sq).
  int64_t left = kUnbounded, right = kUnbounded;
  bool upper_left = false;
  float scale = 1.0f;
  float softcap = 0.0f;         // 0: none
  const bool* mask = nullptr;   // may be null; broadcast strides are 0
  int64_t mask_stride[4] = {};  // batch, head, query, key
  const void* bias = nullptr;   // may be null
  int bias_dtype = 0;
  int64_t bias_stride[4] = {};
  const float* alibi_slopes = nullptr;  // may be null
  int64_t alibi_stride[2] = {};         // batch, head
  const float* sinks = nullptr;         // [nheads], may be null
  bool dropout = false;
  uint32_t dropout_threshold = 0;  // a word below it drops the pair
  float dropout_scale = 1.0f;      // 1 / (1 - p)
  uint32_t philox_key[2] = {}, philox_offset = 0;
  int64_t num_splits = 0;  // decode: 0 chooses by length alone
  int nthreads = 1;
};

struct AttentionBwdParams : AttentionParams {
  const void* dout = nullptr;   // as o
  const float* dlse = nullptr;  // as lse, may be null
  void* dq = nullptr;           // as q
  void* dk = nullptr;           // as k
  void* dv = nullptr;           // as v
  float* dbias = nullptr;       // may be null; zeroed by the caller; the bias' own shape, strides 0 where it broadcasts
  float* dsinks = nullptr;      // [nheads], may be null
  int64_t do_stride[3] = {}, dq_stride[3] = {}, dk_stride[3] = {}, dv_stride[3] = {};
  int64_t dlse_stride[2] = {};
  int64_t dbias_stride[4] = {};
};

}  // namespace fastattn
