// The contract of the norm kernels. Rows are the last axis; dtype tags: 0 float32, 1 bfloat16, 2 float16.
#pragma once
#include <cstdint>

namespace fastattn {

// The leading axes of a tensor, merged where strides allow; the last axis has unit stride. Strides are in elements.
struct Rows {
  static constexpr int kMaxDims = 7;
  const void* data = nullptr;  // null: this tensor is absent
  int ndim = 0;
  int64_t shape[kMaxDims] = {}, stride[kMaxDims] = {};
};

struct NormParams {
  bool centred = false;             // layer_norm subtracts the mean, rms_norm does not
  int dtype = 0, weight_dtype = 0;  // of x, residual, y, sum; of weight and bias
  int64_t rows = 0, cols = 0;
  Rows x, residual;              // residual may be absent
  const void* weight = nullptr;  // [cols], may be null
  const void* bias = nullptr;    // [cols], may be null
  void* y = nullptr;             // [rows, cols] contiguous
  void* sum = nullptr;           // as y: x + residual, null without residual
  float* mean = nullptr;         // [rows], may be null
  float* rstd = nullptr;         // [rows], may be null
  double eps = 0;
  float weight_offset = 0;
  bool round_first = false;  // x_hat is rounded to dtype before it is multiplied
  int nthreads = 1;
};

struct NormBwdParams {
  bool centred = false;
  int dtype = 0, weight_dtype = 0;
  int64_t rows = 0, cols = 0;
  Rows x, dy, dsum;              // x is what was normalised; dsum may be absent
  const void* weight = nullptr;  // [cols], may be null
  const float* mean = nullptr;   // [rows], null unless centred
  const float* rstd = nullptr;   // [rows]
  void* dx = nullptr;            // [rows, cols] contiguous
  void* dweight = nullptr;       // [cols] of weight_dtype, may be null
  void* dbias = nullptr;         // [cols] of weight_dtype, may be null
  float weight_offset = 0;
  int nthreads = 1;
};

}  // namespace fastattn
