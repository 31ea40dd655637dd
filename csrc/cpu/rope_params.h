// The contract of the RoPE kernel. Strides are in elements: batch, seqlen, head; the last axis has unit stride.
#pragma once
#include <cstdint>

namespace fastattn {

struct RopeTensor {
  const void* x = nullptr;  // [batch, seqlen, nheads, headdim]; null: absent
  void* y = nullptr;        // as x
  int64_t nheads = 0, headdim = 0;
  int64_t x_stride[3] = {}, y_stride[3] = {};
};

struct RopeParams {
  int dtype = 0, table_dtype = 0;           // 0 float32, 1 bfloat16, 2 float16
  int64_t batch = 0, seqlen = 0, half = 0;  // half = rotary_dim / 2
  RopeTensor tensor[2];                     // the second is absent unless q and k go together
  const void* cos = nullptr;                // [batch or 1, table_rows, half]
  const void* sin = nullptr;
  int64_t cos_stride[2] = {}, sin_stride[2] = {};  // batch, row
  const void* positions = nullptr;                 // [batch, seqlen] of int32 or int64, may be null: position s is row s
  bool positions_int64 = false;
  int64_t position_stride[2] = {};  // batch, seqlen
  bool interleaved = false;         // pairs (2i, 2i + 1) instead of (i, i + half)
  bool inverse = false;             // rotate by -angle: the backward pass
  int nthreads = 1;
};

}  // namespace fastattn
